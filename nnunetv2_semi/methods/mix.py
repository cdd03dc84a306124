"""Mix, the recommended trainer: an averaged teacher labels unlabelled patches, the student learns from mixed ones.

Nothing in it is new by itself. An EMA teacher (Tarvainen and Valpola, NeurIPS 2017) labels the patch as nnU-Net
augmented it; the student sees it with a box of another patch (CutMix; French et al., BMVC 2020) and with other
intensities (FixMatch; Sohn et al., NeurIPS 2020); labelled patches are pasted into each other too (BCP; Bai et al.,
CVPR 2023); and all labels, true or not, go through nnU-Net's own Dice and cross-entropy at all scales, as in
nnFilterMatch (arXiv 2509.19746).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import nn

from nnunetv2_semi.data.affine_views import AffineViews
from nnunetv2_semi.data.flips import Flips
from nnunetv2_semi.losses.hard_labels import hard_labels
from nnunetv2_semi.losses.predictions import probabilities
from nnunetv2_semi.methods.arrangement import Images
from nnunetv2_semi.methods.base import Method
from nnunetv2_semi.methods.contract import Batch, Context, Term
from nnunetv2_semi.methods.islands import Islands
from nnunetv2_semi.methods.mixing import boxes_to_paste, labelled_partners, paste
from nnunetv2_semi.methods.perturbation import PerturbationSettings, intensity_view
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.methods.settings import changed, setting
from nnunetv2_semi.methods.supervised import SupervisedSettings, number_mixed, pasted_into_each_other
from nnunetv2_semi.teachers import EMATeacher

Patches = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # images, their labels, the weight of each voxel's label
SIZES = (0.7, 1.4)  # of the view of "spatial_view": "affine", as in nnU-Net's augmentation


class MixSettings(PerturbationSettings, SupervisedSettings):
    """Settings of Mix."""

    labelled_mixing: float = changed(SupervisedSettings, "labelled_mixing", 1.0)
    pseudo_weight: float = setting(1.0, "of nnU-Net's loss on pseudo-labels", at_least=0)
    pseudo_loss: Literal["dice_ce", "ce"] = setting(
        "dice_ce",
        "nnU-Net's Dice and cross-entropy at all outputs over the voxels that count, or cross-entropy of the "
        "full-resolution output, mean over all voxels",
    )
    start: float = setting(0.05, "share of training on labels alone", at_least=0, at_most=1)
    ramp_fraction: float = setting(0.2, "share of training at which that weight is full", at_least=0)
    voxels: Literal["confident", "class", "weighted", "all"] = setting(
        "confident",
        'which pseudo-labels count: `"confident"`, at least `confidence`; `"class"`, a threshold for each '
        'class; `"weighted"`, each by its confidence; `"all"`',
    )
    confidence: float = setting(
        0.8,
        'lowest probability of a pseudo-label that counts; of `"class"` the highest threshold',
        at_least=0, at_most=1,
    )
    partner: Literal["unlabelled", "labelled", "both"] = setting(
        "unlabelled",
        "whose box that is: another `\"unlabelled\"` patch's, a `\"labelled\"` one's with its true labels, or "
        '`"both"`, for half of the patches each',
    )
    spatial_view: Literal["none", "flips", "affine"] = setting(
        "none",
        "`\"flips\"`: mirror the student's patch and its labels anew, along the axes that `mirroring` allows; "
        "`\"affine\"`: turn and scale them too, by nnU-Net's angles and 0.7 to 1.4",
    )
    largest_component: bool | None = setting(
        None,
        "of each class in a pseudo-label only the largest component stays, and what the border of the patch cuts; "
        "`null`: of classes that are one component in every labelled training case",
    )
    ema_decay: float | None = setting(
        None,
        "of the teacher, after a warm-up: min(1 - 1/(n + 1), this) at update n; `null`: 1 - 1/k for an "
        "average over k steps, a fiftieth of training, 10 to 1000 steps",
        at_least=0, at_most=1,
    )
    deploy: Literal["teacher", "student"] = setting("teacher", '`"teacher"` or `"student"`')

    @property
    def mixes_unlabelled(self) -> bool:
        return super().mixes_unlabelled and self.partner != "labelled"


class Mix(Method):
    """L(x, y) + w_l L(mixed x, mixed y) + w(t) L_w(view of mixed u, mixed labels of the teacher); L: nnU-Net's loss.

    x: labelled patches. u: unlabelled ones. L_w: over voxels whose label counts. A step costs three passes with a
    gradient and one without.
    """

    name: ClassVar[str] = "Mix"
    Settings: ClassVar[type[BaseSettings]] = MixSettings
    settings: MixSettings

    def __init__(self, student: nn.Module, settings: MixSettings, context: Context) -> None:
        super().__init__(student, settings, context)
        self.teacher = EMATeacher(student, settings.teacher_decay(settings.ema_decay))
        self._islands = Islands(settings.largest_component, context)

    @classmethod
    def graphs(cls, settings: BaseSettings) -> int:
        assert isinstance(settings, MixSettings)
        return 2 + (settings.labelled_mixing > 0)

    def notes(self) -> list[str]:
        return [*super().notes(), self._islands.note()]

    def loss(self, batch: Batch) -> Iterator[list[Term]]:
        settings = self.settings
        images: list[Images] = [batch.labelled]
        targets = [batch.target]
        if settings.labelled_mixing > 0:
            image, target = pasted_into_each_other(batch, settings.labelled_box)
            images, targets = [*images, image], [*targets, target]
        weight = self._weight()
        self.metrics["unlabelled_voxels_used"] = batch.labelled.new_zeros(())
        if weight > 0:
            pseudo_labelled = cache(self._pseudo_labelled(batch))
            images = [*images, lambda: pseudo_labelled()[0]]
        passes = self.passes(self.student, *images)
        yield [self.supervised(next(passes), targets[0])]
        if len(targets) == 2:
            yield [self.supervised(next(passes), targets[1], "labelled_mixing", settings.labelled_mixing,
                                   patches=number_mixed(batch.labelled))]
        if weight > 0:
            output = next(passes)
            value = self.pseudo_label_loss(output, *pseudo_labelled()[1:], self.settings.pseudo_loss)
            yield [Term("pseudo_label", value, weight)]

    def _weight(self) -> float:
        settings = self.settings
        if self.progress < settings.start:
            return 0.0
        return self.unlabelled_weight(settings.pseudo_weight, settings.ramp_fraction)

    def _pseudo_labelled(self, batch: Batch) -> Callable[[], Patches]:
        """What gives the student's patches; the teacher's pass is done when this returns."""
        regions = self.context.regions
        teacher = probabilities(self.teacher(batch.unlabelled), regions)
        labels, confidence = hard_labels(teacher, regions)
        counted = self._counted(labels, confidence)
        self.metrics["unlabelled_voxels_used"] = counted.float().mean()
        self.metrics["confident_foreground"] = _share_of_foreground(labels, counted)
        without_islands = self._islands.removed_from(labels)
        return lambda: self._view(batch, without_islands(), counted)

    def _view(self, batch: Batch, labels: torch.Tensor, counted: torch.Tensor) -> Patches:
        """What the student sees of unlabelled patches."""
        settings = self.settings
        image, labels, counted = self._mixed(batch, batch.unlabelled, labels, counted)
        image = intensity_view(image, settings, self.context.masked_channels)
        if settings.spatial_view != "none":
            flips = Flips.draw(len(image), self.context.mirror_axes)
            image, labels, counted = flips.of(image), flips.of(labels), flips.of(counted)
        if settings.spatial_view == "affine":
            views = AffineViews.draw(image, self.context.spacing, self.context.rotation,
                                     self.context.turned_in_plane, SIZES)
            image, labels = views.of(image), views.of(labels, "nearest")
            counted = views.of(counted, "nearest") * views.inside()
        return image, labels, counted

    def _counted(self, labels: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
        """Weight of each pseudo-label, in the layout of ``labels``."""
        voxels, threshold = self.settings.voxels, self.settings.confidence
        if voxels == "all":
            return torch.ones_like(confidence, dtype=torch.bool)
        if voxels == "weighted":
            return confidence
        if voxels == "confident":
            return confidence >= threshold
        counted = torch.zeros_like(confidence, dtype=torch.bool)
        for channel in range(confidence.shape[1]):  # one, or each region: inside and outside of it
            own_labels, own_confidence = labels[:, channel], confidence[:, channel]
            for label in range(2 if self.context.regions else self.context.num_heads):
                own = own_labels == label
                mean = (own_confidence * own).sum() / own.sum().clamp_min(1)
                counted[:, channel] |= own & (own_confidence >= mean.clamp(max=threshold))
        return counted

    def _mixed(self, batch: Batch, *own: torch.Tensor) -> Patches:
        """Unlabelled patches, their labels and weights (``own``) with the boxes of their partners pasted in."""
        partners = self._partners(batch, own)
        inside = boxes_to_paste(own[0], partners[0], self.settings.cutmix)
        image, labels, counted = (paste(inside, partner, mine) for partner, mine in zip(partners, own, strict=True))
        return image, labels, counted

    def _partners(self, batch: Batch, own: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Patch, labels and weights to paste into each unlabelled patch: the next one's, or a labelled patch's."""
        following, partner = [mine.roll(-1, 0) for mine in own], self.settings.partner
        if partner == "unlabelled":
            return following
        labelled = [theirs.to(mine.dtype).expand_as(mine) for theirs, mine in zip(
            labelled_partners(batch, self.context.regions, self.context.ignore_label), own, strict=True)]
        half = (len(own[0]) + 1) // 2 if partner == "both" else 0
        return [torch.cat([a[:half], b[half:]]) for a, b in zip(following, labelled, strict=True)]

    def after_step(self) -> None:
        self.teacher.update()

    def deployable(self) -> nn.Module:
        return self.teacher.network if self.settings.deploy == "teacher" else self.student


def _share_of_foreground(labels: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Share of the voxels with a foreground pseudo-label that count, a scalar."""
    foreground = labels > 0
    return (counted * foreground).sum() / foreground.sum().clamp_min(1)
