"""Cross-entropy and Dice against soft labels: a teacher's probabilities, not its hard decisions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nnunetv2_semi.losses.predictions import foreground, single_precision

_EPS = 1e-5


def soft_cross_entropy(logits: torch.Tensor, soft_label: torch.Tensor, regions: bool) -> torch.Tensor:
    """Mean over voxels of -sum_k q_k log p_k; for regions the mean binary cross-entropy over regions and voxels.

    logits, soft_label: (B, K, *spatial), soft_label in [0, 1] (summing to 1 over K unless ``regions``).
    """
    return _voxel_cross_entropy(logits, soft_label, regions).mean()


def weighted_soft_cross_entropy(logits: torch.Tensor, soft_label: torch.Tensor, weight: torch.Tensor,
                                regions: bool) -> torch.Tensor:
    """`soft_cross_entropy` as a weighted mean over voxels, weight (B, 1, *spatial) >= 0; 0 where all weights are 0."""
    voxels = _voxel_cross_entropy(logits, soft_label, regions)
    return (weight * voxels).sum() / weight.sum().clamp_min(_EPS)


def _voxel_cross_entropy(logits: torch.Tensor, soft_label: torch.Tensor, regions: bool) -> torch.Tensor:
    """(B, 1, *spatial)"""
    logits = single_precision(logits)
    if regions:
        return F.binary_cross_entropy_with_logits(logits, soft_label, reduction="none").mean(1, keepdim=True)
    return -(soft_label * logits.log_softmax(1)).sum(1, keepdim=True)


def soft_dice_loss(probability: torch.Tensor, soft_label: torch.Tensor, regions: bool) -> torch.Tensor:
    """1 - mean over patches and foreground classes of (2 sum pq + eps) / (sum p^2 + sum q^2 + eps).

    The squared denominator has its minimum at p = q; the linear one would push a soft label to a hard one.
    probability, soft_label: (B, K, *spatial).
    """
    p, q = foreground(probability, regions).flatten(2), foreground(soft_label, regions).flatten(2)
    overlap = (2 * (p * q).sum(-1) + _EPS) / (p.square().sum(-1) + q.square().sum(-1) + _EPS)
    return 1 - overlap.mean()
