"""BCP: labelled and unlabelled patches are pasted into each other, both ways.

Source: Bai et al., "Bidirectional copy-paste for semi-supervised medical image segmentation", CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import nn

from nnunetv2_semi.data.boxes import Boxes
from nnunetv2_semi.losses.deep_supervision import summed_over_scales
from nnunetv2_semi.losses.hard_labels import hard_labels, known_labels, nearest
from nnunetv2_semi.losses.masked_dice_ce import masked_dice_ce
from nnunetv2_semi.losses.predictions import Logits, all_scales, probabilities
from nnunetv2_semi.methods.base import Method
from nnunetv2_semi.methods.contract import Batch, Context, Term
from nnunetv2_semi.methods.islands import Islands
from nnunetv2_semi.methods.mixing import paste, same_channels
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.methods.settings import setting
from nnunetv2_semi.methods.supervised import number_mixed, pasted_into_each_other
from nnunetv2_semi.teachers import EMATeacher


class BCPSettings(BaseSettings):
    """Settings of BCP."""

    pretrain_fraction: float = setting(
        0.12,
        "first share of training, on labelled patches alone (left atrium: 2000 of 17 000 steps; heart, 2D: "
        "0.25)",
        at_least=0, below=1,
    )
    plain_labelled: bool = setting(True, "nnU-Net's loss on plain labelled patches too, throughout", paper=False)
    pseudo_weight: float = setting(
        0.5,
        "alpha: of voxels with pseudo-labels, beside 1 of those with true ones",
        at_least=0,
    )
    seg_loss: Literal["nnunet", "paper"] = setting(
        "nnunet",
        "nnU-Net's Dice and cross-entropy, or the released code's: half as large, with a Dice of each patch "
        "that has background in it",
        paper="paper",
    )
    box: float = setting(0.667, "beta: sides of the box, as a share of the patch's", at_least=0, at_most=1)
    largest_component: bool | None = setting(
        None,
        "of each class in a pseudo-label only the largest component stays, and what the border of the patch cuts; "
        "`null`: of classes that are one component in every labelled training case",
        paper=True,
    )
    ema_decay: float | None = setting(None, "of the teacher, as in Mean Teacher", at_least=0, at_most=1, paper=0.99)
    deploy: Literal["teacher", "student"] = setting(
        "student",
        '`"teacher"` or `"student"`; in pretraining always the student',
    )

    @property
    def labelled_mixing_by(self) -> str | None:
        return "pretrain_fraction" if self.plain_labelled and self.pretrain_fraction > 0 else None


@dataclass(frozen=True)
class _Pasted:
    """Patches (B, C, *spatial) for the student, and the terms of its output."""

    image: torch.Tensor
    terms: Callable[[Logits], Iterator[Term]]


class BCP(Method):
    """L_seg(x_in) + L_seg(x_out), x_in = X_j^l M + X_p^u (1 - M), x_out = X_q^u M + X_i^l (1 - M), M 0 in a random box.

    L_seg: Dice and cross-entropy of the voxels with true labels + alpha times those of the voxels with the teacher's
    pseudo-labels, of all outputs of the network, weighted as nnU-Net weights them. Beside it nnU-Net's loss on X^l.
    """

    name: ClassVar[str] = "BCP"
    Settings: ClassVar[type[BaseSettings]] = BCPSettings
    settings: BCPSettings

    def __init__(self, student: nn.Module, settings: BCPSettings, context: Context) -> None:
        super().__init__(student, settings, context)
        self.teacher = EMATeacher(student, settings.teacher_decay(settings.ema_decay))
        self._islands = Islands(settings.largest_component, context)

    @classmethod
    def graphs(cls, settings: BaseSettings) -> int:
        assert isinstance(settings, BCPSettings)
        return 2 + settings.plain_labelled

    def notes(self) -> list[str]:
        return [*super().notes(), self._islands.note()]

    def loss(self, batch: Batch) -> Iterator[list[Term]]:
        if not self._pretraining() and self.teacher.updates == 0:
            self.teacher.reset()
        mixed = list(self._labelled_into_each_other(batch) if self._pretraining() else self._both_ways(batch))
        plain = [batch.labelled] if self.settings.plain_labelled else []
        passes = self.passes(self.student, *plain, *(pasted.image for pasted in mixed))
        if plain:
            yield [self.supervised(next(passes), batch.target)]
        for pasted in mixed:
            yield list(pasted.terms(next(passes)))

    def _pretraining(self) -> bool:
        return self.progress < self.settings.pretrain_fraction

    def _labelled_into_each_other(self, batch: Batch) -> Iterator[_Pasted]:
        self.metrics["unlabelled_voxels_used"] = batch.labelled.new_zeros(())
        image, target = pasted_into_each_other(batch, self.settings.box)
        patches = number_mixed(image) if self.settings.plain_labelled else len(image)
        yield _Pasted(image, lambda output: iter([
            self.supervised(output, target, "supervised_mixed", patches=patches)]))

    def _both_ways(self, batch: Batch) -> Iterator[_Pasted]:
        """Pair k: labelled patch k and unlabelled patch k for x_in, labelled patch k and unlabelled patch k + 1 for
        x_out, with one box: together they show all of labelled patch k. The smaller batch is gone through again."""
        pseudo_labels = self._pseudo_labels(batch.unlabelled)
        pairs = torch.arange(max(len(batch.labelled), len(batch.unlabelled)), device=batch.labelled.device)
        j, p, q = pairs % len(batch.labelled), pairs % len(batch.unlabelled), (pairs + 1) % len(batch.unlabelled)
        inside = Boxes.draw(len(pairs), batch.labelled.shape[2:], self.settings.box).inside(batch.labelled.device)
        labelled, unlabelled = batch.labelled[j], batch.unlabelled
        targets = [target[j] for target in all_scales(batch.target)]
        # A patch shows the channels of one case: of pairs that differ in them x_in is labelled, x_out unlabelled whole.
        for name, partner in (("in", p), ("out", q)):
            box = inside & same_channels(labelled, unlabelled[partner])
            true = ~box if name == "in" else box
            yield _Pasted(paste(true, labelled, unlabelled[partner]),
                          partial(self._terms, name, true, targets, pseudo_labels[partner]))

    def _terms(self, name: str, true: torch.Tensor, targets: list[torch.Tensor], pseudo_labels: torch.Tensor,
               output: Logits) -> Iterator[Term]:
        """Of patches whose labels are true where ``true`` (B, 1, *spatial), else the teacher's."""
        context, outputs = self.context, all_scales(output)
        known = [known_labels(target, context.regions, context.ignore_label) for target in targets]
        pseudo_weight = self.unlabelled_weight(self.settings.pseudo_weight)
        if self.settings.seg_loss == "nnunet":
            supervised = context.weighted_loss(output, known[0][0], true & known[0][1])
            pasted = context.weighted_loss(output, pseudo_labels, ~true)
        else:
            shapes = [single.shape[2:] for single in outputs]
            supervised = self._at_all_scales(outputs, [labels for labels, _ in known],
                                             [nearest(true, keep.shape[2:]) & keep for _, keep in known])
            pasted = self._at_all_scales(outputs, [nearest(pseudo_labels, shape) for shape in shapes],
                                         [nearest(~true, shape) for shape in shapes])
        yield Term(f"supervised_{name}", supervised, supervised=True)
        yield Term(f"copy_paste_{name}", pasted, pseudo_weight)

    def _pseudo_labels(self, image: torch.Tensor) -> torch.Tensor:
        labels, _ = hard_labels(probabilities(self.teacher(image), self.context.regions), self.context.regions)
        return self._islands.removed_from(labels)()

    def _at_all_scales(self, outputs: list[torch.Tensor], labels: list[torch.Tensor],
                       counted: list[torch.Tensor]) -> torch.Tensor:
        return summed_over_scales(self.context.scale_weights, partial(masked_dice_ce, regions=self.context.regions),
                                  outputs, labels, counted)

    def after_step(self) -> None:
        if not self._pretraining():
            self.teacher.update()

    def deployable(self) -> nn.Module:
        teaches = self.teacher.updates > 0  # in pretraining it knows nothing
        return self.teacher.network if self.settings.deploy == "teacher" and teaches else self.student
