"""FixMatch: the network's confident decisions on a patch are the labels of a strongly changed version of it.

Source: Sohn et al., "FixMatch: simplifying semi-supervised learning with consistency and confidence", NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from nnunetv2_semi.data.boxes import Boxes
from nnunetv2_semi.data.views import IntensityViews
from nnunetv2_semi.losses.hard_labels import hard_labels, voxel_cross_entropy
from nnunetv2_semi.losses.predictions import full_resolution, probabilities
from nnunetv2_semi.methods.base import Batch, Method, Term
from nnunetv2_semi.methods.settings import Settings as BaseSettings


@dataclass(frozen=True)
class FixMatchSettings(BaseSettings):
    """pseudo_weight: lambda_u. confidence: tau, lowest probability of a pseudo-label that counts. ramp_fraction: share
    of training over which the weight ramps up (0: constant).
    Strong view: view_gamma, view_scale, view_shift, view_noise, view_noise_probability (see `IntensityViews.draw`),
    cutout (sides of the box that is blanked, fraction of the patch's; 0: none).
    """

    pseudo_weight: float = 1.0
    confidence: float = 0.95
    ramp_fraction: float = 0.0
    view_gamma: float = 2.0
    view_scale: float = 0.7
    view_shift: float = 0.7
    view_noise: float = 0.3
    view_noise_probability: float = 0.8
    cutout: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fractions("confidence", "view_noise_probability", "cutout")
        self.at_least(0, "pseudo_weight", "ramp_fraction", "view_gamma", "view_scale", "view_shift", "view_noise")


class FixMatch(Method):
    """Supervised loss + lambda_u mean over all voxels of 1[max p(weak) >= tau] CE(strong, argmax p(weak)).

    Weak is the patch as nnU-Net augmented it; strong is an intensity view of it with a box cut out.
    """

    name: ClassVar[str] = "FixMatch"
    Settings: ClassVar[type[BaseSettings]] = FixMatchSettings
    settings: FixMatchSettings

    def loss(self, batch: Batch) -> Iterator[list[Term]]:
        settings, regions = self.settings, self.context.regions
        passes = self.passes(self.student, batch.labelled, self._strong(batch.unlabelled))
        yield [self.supervised(next(passes), batch.target)]
        with torch.no_grad():
            weak = probabilities(self.student(batch.unlabelled), regions)
        # Older versions of torch would use half-precision weights made without a graph for passes with one.
        torch.clear_autocast_cache()
        labels, confidence = hard_labels(weak, regions)
        confident = confidence >= settings.confidence
        logits = full_resolution(next(passes))
        self.metrics["unlabelled_voxels_used"] = confident.float().mean()
        self.note_agreement(weak, probabilities(logits, regions))
        yield [Term("pseudo_label", (voxel_cross_entropy(logits, labels, regions) * confident).mean(),
                    self.unlabelled_weight(settings.pseudo_weight, settings.ramp_fraction))]

    def _strong(self, image: torch.Tensor) -> torch.Tensor:
        """The strong view of ``image`` (B, C, *spatial); voxels that are cut out have their channel's mean."""
        settings = self.settings
        view = IntensityViews.draw(1, image, settings.view_scale, settings.view_shift, settings.view_noise,
                                   settings.view_noise_probability, settings.view_gamma).apply(image)[0]
        box = Boxes.draw(len(image), image.shape[2:], settings.cutout).inside(image.device)
        return torch.where(box, view.mean(tuple(range(2, view.ndim)), keepdim=True), view)
