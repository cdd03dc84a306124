"""Correspondence of two images, coarse to fine, from cost volumes of their features.

Source: Chen et al., MASS, Medical Image Analysis 80, 2022, 102506: correlation over +-2 voxels at each scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from nnunetv2_semi.losses.predictions import single_precision
from nnunetv2_semi.networks.cost_volume import cost_volume
from nnunetv2_semi.networks.warp import resize_displacement, warp
from nnunetv2_semi.precision import without_autocast


class CorrespondenceHead(nn.Module):
    """Displacements from the features of a target and of a source.

    At each stage the source's features are warped by the displacement so far and correlated with the target's (cosine
    over channels). The shift that the correlations expect, sum over k of k softmax(correlation / temperature), is added
    (a registration before anything is learnt, and a gradient that reaches the features), and then what a small network
    makes of the correlations, the target's features and the displacement.

    widths: channels of the features of the stages that are used, coarsest first. dimensions: 2 or 3.
    radius: voxels of a stage over which is correlated. hidden: channels of the small networks.
    temperature: of the softmax over correlations.
    """

    shifts: torch.Tensor

    def __init__(self, widths: Sequence[int], dimensions: int, radius: int = 2, hidden: int = 32,
                 temperature: float = 0.2) -> None:
        super().__init__()
        self.radius, self.dimensions, self.temperature = radius, dimensions, temperature
        steps = torch.arange(-radius, radius + 1, dtype=torch.float32)
        self.register_buffer("shifts", torch.cartesian_prod(*[steps] * dimensions), persistent=False)
        convolution = nn.Conv3d if dimensions == 3 else nn.Conv2d
        shifts = (2 * radius + 1) ** dimensions

        def estimator(width: int) -> nn.Sequential:
            last = convolution(hidden, dimensions, 3, padding=1)
            nn.init.normal_(last.weight, std=1e-3)
            assert last.bias is not None
            nn.init.zeros_(last.bias)
            return nn.Sequential(convolution(shifts + width + dimensions, hidden, 3, padding=1), nn.LeakyReLU(),
                                 convolution(hidden, hidden, 3, padding=1), nn.LeakyReLU(), last)
        self.estimators = nn.ModuleList(estimator(width) for width in widths)

    def forward(self, target: Sequence[torch.Tensor], source: Sequence[torch.Tensor],
                size: Sequence[int]) -> torch.Tensor:
        """Displacement (B, axes, *size) in voxels of ``size``: the source at x + displacement(x) is the target at x.

        target, source: features (B, width, *spatial) of each stage, coarsest first.
        """
        first = target[0]
        displacement = torch.zeros(len(first), self.dimensions, *first.shape[2:], device=first.device)
        for estimator, fixed, moving in zip(self.estimators, target, source, strict=True):
            displacement = resize_displacement(displacement, fixed.shape[2:])
            fixed, moved = _directions(fixed), _directions(warp(moving, displacement))
            # a cosine: the volume holds means over channels
            costs = cost_volume(fixed, moved, self.radius) * fixed.shape[1]
            likely = (costs / self.temperature).softmax(1)
            with without_autocast(likely.device):
                displacement = displacement + torch.einsum("bk...,kn->bn...", likely, self.shifts)
            displacement = displacement + estimator(torch.cat([costs, fixed, displacement], 1)).float()
        return resize_displacement(displacement, size)


def _directions(features: torch.Tensor) -> torch.Tensor:
    """Unit vectors over channels, of features less their mean: what all voxels share tells none from another.

    Float32 (or float64): in half precision a vector of zeros would have no direction at all, nan.
    """
    features = single_precision(features)
    return F.normalize(features - features.mean(tuple(range(2, features.ndim)), keepdim=True), dim=1)
