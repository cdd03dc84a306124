"""Consistency of two predictions, and where to ask for it: the teacher's uncertainty.

Source: Yu et al., "Uncertainty-aware self-ensembling model for semi-supervised 3D left atrium segmentation", MICCAI
2019.
"""

from __future__ import annotations

import torch


def mean_squared_difference(
    first: torch.Tensor, second: torch.Tensor, counted: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean of (p - q)^2 over patches, channels and the voxels that count, a scalar; 0 where none counts.

    first, second: probabilities (B, K, *spatial). counted: bool, (B, 1, *spatial) or (B, K, *spatial); None: all.
    """
    squares = (first - second) ** 2
    if counted is None:
        return squares.mean()
    return (squares * counted).sum() / counted.expand_as(squares).sum().clamp_min(1)


def predictive_entropy(probability: torch.Tensor, regions: bool) -> torch.Tensor:
    """-sum_k p_k log p_k per voxel (nats), (B, 1, *spatial), from 0 to log K; p: (B, K, *spatial).

    Regions: of each region against the rest, (B, K, *spatial), from 0 to log 2.
    """
    if regions:
        return -(torch.xlogy(probability, probability) + torch.xlogy(1 - probability, 1 - probability))
    return -torch.xlogy(probability, probability).sum(1, keepdim=True)
