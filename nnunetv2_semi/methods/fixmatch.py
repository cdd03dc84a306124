"""FixMatch: the network's confident decisions on a patch are the labels of a strongly changed version of it.

Source: Sohn et al., "FixMatch: simplifying semi-supervised learning with consistency and confidence", NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch

from nnunetv2_semi.data.boxes import Boxes
from nnunetv2_semi.losses.hard_labels import hard_labels
from nnunetv2_semi.losses.predictions import probabilities
from nnunetv2_semi.methods.base import Method
from nnunetv2_semi.methods.contract import Batch, Term
from nnunetv2_semi.methods.mixing import CutMix
from nnunetv2_semi.methods.perturbation import PerturbationSettings, perturbed
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.methods.settings import changed, setting


class FixMatchSettings(PerturbationSettings):
    """Settings of FixMatch."""

    cutmix: float = changed(PerturbationSettings, "cutmix", 0.5, paper=0.0)
    pseudo_weight: float = setting(1.0, "lambda_u", at_least=0)
    confidence: float = setting(
        0.8,
        "tau: lowest probability of a pseudo-label that counts",
        at_least=0, at_most=1, paper=0.95,
    )
    pseudo_loss: Literal["dice_ce", "ce"] = setting(
        "dice_ce",
        "nnU-Net's Dice and cross-entropy at all outputs, or cross-entropy of the full-resolution one, mean "
        "over all voxels",
        paper="ce",
    )
    ramp_fraction: float = setting(
        0.2,
        "share of training over which the weight ramps up; `0`: constant",
        at_least=0, paper=0,
    )
    view_gamma: float = changed(PerturbationSettings, "view_gamma", 2.0)
    view_scale: float = changed(PerturbationSettings, "view_scale", 0.7)
    view_shift: float = changed(PerturbationSettings, "view_shift", 0.7)
    view_noise: float = changed(PerturbationSettings, "view_noise", 0.3)
    view_noise_probability: float = changed(PerturbationSettings, "view_noise_probability", 0.8)
    cutout: float = setting(
        0.0,
        "sides of the box that is blanked, as a share of the patch's; `0`: none",
        at_least=0, at_most=1, paper=0.5,
    )


class FixMatch(Method):
    """Supervised loss + lambda_u L(strong, argmax p(weak)) over the voxels with max p(weak) >= tau.

    Weak is the patch as nnU-Net augmented it; strong is an intensity view of it with a box of another patch.
    """

    name: ClassVar[str] = "FixMatch"
    Settings: ClassVar[type[BaseSettings]] = FixMatchSettings
    settings: FixMatchSettings

    def loss(self, batch: Batch) -> Iterator[list[Term]]:
        settings, regions = self.settings, self.context.regions
        strong, mixing = self._strong(batch.unlabelled)
        passes = self.passes(self.student, batch.labelled, strong)
        yield [self.supervised(next(passes), batch.target)]
        with self.without_graph():
            weak = mixing.of(probabilities(self.student(batch.unlabelled), regions))
        labels, confidence = hard_labels(weak, regions)
        confident = confidence >= settings.confidence
        output = next(passes)
        self.metrics["unlabelled_voxels_used"] = confident.float().mean()
        self.note_agreement(weak, probabilities(output, regions))
        yield [Term("pseudo_label", self.pseudo_label_loss(output, labels, confident, settings.pseudo_loss),
                    self.unlabelled_weight(settings.pseudo_weight, settings.ramp_fraction))]

    def _strong(self, image: torch.Tensor) -> tuple[torch.Tensor, CutMix]:
        """The strong view of ``image`` (B, C, *spatial), and its mixing; voxels that are cut out have their channel's
        mean."""
        view, mixing = perturbed(image, self.settings, self.context.masked_channels)
        box = Boxes.draw(len(image), image.shape[2:], self.settings.cutout).inside(image.device)
        return torch.where(box, view.mean(tuple(range(2, view.ndim)), keepdim=True), view), mixing
