"""Rectified pseudo supervision: a prediction teaches views of the same image, less where the views disagree with it.

Source: Zhao et al., "RCPS: rectified contrastive pseudo supervision for semi-supervised medical image segmentation",
IEEE JBHI 2023, arXiv 2301.05500.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nnunetv2_semi.losses.predictions import single_precision
from nnunetv2_semi.precision import without_autocast


def two_class_logits(logits: torch.Tensor) -> torch.Tensor:
    """Region (sigmoid) logits (B, R, *spatial) as softmax logits of two classes a region, (B R, 2, *spatial)."""
    regions = logits.flatten(0, 1)
    return torch.stack([regions, torch.zeros_like(regions)], 1)


@dataclass(frozen=True)
class PseudoTarget:
    """What supervises the views of an image: probabilities of its original version, without a graph.

    sharpened: softmax(t / T), probability: softmax(t), both (B, K, *spatial); negative_entropy: sum_k q log q of
    probability, (B, *spatial).
    """

    sharpened: torch.Tensor
    probability: torch.Tensor
    negative_entropy: torch.Tensor

    @classmethod
    @torch.no_grad()
    def from_logits(cls, logits: torch.Tensor, temperature: float = 0.5) -> PseudoTarget:
        """logits t (B, K, *spatial), softmax over K; temperature T > 0 (ValueError otherwise)."""
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        logits = single_precision(logits.detach())
        log_probability = logits.log_softmax(1)
        probability = log_probability.exp()
        return cls((logits / temperature).softmax(1), probability, (probability * log_probability).sum(1))


def rectified_pseudo_supervision(view: torch.Tensor, target: PseudoTarget, rectify: bool = True) -> torch.Tensor:
    """L_urp = mean( e^-D L_p ) + mean( D ), a scalar: L_p = CE(view, softmax(t/T)), D = KL(softmax t || softmax view).

    view: logits (B, K, *spatial) of an intensity view. rectify: False leaves mean(L_p), plain pseudo supervision.
    Half-precision input is computed in float32. Raises ValueError where view and target differ in shape.
    """
    if view.shape != target.probability.shape:
        raise ValueError(f"view and target must have the same shape, got {tuple(view.shape)} "
                         f"and {tuple(target.probability.shape)}")
    with without_autocast(view.device):
        view = single_precision(view)
        if not rectify:
            return -(target.sharpened * view.log_softmax(1)).sum(1).mean()
        return _Rectified.apply(view, target.sharpened, target.probability, target.negative_entropy)


@torch.no_grad()
def divergence(view: torch.Tensor, target: PseudoTarget) -> torch.Tensor:
    """D = KL(softmax(t) || softmax(view)) per voxel, (B, *spatial), nats; e^-D is the weight of a voxel."""
    return target.negative_entropy - (target.probability * single_precision(view).log_softmax(1)).sum(1)


def cosine_consistency(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """L_cr = mean over voxels of 1 - cos(first, second), the cosine over channels of two (B, K, *spatial); a scalar."""
    with without_autocast(first.device):
        return 1.0 - F.cosine_similarity(single_precision(first), single_precision(second), dim=1).mean()


class _Rectified(torch.autograd.Function):
    """The gradient in closed form: one map of view's shape is kept instead of every intermediate.

    With w = e^-D:  dL / d log p_k = -(w y_k + (1 - w L_p) q_k) / n =: -c_k / n, so dL / d logits = (p sum c - c) / n.
    """

    @staticmethod
    def forward(ctx: Any, view: torch.Tensor, sharpened: torch.Tensor, probability: torch.Tensor,
                negative_entropy: torch.Tensor) -> torch.Tensor:
        log_view = view.log_softmax(1)
        loss = -(sharpened * log_view).sum(1)
        kl = negative_entropy - (probability * log_view).sum(1)
        weight = torch.exp(-kl)
        weighted = weight * loss
        if ctx.needs_input_grad[0]:
            share = 1.0 - weighted
            pull = torch.addcmul(weight.unsqueeze(1) * sharpened, share.unsqueeze(1), probability)
            gradient = log_view.exp_().mul_((weight + share).unsqueeze(1)).sub_(pull).div_(kl.numel())
            ctx.save_for_backward(gradient)
        return weighted.mean() + kl.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None
