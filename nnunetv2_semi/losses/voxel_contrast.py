"""Bidirectional voxel contrast with confident negatives of other classes.

Source: Zhao et al., "RCPS: rectified contrastive pseudo supervision for semi-supervised medical image segmentation",
IEEE JBHI 2023, arXiv 2301.05500.

    L_c(u, v) = -log( exp(u.v / tau) / ( exp(u.v / tau) + sum_n exp(u.u-_n / tau) ) )

The negatives u-_n of an anchor u are the N most confident voxels of another class. They depend on the class of the
anchor alone, so there is one set of N per class, and the similarities are one matrix product per class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nnunetv2_semi.losses.predictions import single_precision
from nnunetv2_semi.precision import without_autocast

_ANCHORS_AT_ONCE = 1024  # so that their similarities stay in the cache


@dataclass(frozen=True)
class Voxels:
    """Projected features of voxels, unit vectors (V, C); their classes (V,); how sure the network is of these (V,)."""

    features: torch.Tensor
    classes: torch.Tensor
    confidence: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor, classes: torch.Tensor, confidence: torch.Tensor) -> Voxels:
        """From a feature map (B, C, *spatial), classes (B, *spatial) integer, confidence (B, *spatial)."""
        return cls(unit_rows(features), classes.flatten(), confidence.flatten())

    @classmethod
    def joined(cls, parts: list[Voxels]) -> Voxels:
        """All voxels of ``parts``."""
        return cls(torch.cat([p.features for p in parts]), torch.cat([p.classes for p in parts]),
                   torch.cat([p.confidence for p in parts]))

    def chosen(self, index: torch.Tensor) -> Voxels:
        """The voxels with these numbers."""
        return Voxels(self.features[index], self.classes[index], self.confidence[index])

    def __len__(self) -> int:
        return len(self.classes)


def unit_rows(features: torch.Tensor) -> torch.Tensor:
    """Feature map (B, C, *spatial) -> float32 (or float64) unit vectors (B * voxels, C)."""
    return F.normalize(single_precision(features.movedim(1, -1).flatten(0, -2)), dim=1)


def voxel_contrast(view_1: torch.Tensor, view_2: torch.Tensor, classes: torch.Tensor, negatives: Voxels,
                   num_negatives: int = 400, temperature: float = 0.1, bidirectional: bool = True) -> torch.Tensor:
    """L_bc = L_c(view_1, view_2) + L_c(view_2, view_1), each the mean over anchors; a scalar.

    view_1, view_2: unit vectors (V, C) of the same voxels in two views. classes: (V,) integer, of these voxels.
    negatives: where negatives come from; gradients reach them too. bidirectional: False leaves L_c(view_1, view_2).
    Where fewer than ``num_negatives`` voxels of other classes exist, those there are are taken; an anchor without any
    has loss 0. Raises ValueError for differing shapes, a temperature <= 0 or num_negatives < 1.
    """
    if view_1.shape != view_2.shape or len(classes) != len(view_1):
        raise ValueError(f"views and classes must be of the same voxels, got {tuple(view_1.shape)}, "
                         f"{tuple(view_2.shape)} and {tuple(classes.shape)}")
    if temperature <= 0 or num_negatives < 1:
        raise ValueError(f"temperature must be positive and num_negatives at least 1, got {temperature} "
                         f"and {num_negatives}")
    order, present, counts = _grouped(classes)
    anchors, positives = view_1[order], view_2[order]
    chosen = [confident_of_other_classes(negatives, label, num_negatives) for label in present]
    sizes = [len(index) for index in chosen]
    every = negatives.features[torch.cat(chosen)] if chosen else negatives.features[:0]
    with without_autocast(view_1.device):
        total = _Contrast.apply(anchors, positives, every, counts, sizes, temperature)
        if bidirectional:
            total = total + _Contrast.apply(positives, anchors, every, counts, sizes, temperature)
    return total / max(len(classes), 1)


def confident_of_other_classes(voxels: Voxels, label: int, number: int) -> torch.Tensor:
    """Numbers of the ``number`` most confident voxels that are not of class ``label``; fewer if there are no more."""
    others = (voxels.classes != label).nonzero().squeeze(1)
    if len(others) <= number:
        return others
    return others[voxels.confidence[others].topk(number, sorted=False).indices]


def most_confident_per_class(voxels: Voxels, number: int) -> torch.Tensor:
    """Numbers of the ``number`` most confident voxels of each class: whatever `confident_of_other_classes` would choose
    is among them."""
    order, _, counts = _grouped(voxels.classes)
    kept = []
    for group in order.split(counts):
        best = voxels.confidence[group].topk(min(number, len(group)), sorted=False).indices
        kept.append(group[best])
    return torch.cat(kept) if kept else order


def _grouped(classes: torch.Tensor) -> tuple[torch.Tensor, list[int], list[int]]:
    """Voxel numbers sorted by class, the classes there are, and how many voxels each has."""
    ordered, order = classes.sort(stable=True)
    present, counts = torch.unique_consecutive(ordered, return_counts=True)
    return order, present.tolist(), counts.tolist()


class _Contrast(torch.autograd.Function):
    """Sum over anchors of L_c; the gradient is made in the forward pass, a block of anchors at a time.

    Similarities of a block are used while they are in the cache and never kept: memory does not grow with
    anchors x negatives. Softmax weights of a row are its gradient with respect to similarities.
    """

    @staticmethod
    def forward(ctx: Any, anchors: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor,
                counts: list[int], sizes: list[int], temperature: float) -> torch.Tensor:
        """anchors, positives: (V, C) grouped by class, counts[k] of each. negatives: sizes[k] rows for group k."""
        needed = any(ctx.needs_input_grad[:3])
        gradients = [torch.zeros_like(tensor) for tensor in (anchors, positives, negatives)]
        by_anchor = (anchors, positives, *gradients[:2])
        groups = zip(*(tensor.split(counts) for tensor in by_anchor), negatives.split(sizes),
                     gradients[2].split(sizes), strict=True)
        total = anchors.new_zeros(())
        for *of_anchors, candidates, to_candidates in groups:
            if len(candidates) == 0:
                continue
            for anchor, positive, to_anchor, to_positive in zip(
                    *(tensor.split(_ANCHORS_AT_ONCE) for tensor in of_anchors), strict=True):
                scaled = anchor / temperature
                similar = (scaled * positive).sum(1)
                others = scaled @ candidates.T
                largest = torch.maximum(similar, others.amax(1))
                weights = others.sub_(largest.unsqueeze(1)).exp_()
                of_others = weights.sum(1)
                of_all = of_others + torch.exp(similar - largest)
                total += (of_all.log() + largest - similar).sum()
                if not needed:
                    continue
                # The positive's softmax weight - 1 is minus the weight of all negatives.
                share = of_all.unsqueeze(1).reciprocal()
                pull = -of_others.unsqueeze(1) * share
                to_anchor.copy_((weights @ candidates).mul_(share).addcmul_(pull, positive).div_(temperature))
                to_positive.copy_(pull * scaled)
                to_candidates.addmm_(weights.T, scaled * share)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        anchors, positives, negatives = (g * upstream for g in ctx.saved_tensors)
        return anchors, positives, negatives, None, None, None
