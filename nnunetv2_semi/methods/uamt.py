"""UAMT: Mean Teacher where the teacher is certain.

Source: Yu et al., "Uncertainty-aware self-ensembling model for semi-supervised 3D left atrium segmentation", MICCAI
2019.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch

from nnunetv2_semi.data.views import with_noise
from nnunetv2_semi.losses.consistency import predictive_entropy
from nnunetv2_semi.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.methods.settings import changed, setting
from nnunetv2_semi.networks.monte_carlo import summed_probabilities
from nnunetv2_semi.schedules import sigmoid_ramp_up


class UAMTSettings(MeanTeacherSettings):
    """Settings of UAMT."""

    deploy: Literal["teacher", "student"] = changed(MeanTeacherSettings, "deploy", "student")
    passes: int = setting(8, "noisy passes of the teacher whose mean probability has the entropy", at_least=1)
    threshold: float = setting(
        0.75,
        "entropy below which a voxel counts, in units of the largest one; ramps up to 1",
        at_least=0, at_most=1,
    )
    threshold_ramp: float = setting(1.0, "share of training over which the threshold ramps up", at_least=0)


class UAMT(MeanTeacher):
    """Supervised loss + w(t) mean (p - p')^2 over voxels at which the entropy of the teacher's mean probability over
    several passes, with noise on the input and dropout where the network has any, is below (0.75 + 0.25 ramp(t)) log K.
    """

    name: ClassVar[str] = "UAMT"
    Settings: ClassVar[type[BaseSettings]] = UAMTSettings
    settings: UAMTSettings

    def counted(self, image: torch.Tensor) -> torch.Tensor:
        """By the uncertainty over noisy passes, whatever the student's perturbation is."""
        settings, regions = self.settings, self.context.regions
        noisy = (with_noise(image, settings.noise) for _ in range(settings.passes))
        mean = summed_probabilities(self.teacher.network, noisy, regions) / settings.passes
        ramp = sigmoid_ramp_up(self.progress, settings.threshold_ramp)
        threshold = settings.threshold + (1 - settings.threshold) * ramp
        certain = predictive_entropy(mean, regions) < threshold * math.log(2 if regions else mean.shape[1])
        self.metrics["unlabelled_voxels_used"] = certain.float().mean()
        return certain
