"""Label maps without islands."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage


def largest_components(labels: torch.Tensor) -> torch.Tensor:
    """``labels`` (B, C, *spatial), integers, with the largest component of each label above 0 in each channel of a
    patch; other voxels become 0.

    Voxels that share a corner are connected. Of components of the same size the first one stays. Done on the CPU.
    """
    given = labels.to(torch.int16).cpu().numpy()
    kept = np.zeros_like(given)
    channels = (given.shape[0] * given.shape[1], *given.shape[2:])
    for channel, result in zip(given.reshape(channels), kept.reshape(channels), strict=True):
        for label, box in enumerate(ndimage.find_objects(channel), 1):
            if box is not None:
                result[box][_largest_component(channel[box] == label)] = label
    return torch.from_numpy(kept).to(labels)


def number_of_components(mask: np.ndarray) -> int:
    """How many connected components a mask has; voxels that share a corner are connected."""
    return _components(mask)[1]


def _components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    return ndimage.label(mask, np.ones((3,) * mask.ndim))


def _largest_component(mask: np.ndarray) -> np.ndarray:
    components, count = _components(mask)
    if count == 1:
        return mask
    return components == 1 + np.bincount(components.ravel())[1:].argmax()
