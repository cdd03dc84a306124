"""Consensus-divergence consistency regularisation (CDCR) of two networks' predictions of the same patches.

Source: Ma et al., "Steady progress beats stagnation: mutual aid of foundation and conventional models in mixed domain
semi-supervised medical image segmentation", CVPR 2025.
"""

from __future__ import annotations

import torch

from nnunetv2_semi.losses.predictions import hard_foreground


def consensus_loss(first: torch.Tensor, second: torch.Tensor, regions: bool) -> torch.Tensor:
    """-1/2 mean(p log p · M) - 1/2 mean(q log q · M): where the two agree, both become surer.

    Args:
        first, second: probabilities p and q (B, K, *spatial).
        regions: region-based labels; each region is then a decision of its own, between two classes.

    Returns:
        A scalar. M is 1 at voxels with the same decision, the mean is over voxels and classes.
    """
    agree = same_decision(first, second, regions)
    return sum((_entropy(p, regions) * agree).mean() for p in (first, second)) / 2  # type: ignore[return-value]


def divergence_loss(first: torch.Tensor, second: torch.Tensor, regions: bool) -> torch.Tensor:
    """mean((p - q)² · (1 - M)): where the two disagree, they come closer. Arguments as of `consensus_loss`."""
    return ((first - second) ** 2 * ~same_decision(first, second, regions)).mean()


def same_decision(first: torch.Tensor, second: torch.Tensor, regions: bool) -> torch.Tensor:
    """Where probabilities (B, K, *spatial) decide the same: bool, (B, 1, *spatial), of regions (B, K, *spatial)."""
    if regions:
        return hard_foreground(first, regions) == hard_foreground(second, regions)
    return first.argmax(1, keepdim=True) == second.argmax(1, keepdim=True)


def _entropy(probability: torch.Tensor, regions: bool) -> torch.Tensor:
    """-p log p; of regions the mean of both classes', as of a softmax of two."""
    if regions:
        return (_minus_p_log_p(probability) + _minus_p_log_p(1 - probability)) / 2
    return _minus_p_log_p(probability)


def _minus_p_log_p(probability: torch.Tensor) -> torch.Tensor:
    # A softmax in single precision can give exactly 0, whose logarithm has no gradient.
    return -probability * probability.clamp_min(torch.finfo(probability.dtype).tiny).log()
