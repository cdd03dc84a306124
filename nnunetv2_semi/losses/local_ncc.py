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
    with torch.autocast(image.device.type, enabled=False):
        first, second = _Centred(single_precision(image)), _Centred(single_precision(reference))
        sizes = image.shape[2:]
        voxels = window ** len(sizes)
        outside = voxels - _voxels_inside(sizes, window).to(first.values)
        first_sum, second_sum = first.window_sum(window, outside), second.window_sum(window, outside)
        variance = [centred.window_sum_of_product(centred, window, outside) - total * total / voxels
                    for centred, total in ((first, first_sum), (second, second_sum))]
        covariance = first.window_sum_of_product(second, window, outside) - first_sum * second_sum / voxels
        # rounding can leave a variance just below 0
        return covariance.square() / (variance[0].clamp_min(0) * variance[1].clamp_min(0) + epsilon)


def local_ncc_loss(image: torch.Tensor, reference: torch.Tensor, window: int = 9) -> torch.Tensor:
    """1 - mean over voxels, channels and patches of NCC^2, a scalar from 0 (alike) to 1; see `local_ncc_map`."""
    return 1 - local_ncc_map(image, reference, window).mean()


class _Centred:
    """An image less the mean of each channel, the zeros around it less that mean too.

    A constant changes no variance; but the squares of intensities far from 0 would drown it in rounding.
    """

    def __init__(self, image: torch.Tensor) -> None:
        mean = image.detach().mean(tuple(range(2, image.ndim)), keepdim=True)
        self.values, self.around = image - mean, -mean

    def window_sum(self, window: int, outside: torch.Tensor) -> torch.Tensor:
        """outside: voxels of each window that lie outside the image."""
        return torch.addcmul(_WindowSum.apply(self.values, window), self.around, outside)

    def window_sum_of_product(self, other: _Centred, window: int, outside: torch.Tensor) -> torch.Tensor:
        within = _WindowSum.apply(self.values * other.values, window)
        return torch.addcmul(within, self.around * other.around, outside)


def _voxels_inside(sizes: torch.Size, window: int) -> torch.Tensor:
    """How many voxels of the window around each voxel lie in an image of these sizes, (*sizes) integer."""
    half = window // 2
    counts = torch.ones((), dtype=torch.long)
    for size in sizes:
        voxel = torch.arange(size)
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
