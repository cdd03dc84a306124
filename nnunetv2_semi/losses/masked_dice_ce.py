"""Dice and cross-entropy over some of the voxels of a patch.

Source: Bai et al., "Bidirectional copy-paste for semi-supervised medical image segmentation", CVPR 2023, and its
released code.
"""

from __future__ import annotations

import torch

from nnunetv2_semi.losses.hard_labels import voxel_cross_entropy
from nnunetv2_semi.losses.predictions import probabilities

_EPS = 1e-5


def masked_dice_ce(logits: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor, regions: bool) -> torch.Tensor:
    """(L_Dice + L_CE) / 2 over the voxels that count, a scalar; 0 where none counts.

    L_Dice: 1 - mean over patches and all K classes (background too) or regions of
    (2 sum py + eps) / (sum p + sum y + eps), eps = 1e-5. L_CE: mean over voxels, for regions over regions too.
    logits: (B, K, *spatial). labels: class numbers (B, 1, *spatial), for regions 0 or 1, (B, K, *spatial); what they
    are where ``counted``, (B, 1, *spatial) bool, is False does not matter.
    """
    labels = labels.masked_fill(~counted, 0)
    entropy = voxel_cross_entropy(logits, labels, regions)
    cross_entropy = (entropy * counted).sum() / (counted.sum() * entropy.shape[1]).clamp_min(1)
    if not regions:
        classes = torch.arange(logits.shape[1], device=labels.device)
        labels = labels == classes.view(1, -1, *[1] * (labels.ndim - 2))
    p = (probabilities(logits, regions) * counted).flatten(2)
    y = (labels.to(p.dtype) * counted).flatten(2)
    dice = (2 * (p * y).sum(2) + _EPS) / (p.sum(2) + y.sum(2) + _EPS)
    return (1 - dice.mean() + cross_entropy) / 2
