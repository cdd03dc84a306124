"""Patches of any size for networks that halve them: padded to what the strides divide, the output cropped again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def product_of_strides(strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Of each stage's strides, (stages, axes), the product along each axis."""
    return tuple(math.prod(along) for along in zip(*strides, strict=True))


def padded_to_strides(image: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """``image`` (B, C, *spatial) with zeros at its end, so that ``strides``, one per axis, divide its sizes."""
    spatial = image.shape[2:]
    # Two voxels at least along an axis that is reduced: instance normalisation needs more than one.
    sizes = [max(-(-size // stride), 2 if stride > 1 else 1) * stride
             for size, stride in zip(spatial, strides, strict=True)]
    # torch's ``pad`` begins with the last axis
    return F.pad(image, [end for size, padded in zip(reversed(spatial), reversed(sizes), strict=True)
                         for end in (0, padded - size)])


def cropped(output: torch.Tensor, spatial: Sequence[int]) -> torch.Tensor:
    """The first voxels of ``output`` (B, K, *padded) along each axis, (B, K, *spatial)."""
    for axis, size in enumerate(spatial, 2):
        output = output.narrow(axis, 0, size)
    return output
