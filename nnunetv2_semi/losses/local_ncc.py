"""Squared local normalised cross-correlation: how well two images agree around every voxel, whatever their intensities.

Source: Chen et al., "MASS: modality-collaborative semi-supervised segmentation by exploiting cross-modal consistency
from unpaired CT and MRI images", Medical Image Analysis 80, 2022, 102506.

    NCC^2(x) = ( sum (I - mean I)(J - mean J) )^2 / ( sum (I - mean I)^2  sum (J - mean J)^2 + epsilon )

Sums and means are over a window around x. Outside the image both are 0, and such voxels count, as in the authors' code.
"""

from __future__ import annotations

from typing import Any

import torch

from nnunetv2_semi.losses.predictions import single_precision
from nnunetv2_semi.precision import without_autocast

_ROUNDING = 100  # units in the last place of a sum over a window


def local_ncc_map(image: torch.Tensor, reference: torch.Tensor, window: int = 9, epsilon: float = 1e-5) -> torch.Tensor:
    """NCC^2 around every voxel, (B, C, *spatial), from 0 to 1; float32 (or float64).

    image, reference: (B, C, *spatial), each channel compared with the same one of the other. window: voxels per axis,
    odd. Half-precision input is computed in float32. Raises ValueError for differing shapes or an even window.
    """
    if image.shape != reference.shape:
        raise ValueError(f"image and reference must have the same shape, got {tuple(image.shape)} "
                         f"and {tuple(reference.shape)}")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd and positive, got {window}")
    with without_autocast(image.device):
        # Squares of intensities far from 0 would drown the variances in rounding. So the mean of a channel is taken off
        # everywhere, from the zeros around the image too.
        (first, around_first), (second, around_second) = _centred(image), _centred(reference)
        voxels = window ** (image.ndim - 2)
        outside = voxels - _voxels_inside(first, window)

        def summed(values: torch.Tensor, around: torch.Tensor) -> torch.Tensor:
            return torch.addcmul(_WindowSum.apply(values, window), around, outside)
        def variance(values: torch.Tensor, around: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
            squares = summed(values.square(), around.square())
            spread = squares - total.square() / voxels
            # Of a window that is constant, far from the mean, rounding alone is left: nothing to correlate.
            return torch.where(spread > _ROUNDING * torch.finfo(spread.dtype).eps * squares, spread, 0.0)
        of_first, of_second = summed(first, around_first), summed(second, around_second)
        covariance = summed(first * second, around_first * around_second) - of_first * of_second / voxels
        of_both = variance(first, around_first, of_first) * variance(second, around_second, of_second)
        return torch.where(of_both > 0, covariance.square() / (of_both + epsilon), 0.0)


def local_ncc_loss(image: torch.Tensor, reference: torch.Tensor, window: int = 9) -> torch.Tensor:
    """1 - mean over voxels, channels and patches of NCC^2, a scalar from 0 (alike) to 1; see `local_ncc_map`."""
    return 1 - local_ncc_map(image, reference, window).mean()


def _centred(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The image less the mean of each channel, and what the zeros around it are then, (B, C, 1, ...)."""
    image = single_precision(image)
    mean = image.detach().mean(tuple(range(2, image.ndim)), keepdim=True)
    return image - mean, -mean


def _voxels_inside(image: torch.Tensor, window: int) -> torch.Tensor:
    """How many voxels of the window around each voxel of ``image`` (B, C, *spatial) lie in it, (*spatial)."""
    half = window // 2
    counts = image.new_ones(())
    for size in image.shape[2:]:
        voxel = torch.arange(size, dtype=image.dtype, device=image.device)
        counts = counts.unsqueeze(-1) * ((voxel + half).clamp_max(size - 1) - (voxel - half).clamp_min(0) + 1)
    return counts


class _WindowSum(torch.autograd.Function):
    """Sum over a window around every voxel of (B, C, *spatial), zero outside; its own adjoint, so nothing is kept."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, window: int) -> torch.Tensor:
        ctx.window = window
        for axis in range(2, values.ndim):
            values = _sum_along(values, axis, window)
        return values

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _WindowSum.apply(upstream, ctx.window), None


def _sum_along(values: torch.Tensor, axis: int, window: int) -> torch.Tensor:
    """Sums of ``window`` neighbours along one axis, zero outside.

    Sums of 1, 2, 4, 8, ... neighbours come from one another; those of the binary digits of ``window`` make it up.
    Against a running sum, rounding does not grow with the image.
    """
    size, half = values.shape[axis], window // 2
    shape = list(values.shape)
    shape[axis] = size + window - 1
    sums = values.new_zeros(shape)
    sums.narrow(axis, half, size).copy_(values)
    total, covered, neighbours = None, 0, 1
    while True:
        if window & neighbours:
            part = sums.narrow(axis, covered, size)
            total = part if total is None else total + part
            covered += neighbours
        if 2 * neighbours > window:
            assert total is not None
            return total
        left = sums.shape[axis] - neighbours
        sums = sums.narrow(axis, 0, left) + sums.narrow(axis, neighbours, left)
        neighbours *= 2
