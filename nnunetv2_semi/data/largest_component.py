"""Connected components of labels: how many there are, and label maps without islands."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from scipy import ndimage

Name = TypeVar("Name")


def largest_components(labels: torch.Tensor, classes: Collection[tuple[int, int]] | None = None) -> torch.Tensor:
    """``labels`` (B, C, *spatial), integers, without islands: they become 0.

    Of each of ``classes``, (channel, label above 0), the largest component stays, of several of the same size the first
    one; and those that touch the border of the patch, beyond which they may be connected with it. None: of all. Voxels
    that share a corner are connected. Done on the CPU.
    """
    given = labels.to(torch.int16).cpu().numpy()
    kept = given.copy()
    for patch, result in zip(given, kept, strict=True):
        for index, channel in enumerate(patch):
            for label, box in enumerate(ndimage.find_objects(channel), 1):
                if box is not None and (classes is None or (index, label) in classes):
                    mask = channel[box] == label
                    result[index][box][mask & ~_without_islands(mask, box, channel.shape)] = 0
    return torch.from_numpy(kept).to(labels)


def numbers_of_components(labels: np.ndarray, classes: Mapping[Name, Sequence[int]]) -> dict[Name, int]:
    """How many connected components each of ``classes`` has, given as the labels that belong to it.

    ``labels``: (*spatial), whole numbers; those below 1 belong to none. Voxels that share a corner are connected.
    """
    boxes = ndimage.find_objects(labels.astype(np.int32))
    counts = {}
    for name, members in classes.items():
        own = [boxes[label - 1] for label in members if 0 < label <= len(boxes) and boxes[label - 1] is not None]
        box = tuple(slice(min(side.start for side in sides), max(side.stop for side in sides))
                    for sides in zip(*own, strict=True))
        counts[name] = _components(np.isin(labels[box], members))[1] if own else 0
    return counts


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
