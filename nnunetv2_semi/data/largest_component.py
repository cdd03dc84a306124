"""Label maps without islands."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage


def largest_components(labels: torch.Tensor) -> torch.Tensor:
    """``labels`` (B, C, *spatial), integers, without the islands of each label above 0 in each channel of a patch: they
    become 0.

    The largest component stays, of several of the same size the first one; and those that touch the border of the
    patch, beyond which they may be connected with it. Voxels that share a corner are connected. Done on the CPU.
    """
    given = labels.to(torch.int16).cpu().numpy()
    kept = np.zeros_like(given)
    channels = (given.shape[0] * given.shape[1], *given.shape[2:])
    for channel, result in zip(given.reshape(channels), kept.reshape(channels), strict=True):
        for label, box in enumerate(ndimage.find_objects(channel), 1):
            if box is not None:
                result[box][_without_islands(channel[box] == label, box, channel.shape)] = label
    return torch.from_numpy(kept).to(labels)


def number_of_components(mask: np.ndarray) -> int:
    """How many connected components a mask has; voxels that share a corner are connected."""
    return _components(mask)[1]


def _components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    return ndimage.label(mask, np.ones((3,) * mask.ndim))


def _without_islands(mask: np.ndarray, box: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Of a ``mask`` that fills the ``box`` of a patch of this ``shape``."""
    components, count = _components(mask)
    if count == 1:
        return mask
    stays = np.zeros(count + 1, dtype=bool)
    stays[1 + np.bincount(components.ravel())[1:].argmax()] = True
    for axis, (side, size) in enumerate(zip(box, shape, strict=True)):
        for end, at_border in ((0, side.start == 0), (-1, side.stop == size)):
            if at_border:
                stays[components.take(end, axis)] = True
    stays[0] = False  # the background of the mask
    return stays[components]
