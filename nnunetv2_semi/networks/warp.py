"""Warping by displacement fields, and what is done with such fields: resized, composed, searched for folds.

A field (B, n, *spatial) over n spatial axes is in voxels of its own grid, its channels in the order of those axes. The
warped image at voxel x is the image at x + displacement(x).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from nnunetv2_semi.losses.predictions import single_precision
from nnunetv2_semi.precision import without_autocast

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def warp(image: torch.Tensor, displacement: torch.Tensor, mode: Literal["bilinear", "nearest"] = "bilinear",
         padding: Literal["border", "zeros", "reflection"] = "border") -> torch.Tensor:
    """The image at x + displacement(x) for every voxel x, (B, C, *spatial), float32 (or float64).

    image: (B, C, *spatial) with two or three spatial axes, labels as one-hot channels or, with "nearest", as numbers.
    displacement: (B, n, *spatial), voxels. mode: "bilinear" is trilinear in 3D. padding: what lies outside the image;
    along an axis of one voxel nothing does. Gradients reach both. Raises ValueError for a field of another shape.
    """
    sizes = image.shape[2:]
    if displacement.shape != (len(image), len(sizes), *sizes):
        raise ValueError(f"an image {tuple(image.shape)} is warped by a displacement "
                         f"{(len(image), len(sizes), *sizes)}, got {tuple(displacement.shape)}")
    with without_autocast(image.device):
        displacement = single_precision(displacement)
        positions = []  # from -1 at the first voxel to 1 at the last
        for axis, (size, along) in enumerate(zip(sizes, displacement.unbind(1), strict=True)):
            voxel = torch.arange(size, dtype=displacement.dtype, device=displacement.device)
            voxel = voxel.view(-1, *[1] * (len(sizes) - 1 - axis))
            positions.append((voxel + along) * (2 / max(size - 1, 1)) - 1)
        grid = torch.stack(positions[::-1], -1)  # grid_sample names the last axis first
        return F.grid_sample(image.to(grid.dtype), grid, mode=mode, padding_mode=padding, align_corners=True)


def resize_displacement(displacement: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The same field on a grid of ``size`` voxels, (B, n, *size): interpolated linearly, and in voxels of that grid.

    The centres of the first and the last voxel stay where they are, so that voxels scale by (new - 1) / (old - 1); an
    axis of one voxel counts as one of two. float32 (or float64). Raises ValueError where size has not n numbers.
    """
    old = displacement.shape[2:]
    if len(size) != len(old) or displacement.shape[1] != len(old):
        raise ValueError(f"a displacement (B, n, *spatial) and a size of n numbers are needed, got "
                         f"{tuple(displacement.shape)} and {tuple(size)}")
    with without_autocast(displacement.device):
        displacement = single_precision(displacement)
        resized = F.interpolate(displacement, tuple(size), mode=_LINEAR[len(old)], align_corners=True)
        ratio = [max(new - 1, 1) / max(before - 1, 1) for new, before in zip(size, old, strict=True)]
        return resized * resized.new_tensor(ratio).view(-1, *[1] * len(old))


def compose(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The field that warps as ``first`` and then ``second`` do: second(x) + first(x + second(x)), (B, n, *spatial)."""
    return warp(first, second) + second


def jacobian_determinant(displacement: torch.Tensor) -> torch.Tensor:
    """Determinant of the derivative of x + displacement(x), (B, *(spatial - 1)): the local change of volume, 1 at rest.

    displacement: (B, n, *spatial) with n = 2 or 3, voxels; derivatives are forward differences. An axis of one voxel
    keeps it and has derivative 0. Raises ValueError for another number of axes.
    """
    sizes = displacement.shape[2:]
    if len(sizes) not in (2, 3) or displacement.shape[1] != len(sizes):
        raise ValueError(f"a displacement (B, n, *spatial) over 2 or 3 axes is needed, got {tuple(displacement.shape)}")
    displacement = single_precision(displacement)
    derivatives = []
    for axis, size in enumerate(sizes, 2):
        along = displacement.diff(dim=axis) if size > 1 else torch.zeros_like(displacement)
        for other, voxels in enumerate(sizes, 2):
            along = along.narrow(other, 0, max(voxels - 1, 1))
        derivatives.append(along)
    identity = torch.eye(len(sizes), dtype=displacement.dtype, device=displacement.device)
    jacobian = torch.stack(derivatives, 2)  # (B, component, axis, *cells)
    rows = (jacobian + identity.view(*identity.shape, *[1] * len(sizes))).unbind(1)
    if len(sizes) == 2:
        (a, b), (c, d) = (row.unbind(1) for row in rows)
        return a * d - b * c
    return (rows[0] * torch.linalg.cross(rows[1], rows[2], dim=1)).sum(1)


def folded_share(displacement: torch.Tensor) -> torch.Tensor:
    """Share of voxels (fraction, scalar) at which the field (B, n, *spatial) folds: its determinant is negative."""
    return (jacobian_determinant(displacement) < 0).float().mean()
