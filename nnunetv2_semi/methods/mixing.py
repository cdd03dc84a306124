"""Boxes of patches pasted into other patches: images, targets, labels and masks together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from nnunetv2_semi.data.boxes import Boxes
from nnunetv2_semi.losses.hard_labels import known_labels, nearest
from nnunetv2_semi.losses.predictions import Logits, all_scales
from nnunetv2_semi.methods.contract import Batch
from nnunetv2_semi.present_channels import present_channels

Patches = TypeVar("Patches", torch.Tensor, Logits, torch.Tensor | list[torch.Tensor])


def paste(inside: torch.Tensor, pasted: Patches, onto: Patches) -> Patches:
    """``onto`` outside of the boxes, ``pasted`` within.

    Args:
        inside: bool (B, 1, *spatial), True in the boxes.
        pasted: (B, C, *spatial), or a list of such tensors at a network's scales; boxes are resampled to each.
        onto: the same.
    """
    if isinstance(onto, torch.Tensor):
        assert isinstance(pasted, torch.Tensor)
        return torch.where(nearest(inside, onto.shape[2:]), pasted, onto)
    return [paste(inside, box, whole) for box, whole in zip(pasted, onto, strict=True)]


def boxes_to_paste(image: torch.Tensor, partner: torch.Tensor, share: float) -> torch.Tensor:
    """A random box in each patch of ``image`` (B, C, *spatial), ``share`` of its sides: bool (B, 1, *spatial).

    No box where the patch or its ``partner``, of the same shape, lacks a channel that the other has: a patch shows the
    channels of one case. Draws from torch's global random state of the CPU.
    """
    return Boxes.draw(len(image), image.shape[2:], share).inside(image.device) & same_channels(image, partner)


def same_channels(image: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    """Whether patches (B, C, *spatial) have the channels that their partners have: bool (B, 1, *1)."""
    same = (present_channels(image) == present_channels(partner)).all(1)
    return same.view(-1, *[1] * (image.ndim - 1))


def labelled_partners(batch: Batch, regions: bool, ignore_label: int | None) -> tuple[torch.Tensor, ...]:
    """For each unlabelled patch of ``batch`` a labelled one, in turn.

    Returns:
        Patches (B_u, C, *spatial), their labels in nnU-Net's layout, and where these are known, bool
        (B_u, 1, *spatial).
    """
    rows = torch.arange(len(batch.unlabelled), device=batch.labelled.device) % len(batch.labelled)
    truth, known = known_labels(all_scales(batch.target)[0], regions, ignore_label)
    return batch.labelled[rows], truth[rows], known[rows]


@dataclass(frozen=True)
class CutMix:
    """Which voxels of each patch of a batch come from the next patch of the batch, see `boxes_to_paste`.

    Source: Yun et al., "CutMix: regularization strategy to train strong classifiers with localizable features", ICCV
    2019; for segmentation French et al., "Semi-supervised semantic segmentation needs strong, varied perturbations",
    BMVC 2020.

    inside: bool (B, 1, *spatial).
    """

    inside: torch.Tensor

    @classmethod
    def draw(cls, image: torch.Tensor, share: float) -> CutMix:
        """A random box in each patch of ``image`` (B, C, *spatial), ``share`` of its sides; 0: nothing is mixed."""
        return cls(boxes_to_paste(image, image.roll(-1, 0), share))

    def of(self, patches: Patches) -> Patches:
        """``patches`` (B, C, *spatial), or a list of such tensors at a network's scales, mixed."""
        if isinstance(patches, torch.Tensor):
            return paste(self.inside, patches.roll(-1, 0), patches)
        return [self.of(scale) for scale in patches]
