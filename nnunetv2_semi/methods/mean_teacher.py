"""Mean Teacher: the student agrees with the average of its past on unlabelled patches.

Source: Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from nnunetv2_semi.data.mixing import CutMix
from nnunetv2_semi.data.views import with_noise
from nnunetv2_semi.losses.consistency import mean_squared_difference
from nnunetv2_semi.losses.predictions import probabilities
from nnunetv2_semi.methods.base import Batch, Context, Method, Term
from nnunetv2_semi.methods.perturbation import PerturbationSettings, perturbed
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.teachers import EMATeacher


@dataclass(frozen=True)
class MeanTeacherSettings(PerturbationSettings):
    """perturbation: of the student's patches, "strong" (CutMix and an intensity view, see `PerturbationSettings`; the
    teacher sees the patches as nnU-Net augmented them) or the literature's "noise" (on both networks' patches).
    consistency_weight: of the mean squared difference of probabilities. ramp_fraction: share of training over which it
    ramps up. ema_decay: of the teacher; None: follows the length of training. noise: its standard deviation (z-scored
    intensities). deploy: which network is validated and deployed. The literature's: "noise", weight 0.1, ramp 1.0."""

    perturbation: Literal["strong", "noise"] = "strong"
    consistency_weight: float = 10.0
    ramp_fraction: float = 0.2
    ema_decay: float | None = None
    noise: float = 0.1
    deploy: Literal["teacher", "student"] = "teacher"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "consistency_weight", "ramp_fraction", "noise")
        self.fractions("ema_decay")


class MeanTeacher(Method):
    """Supervised loss + w(t) mean (p - p')^2 to the EMA teacher, the student's patches perturbed."""

    name: ClassVar[str] = "MeanTeacher"
    Settings: ClassVar[type[BaseSettings]] = MeanTeacherSettings
    settings: MeanTeacherSettings

    def __init__(self, student: nn.Module, settings: MeanTeacherSettings, context: Context) -> None:
        super().__init__(student, settings, context)
        self.teacher = EMATeacher(student, settings.teacher_decay(settings.ema_decay))

    def loss(self, batch: Batch) -> Iterator[list[Term]]:
        regions, image = self.context.regions, batch.unlabelled
        students, mixing = self._students_patches(image)
        passes = self.passes(self.student, batch.labelled, students)
        yield [self.supervised(next(passes), batch.target)]
        teacher = mixing.of(probabilities(self.teacher(self.teachers_patches(image)), regions))
        counted = self.counted(image)
        student = probabilities(next(passes), regions)
        self.note_agreement(teacher, student)
        weight = self.unlabelled_weight(self.settings.consistency_weight, self.settings.ramp_fraction)
        yield [Term("consistency", mean_squared_difference(student, teacher, None if counted is None else
                                                           mixing.of(counted)), weight)]

    def _students_patches(self, image: torch.Tensor) -> tuple[torch.Tensor, CutMix]:
        if self.settings.perturbation == "strong":
            return perturbed(image, self.settings)
        return with_noise(image, self.settings.noise), CutMix.draw(image, 0.0)

    def teachers_patches(self, image: torch.Tensor) -> torch.Tensor:
        """What the teacher sees of unlabelled patches (B, C, *spatial)."""
        return image if self.settings.perturbation == "strong" else with_noise(image, self.settings.noise)

    def counted(self, image: torch.Tensor) -> torch.Tensor | None:
        """Voxels of unlabelled patches (B, C, *spatial) at which consistency counts, see `mean_squared_difference`."""
        return None

    def after_step(self) -> None:
        self.teacher.update()

    def deployable(self) -> nn.Module:
        return self.teacher.network if self.settings.deploy == "teacher" else self.student
