"""Semi-CML: one network per modality; they contrast areas of each other, then the better one teaches with soft labels.

Source: Zhang et al., "Multi-modal contrastive mutual learning and pseudo-label re-learning for semi-supervised medical
image segmentation", Medical Image Analysis 83, 2023, 102656.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.losses.area_contrast import AreaContrast
from nnunetv2_semi.methods.base import Method, require_modalities
from nnunetv2_semi.methods.contract import Batch, Context, Term
from nnunetv2_semi.methods.modality_scores import ModalityScores
from nnunetv2_semi.methods.rows import Rows
from nnunetv2_semi.methods.semi_cml_mutual_learning import MutualLearning
from nnunetv2_semi.methods.semi_cml_relearning import Relearning
from nnunetv2_semi.methods.semi_cml_settings import SemiCMLSettings
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.networks.modality_branches import ModalityBranches
from nnunetv2_semi.teachers import BestModelAverage, EMATeacher, Teacher


class SemiCML(Method):
    """Contrastive mutual learning of paired modalities, then pseudo-label re-learning."""

    name: ClassVar[str] = "SemiCML"
    Settings: ClassVar[type[BaseSettings]] = SemiCMLSettings
    settings: SemiCMLSettings
    student: ModalityBranches

    def __init__(self, student: ModalityBranches, settings: SemiCMLSettings, context: Context) -> None:
        super().__init__(student, settings, context)
        self.names = student.names
        self._teachers = nn.ModuleList(
            EMATeacher(branch, settings.teacher_decay(settings.ema_decay)) if settings.teacher == "ema"
            else BestModelAverage(branch) for branch in student.branches)
        self.scores = ModalityScores(self.names, context.regions, context.ignore_label)
        coarsest = context.spacing.index(max(context.spacing))
        self.contrast = AreaContrast(context.regions, coarsest if settings.areas == "slice" else None,
                                     settings.max_slices, settings.temperature, settings.empty_areas) \
            if settings.asc else None

    # networks

    @property
    def teachers(self) -> list[Teacher]:
        """One teacher per modality, in the order of ``names``."""
        return [teacher for teacher in self._teachers if isinstance(teacher, Teacher)]

    @classmethod
    def build_student(cls, plans_manager: PlansManager, configuration_manager: ConfigurationManager,
                      num_input_channels: int, num_output_channels: int, deep_supervision: bool) -> ModalityBranches:
        semi = configuration_manager.configuration["semi"]
        branches = cls.build_for_each_modality(plans_manager, configuration_manager, num_output_channels,
                                               deep_supervision)
        return ModalityBranches(branches, semi["modalities"], semi["regions"])

    @classmethod
    def check(cls, context: Context, settings: BaseSettings) -> list[str]:
        require_modalities(context, "Semi-CML needs two or more modalities of the same patient",
                           '{"T1": [0], "T2": [1]}')
        names = list(context.modalities)
        better = settings.better_modality if isinstance(settings, SemiCMLSettings) else None
        if better is not None and better not in names:
            raise UserError(f'Plans file, "semi": better_modality is {better!r}, but the modalities are {names}.')
        return []

    @classmethod
    def graphs(cls, settings: BaseSettings) -> int:
        return 2 * len(settings.modalities or {})

    def called_networks(self) -> list[nn.Module]:
        return [*self.student.branches, *(teacher.network for teacher in self.teachers)]

    # loss

    def stage(self) -> MutualLearning | Relearning:
        """The stage of this moment of training."""
        if self.settings.prel and self.progress >= self.settings.prel_start:
            return Relearning(self, self.settings, self.contrast, self.student, self.teachers, self.better_modality())
        return MutualLearning(self, self.settings, self.contrast, self.names)

    def loss(self, batch: Batch) -> Iterator[list[Term]]:
        stage = self.stage()
        relearning = isinstance(stage, Relearning)
        keep_supervised = not (relearning and self.settings.drop_supervised_in_prel)
        present = batch.unlabelled_present
        if present is None:
            present = torch.ones(len(batch.unlabelled), len(self.names), dtype=torch.bool)
        labelled, unlabelled = self._labelled_rows(batch), stage.rows(present)
        outputs = {}
        for name, rows in labelled.items():
            images = [rows.of(batch.labelled), *([unlabelled[name].of(batch.unlabelled)] if name in unlabelled else [])]
            own = [self.student.select(image, name) for image in images]
            outputs[name] = self.passes(self.student.branch(name), *own, together=not relearning, alone=1)
        for name, rows in labelled.items():
            output, target = next(outputs[name]), rows.of(batch.target)
            self.scores.count(name, output, target, rows)
            yield [self.supervised(output, target, f"supervised_{name}", patches=rows.number)] \
                if keep_supervised else []
        if isinstance(stage, Relearning):
            yield from stage.terms(batch.unlabelled, present, unlabelled, outputs)
        else:
            yield stage.terms(present, unlabelled, outputs)

    def _labelled_rows(self, batch: Batch) -> dict[str, Rows]:
        """The labelled patches that each modality learns from: those that have it."""
        return {name: Rows.with_modality(batch.labelled_present, index, len(batch.labelled))
                for index, name in enumerate(self.names)}

    # after a step

    def better_modality(self) -> str:
        """The modality that teaches: set by the user, or the one with the higher smoothed training Dice."""
        return self.settings.better_modality or self.scores.best

    def after_step(self) -> None:
        self.scores.after_step()
        for name, dice in zip(self.names, self.scores.dice(), strict=True):
            self.metrics[f"training_dice_{name}"] = dice
        for teacher in self.teachers:
            if isinstance(teacher, EMATeacher):
                teacher.update()

    def after_epoch(self) -> None:
        self.scores.choose()
        for teacher, score in zip(self.teachers, self.scores.dice().tolist(), strict=True):
            if isinstance(teacher, BestModelAverage):
                teacher.update(score)

    # deployment

    def deployable(self) -> nn.Module:
        if self.settings.deploy == "student":
            return self.student
        averaged = {name: teacher.network for name, teacher in zip(self.names, self.teachers, strict=True)}
        return ModalityBranches(averaged, self.student.channels, self.student.regions)
