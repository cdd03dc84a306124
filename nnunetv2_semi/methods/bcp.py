"""BCP: labelled and unlabelled patches are pasted into each other, both ways.

Source: Bai et al., "Bidirectional copy-paste for semi-supervised medical image segmentation", CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from nnunetv2_semi.data.boxes import Boxes
from nnunetv2_semi.data.largest_component import largest_components
from nnunetv2_semi.losses.hard_labels import hard_labels, known_labels, nearest
from nnunetv2_semi.losses.masked_dice_ce import masked_dice_ce
from nnunetv2_semi.losses.predictions import all_scales, probabilities
from nnunetv2_semi.methods.base import Batch, Context, Method, Target, Term
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.teachers import EMATeacher


@dataclass(frozen=True)
class BCPSettings(BaseSettings):
    """pretrain_fraction: first share of training, on labelled patches pasted into each other (the paper's 2000 of 17000
    steps). pseudo_weight: alpha, of pseudo-labelled voxels; true labels weigh 1. box: sides of the pasted box, fraction
    of the patch's (the paper's 2/3). largest_component: keep only this of each class of a pseudo-label. ema_decay: of
    the teacher. deploy: which network is validated and deployed."""

    pretrain_fraction: float = 0.12
    pseudo_weight: float = 0.5
    box: float = 0.667
    largest_component: bool = True
    ema_decay: float = 0.99
    deploy: Literal["teacher", "student"] = "student"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fractions("box", "ema_decay")
        self.require("pretrain_fraction", 0 <= self.pretrain_fraction < 1, "at least 0 and below 1")
        self.at_least(0, "pseudo_weight")


class BCP(Method):
    """L_seg(x_in) + L_seg(x_out), x_in = X_j^l M + X_p^u (1 - M), x_out = X_q^u M + X_i^l (1 - M), M 0 in a random box.

    L_seg: Dice and cross-entropy of the voxels with true labels + alpha times those of the voxels with the teacher's
    pseudo-labels, of all outputs of the network, weighted as nnU-Net weights them.
    """

    name: ClassVar[str] = "BCP"
    Settings: ClassVar[type[BaseSettings]] = BCPSettings
    settings: BCPSettings

    def __init__(self, student: nn.Module, settings: BCPSettings, context: Context) -> None:
        super().__init__(student, settings, context)
        self.teacher = EMATeacher(student, settings.ema_decay)

    def loss(self, batch: Batch) -> Iterator[list[Term]]:
        if self._pretraining():
            self.metrics["unlabelled_voxels_used"] = batch.labelled.new_zeros(())
            image, target = self._labelled_into_each_other(batch)
            yield [self.supervised(next(self.passes(self.student, image)), target)]
            return
        if self.teacher.updates == 0:
            self.teacher.reset()
        yield from self._both_ways(batch)

    def _pretraining(self) -> bool:
        return self.progress < self.settings.pretrain_fraction

    def _outside(self, number: int, image: torch.Tensor) -> torch.Tensor:
        """M, for ``number`` pairs of patches: (number, 1, *spatial) bool, False in the box."""
        return ~Boxes.draw(number, image.shape[2:], self.settings.box).inside(image.device)

    def _labelled_into_each_other(self, batch: Batch) -> tuple[torch.Tensor, Target]:
        """Labelled patches, in the box of each the next one, and their targets."""
        outside = self._outside(len(batch.labelled), batch.labelled)

        def pasted(patches: torch.Tensor) -> torch.Tensor:
            return torch.where(nearest(outside, patches.shape[2:]), patches, patches.roll(-1, 0))
        target = batch.target
        return pasted(batch.labelled), pasted(target) if isinstance(target, torch.Tensor) else [*map(pasted, target)]

    def _both_ways(self, batch: Batch) -> Iterator[list[Term]]:
        """Pair k: labelled patch k and unlabelled patch k for x_in, labelled patch k and unlabelled patch k + 1 for
        x_out, with one box: together they show all of labelled patch k. The smaller batch is gone through again."""
        pseudo_labels = self._pseudo_labels(batch.unlabelled)
        pairs = torch.arange(max(len(batch.labelled), len(batch.unlabelled)), device=batch.labelled.device)
        j, p, q = pairs % len(batch.labelled), pairs % len(batch.unlabelled), (pairs + 1) % len(batch.unlabelled)
        outside = self._outside(len(pairs), batch.labelled)
        labelled, unlabelled = batch.labelled[j], batch.unlabelled
        targets = [target[j] for target in all_scales(batch.target)]
        passes = self.passes(self.student, torch.where(outside, labelled, unlabelled[p]),
                             torch.where(outside, unlabelled[q], labelled))
        weight = self.unlabelled_weight(self.settings.pseudo_weight)
        for name, true, partner in (("in", outside, p), ("out", ~outside, q)):
            outputs, pseudo = all_scales(next(passes)), pseudo_labels[partner]
            yield [Term(f"supervised_{name}", self._true_loss(outputs, targets, true), supervised=True),
                   Term(f"copy_paste_{name}", self._pseudo_loss(outputs, pseudo, ~true), weight)]

    def _pseudo_labels(self, image: torch.Tensor) -> torch.Tensor:
        labels, _ = hard_labels(probabilities(self.teacher(image), self.context.regions), self.context.regions)
        return largest_components(labels) if self.settings.largest_component else labels

    def _true_loss(self, outputs: list[torch.Tensor], targets: list[torch.Tensor], true: torch.Tensor) -> torch.Tensor:
        """Of the voxels ``true`` (B, 1, *spatial) whose label is known."""
        context = self.context
        known = [known_labels(target, context.regions, context.ignore_label) for target in targets]
        return self._overall_scales(outputs, [labels for labels, _ in known],
                                 [nearest(true, keep.shape[2:]) & keep for _, keep in known])

    def _pseudo_loss(self, outputs: list[torch.Tensor], labels: torch.Tensor, pseudo: torch.Tensor) -> torch.Tensor:
        shapes = [output.shape[2:] for output in outputs]
        return self._overall_scales(outputs, [nearest(labels, shape) for shape in shapes],
                                 [nearest(pseudo, shape) for shape in shapes])

    def _overall_scales(self, outputs: list[torch.Tensor], labels: list[torch.Tensor],
                     counted: list[torch.Tensor]) -> torch.Tensor:
        losses = [weight * masked_dice_ce(output, label, mask, self.context.regions) for weight, output, label, mask
                  in zip(self.context.scale_weights, outputs, labels, counted, strict=True) if weight != 0]
        return torch.stack(losses).sum()

    def after_step(self) -> None:
        if not self._pretraining():
            self.teacher.update()

    def deployable(self) -> nn.Module:
        teaches = self.teacher.updates > 0  # in pretraining it knows nothing
        return self.teacher.network if self.settings.deploy == "teacher" and teaches else self.student
