"""Distillation: a student's logits against a teacher's soft labels, both softened by a temperature.

Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531, 2015.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from nnunetv2_semi.losses.predictions import single_precision


def softened(logits: torch.Tensor, temperature: float, regions: bool) -> torch.Tensor:
    """Probabilities at a temperature: softmax, or of regions sigmoid, of z / T, (B, K, *spatial)."""
    tempered = single_precision(logits) / temperature
    return tempered.sigmoid() if regions else tempered.softmax(1)


def distillation_loss(logits: torch.Tensor, soft_label: torch.Tensor, temperature: float,
                      regions: bool) -> torch.Tensor:
    """T^2 KL(q || p_T), a scalar: mean over patches and voxels, and of regions, each a choice of two, over these.

    T^2 makes up for the gradient of a softened softmax, which shrinks with 1 / T^2.

    Args:
        logits: z of the student, (B, K, *spatial); p_T are its probabilities at the temperature.
        soft_label: q, the teacher's probabilities at the temperature, (B, K, *spatial).
        temperature: T > 0.
        regions: region-based labels.
    """
    tempered = single_precision(logits) / temperature
    if regions:
        negative_entropy = torch.xlogy(soft_label, soft_label) + torch.xlogy(1 - soft_label, 1 - soft_label)
        divergence = negative_entropy + F.binary_cross_entropy_with_logits(tempered, soft_label, reduction="none")
    else:
        divergence = F.kl_div(tempered.log_softmax(1), soft_label, reduction="none").sum(1)
    return temperature**2 * divergence.mean()


def at_grid(probability: torch.Tensor, spatial: Sequence[int]) -> torch.Tensor:
    """Soft labels (B, K, *spatial) of a coarser grid: the mean of ``probability`` over what each of its voxels covers.
    """
    if tuple(probability.shape[2:]) == tuple(spatial):
        return probability
    return F.interpolate(probability, size=tuple(spatial), mode="area")
