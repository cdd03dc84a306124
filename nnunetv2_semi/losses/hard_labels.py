"""Hard labels, of a prediction or of nnU-Net, and the cross-entropy to them.

Labels are laid out as in nnU-Net's targets: class numbers (B, 1, *spatial), or for regions 0 or 1, (B, K, *spatial).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nnunetv2_semi.losses.predictions import single_precision


def hard_labels(probability: torch.Tensor, regions: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What probabilities (B, K, *spatial) decide, and how probable each decision is, both in the labels' layout."""
    if regions:
        return (probability > 0.5).long(), torch.maximum(probability, 1 - probability)
    confidence, classes = probability.max(1, keepdim=True)
    return classes, confidence


def known_labels(target: torch.Tensor, regions: bool, ignore_label: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The labels in nnU-Net's target, and where they are not the ignore label, (B, 1, *spatial) bool.

    For regions with an ignore label the target's last channel is that one.
    """
    if ignore_label is None:
        return target, torch.ones_like(target[:, :1], dtype=torch.bool)
    if regions:
        return target[:, :-1], target[:, -1:] == 0
    return target, target != ignore_label


def voxel_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, regions: bool) -> torch.Tensor:
    """Cross-entropy of logits (B, K, *spatial) to labels, in their layout; binary and per region for regions.

    Half-precision logits are computed in float32.
    """
    logits = single_precision(logits)
    if regions:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none")
    return F.cross_entropy(logits, labels[:, 0].long(), reduction="none").unsqueeze(1)


def nearest(labels: torch.Tensor, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
    """(B, C, *spatial) resampled to the spatial ``shape`` without interpolation, as nnU-Net resamples its targets."""
    for axis, (size, wanted) in enumerate(zip(labels.shape[2:], shape, strict=True), 2):
        if size != wanted:
            index = ((torch.arange(wanted, device=labels.device) + 0.5) * (size / wanted)).long()
            labels = labels.index_select(axis, index)
    return labels
