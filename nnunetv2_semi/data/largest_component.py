"""Connected components of labels: how many there are, and label maps without islands."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

import cc3d
import numpy as np
import torch
from scipy import ndimage

Name = TypeVar("Name")


def largest_components(labels: torch.Tensor, classes: Collection[tuple[int, int]] | None = None) -> torch.Tensor:
    """``labels`` (B, C, *spatial), integers, without islands: they become 0.

    Of each of ``classes``, (channel, label above 0), the largest component stays, of several of the same size one; and
    those that touch the border of the patch, beyond which they may be connected with it. None: of all. Voxels that
    share a corner are connected. Done on the CPU.
    """
    result = labels.to("cpu", torch.int16, copy=True)
    for patch in result.numpy():
        for index, channel in enumerate(patch):
            _remove_islands(channel, None if classes is None else {label for own, label in classes if own == index})
    return result.to(labels)


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
        counts[name] = ndimage.label(np.isin(labels[box], members), np.ones((3,) * labels.ndim))[1] if own else 0
    return counts


def always_connected(label_maps: Iterable[np.ndarray], classes: Mapping[Name, Sequence[int]],
                     ignore_label: int | None = None) -> list[Name]:
    """Those of ``classes`` with one connected component in each of ``label_maps`` that has them; one at least must.

    A map with ``ignore_label`` in it may hide further components, so that it can tell of several, but not of one.
    """
    left, shown = dict(classes), set()
    for labels in label_maps:
        hides = ignore_label is not None and bool((labels == ignore_label).any())
        for name, count in numbers_of_components(labels, left).items():
            if count > 1:
                del left[name]
            elif count == 1 and not hides:
                shown.add(name)
    return [name for name in left if name in shown]


def _components(labels: np.ndarray) -> np.ndarray:
    """The number of the component, from 1, of each voxel with a label; voxels of other labels are of others."""
    # In 2D, with its connectivity of 8, cc3d 4.1.1 splits components of masks; as one slice of a volume it does not.
    volume = labels[None] if labels.ndim == 2 else labels
    return cc3d.connected_components(volume, connectivity=26).reshape(labels.shape)


def _remove_islands(labels: np.ndarray, chosen: Collection[int] | None) -> None:
    """In place, of the ``chosen`` labels or of all."""
    boxes = ndimage.find_objects((labels > 0).view(np.int8))
    if not boxes:
        return
    box, inside = boxes[0], labels[boxes[0]]
    components = _components(inside)
    sizes = np.bincount(components.ravel())
    label_of = np.zeros(len(sizes), labels.dtype)
    label_of[components.ravel()] = inside.ravel()
    stays = np.zeros(len(sizes), dtype=bool)
    for label in np.unique(label_of):
        own = np.flatnonzero(label_of == label)
        stays[own[sizes[own].argmax()] if chosen is None or label in chosen else own] = True
    for axis, (side, size) in enumerate(zip(box, labels.shape, strict=True)):
        for end, at_border in ((0, side.start == 0), (-1, side.stop == size)):
            if at_border:
                stays[components.take(end, axis)] = True
    if not stays.all():
        inside[~stays[components]] = 0
