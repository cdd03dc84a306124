"""Mean Teacher: the student agrees with the average of its past on unlabelled patches.

Source: Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from nnunetv2_semi.data.views import with_noise
from nnunetv2_semi.losses.consistency import mean_squared_difference
from nnunetv2_semi.losses.predictions import probabilities
from nnunetv2_semi.methods.base import Batch, Context, Method, Term
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.teachers import EMATeacher


@dataclass(frozen=True)
class MeanTeacherSettings(BaseSettings):
    """consistency_weight: of the mean squared difference of probabilities. ramp_fraction: share of training over which
    it ramps up. ema_decay: of the teacher. noise: standard deviation of the noise on inputs (z-scored intensities).
    deploy: which network is validated and deployed."""

    consistency_weight: float = 0.1
    ramp_fraction: float = 1.0
    ema_decay: float = 0.99
    noise: float = 0.1
    deploy: Literal["teacher", "student"] = "teacher"


class MeanTeacher(Method):
    """Supervised loss + w(t) mean (p - p')^2 to the EMA teacher, noise on both inputs."""

    name: ClassVar[str] = "MeanTeacher"
    Settings: ClassVar[type[BaseSettings]] = MeanTeacherSettings
    settings: MeanTeacherSettings

    def __init__(self, student: nn.Module, settings: MeanTeacherSettings, context: Context) -> None:
        super().__init__(student, settings, context)
        self.teacher = EMATeacher(student, settings.ema_decay)

    def loss(self, batch: Batch) -> Iterator[list[Term]]:
        regions, noise = self.context.regions, self.settings.noise
        passes = self.passes(self.student, batch.labelled, with_noise(batch.unlabelled, noise))
        yield [self.supervised(next(passes), batch.target)]
        teacher = probabilities(self.teacher(with_noise(batch.unlabelled, noise)), regions)
        counted = self.counted(batch.unlabelled)
        student = probabilities(next(passes), regions)
        self.note_agreement(teacher, student)
        weight = self.unlabelled_weight(self.settings.consistency_weight, self.settings.ramp_fraction)
        yield [Term("consistency", mean_squared_difference(student, teacher, counted), weight)]

    def counted(self, image: torch.Tensor) -> torch.Tensor | None:
        """Voxels of unlabelled patches (B, C, *spatial) at which consistency counts, see `mean_squared_difference`."""
        return None

    def after_step(self) -> None:
        self.teacher.update()

    def deployable(self) -> nn.Module:
        return self.teacher.network if self.settings.deploy == "teacher" else self.student
