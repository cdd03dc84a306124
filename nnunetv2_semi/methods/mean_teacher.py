"""Mean Teacher: the student agrees with the average of its past on unlabelled patches.

Source: Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import nn

from nnunetv2_semi.data.views import with_noise
from nnunetv2_semi.losses.consistency import mean_squared_difference
from nnunetv2_semi.losses.predictions import probabilities
from nnunetv2_semi.methods.base import Method
from nnunetv2_semi.methods.contract import Batch, Context, Term
from nnunetv2_semi.methods.mixing import CutMix
from nnunetv2_semi.methods.perturbation import PerturbationSettings, perturbed
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.methods.settings import changed, setting
from nnunetv2_semi.teachers import EMATeacher


class MeanTeacherSettings(PerturbationSettings):
    """Settings of MeanTeacher."""

    cutmix: float = changed(PerturbationSettings, "cutmix", 0.5, paper=0.0)
    perturbation: Literal["strong", "noise"] = setting(
        "strong",
        "of the student's patches: `\"strong\"`, mixed and with other intensities; `\"noise\"`, on the patches of"
        " both networks",
        paper="noise",
    )
    consistency_weight: float = setting(
        10.0,
        "of the mean squared difference of probabilities",
        at_least=0, paper=0.1,
    )
    ramp_fraction: float = setting(0.2, "share of training over which it ramps up", at_least=0, paper=1.0)
    ema_decay: float | None = setting(
        None,
        "of the teacher, after a warm-up: min(1 - 1/(n + 1), this) at update n; `null`: 1 - 1/k for an "
        "average over k steps, a fiftieth of training, 10 to 1000 steps",
        at_least=0, at_most=1, paper=0.99,
    )
    noise: float = setting(
        0.1,
        'of `"noise"`: standard deviation, normalised intensities; clamped to twice this',
        at_least=0,
    )
    deploy: Literal["teacher", "student"] = setting("teacher", '`"teacher"` or `"student"`')

    @property
    def mixes_unlabelled(self) -> bool:
        return super().mixes_unlabelled and self.perturbation == "strong"


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
            return perturbed(image, self.settings, self.context.masked_channels)
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
