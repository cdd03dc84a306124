"""Distillation: a plain nnU-Net learns the soft labels of trained models, on labelled and unlabelled patches.

Sources: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531, 2015. Beyer et al.,
"Knowledge distillation: a good teacher is patient and consistent", CVPR 2022: teacher and student see the same patch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.losses.deep_supervision import summed_over_scales
from nnunetv2_semi.losses.distillation import at_grid, distillation_loss, softened
from nnunetv2_semi.losses.predictions import Logits, all_scales, probabilities
from nnunetv2_semi.losses.soft_labels import soft_dice_loss
from nnunetv2_semi.methods.base import Method
from nnunetv2_semi.methods.contract import Batch, Context, Term
from nnunetv2_semi.methods.rows import Rows
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.methods.settings import setting, settings_from_plan
from nnunetv2_semi.networks.one_modality import OneModality
from nnunetv2_semi.networks.trained_ensemble import TrainedModel


class DistillationSettings(BaseSettings):
    """Settings of Distillation."""

    teacher: str | None = setting(
        None,
        "model folder of the teacher, that holds `fold_0` and so on; written by `nnunetv2_semi distill`, as are the "
        "next three",
    )
    teacher_folds: list[str] = setting(["0"], "its folds; the mean of their probabilities teaches")
    teacher_checkpoint: str = setting("checkpoint_final.pth", "file in the folder of each fold")
    teacher_sha256: dict[str, str] | None = setting(
        None,
        "fold to SHA-256 of that file; checked before training and by `--c`",
    )
    modality: str | None = setting(None, "what the student sees of an image; `null`: all channels")
    temperature: float = setting(2.0, "T, softens the probabilities of teacher and student", above=0)
    distillation_weight: float = setting(1.0, "of T² KL(teacher ‖ student)", at_least=0)
    dice_weight: float = setting(1.0, "of the soft Dice loss to the teacher's probabilities, T = 1", at_least=0)


class Distillation(Method):
    """L(z, y) + w_d T^2 KL(q_T || p_T) + w_s D(p, q) on labelled patches, and the last two on unlabelled ones.

    L: nnU-Net's loss of the student's logits z. p, q: probabilities of student and teacher on the same patch, p_T, q_T:
    at the temperature. D: Dice loss. All at all outputs of deep supervision, weighted as in nnU-Net. The teacher sees
    all channels. A step costs two passes with a gradient, and two of each of the teacher's networks without.
    """

    name: ClassVar[str] = "Distillation"
    Settings: ClassVar[type[BaseSettings]] = DistillationSettings
    settings: DistillationSettings

    def __init__(self, student: nn.Module, settings: DistillationSettings, context: Context) -> None:
        super().__init__(student, settings, context)
        self.teacher = _teacher(settings).ensemble()

    # networks

    @classmethod
    def build_student(cls, plans_manager: PlansManager, configuration_manager: ConfigurationManager,
                      num_input_channels: int, num_output_channels: int, deep_supervision: bool) -> nn.Module:
        semi = configuration_manager.configuration["semi"]
        modality = settings_from_plan(DistillationSettings, semi, cls.name).modality
        channels = list(range(num_input_channels)) if modality is None else semi["modalities"][modality]
        network = super().build_student(plans_manager, configuration_manager, len(channels), num_output_channels,
                                        deep_supervision)
        return network if modality is None else OneModality(network, modality, channels)

    @classmethod
    def completed(cls, settings: BaseSettings) -> BaseSettings:
        """With the digests of the teacher's checkpoints."""
        assert isinstance(settings, DistillationSettings)
        if settings.teacher is None:
            return settings
        digests, named = _teacher(settings).digests(), settings.teacher_sha256
        if named not in (None, digests):
            raise UserError(f"The teacher's checkpoints in {settings.teacher} are not those that the plans file names "
                            f"(SHA-256 {digests}, not {named}). Give those, or begin anew under another name of the "
                            'plans, without "teacher_sha256".')
        return settings.model_copy(update={"teacher_sha256": digests})

    @classmethod
    def check(cls, context: Context, settings: BaseSettings) -> list[str]:
        assert isinstance(settings, DistillationSettings)
        if settings.teacher is None:
            raise UserError("Distillation needs a trained model as teacher. Start it with nnunetv2_semi distill -d "
                            "DATASET -tr TRAINER --student PLANS.")
        if settings.modality is not None and settings.modality not in context.modalities:
            raise UserError(f"There is no modality {settings.modality!r} for the student to see. Modalities of the data"
                            f" set: {', '.join(context.modalities)}.")
        model = _teacher(settings)
        _require_same_interface(model, context)
        own, its = list(context.patch_size), list(model.configuration.patch_size)
        if own == its:
            return []
        if model.strides is None:
            raise UserError(f"The student's patches are {own}, and the teacher takes its own, {its}, alone: its plans "
                            "tell no strides. Give the student that patch_size in its plans file.")
        return [f"The teacher was trained on patches of {its} and labels the student's, {own}: it may be less accurate "
                "on these than it is by itself."]

    @classmethod
    def graphs(cls, settings: BaseSettings) -> int:
        return 2

    def called_networks(self) -> list[nn.Module]:
        return [self.student, *self.teacher.networks]

    def notes(self) -> list[str]:
        settings = self.settings
        return [f"The teacher is the {settings.teacher_checkpoint} of fold {', '.join(settings.teacher_folds)} in "
                f"{settings.teacher}. Judge the student by cases that none of these folds was trained on."]

    # loss

    def loss(self, batch: Batch) -> Iterator[list[Term]]:
        labelled = self._rows(batch.labelled, batch.labelled_present)
        unlabelled = self._rows(batch.unlabelled, batch.unlabelled_present)
        distills = self.unlabelled_weight(1.0) > 0
        images = [labelled.of(batch.labelled), *([unlabelled.of(batch.unlabelled)] if distills else [])]
        outputs = self.passes(self.student, *images)
        output = next(outputs)
        supervised = self.supervised(output, labelled.of(batch.target), patches=labelled.number)
        if not distills:
            yield [supervised]
            return
        yield [supervised, *self._terms("labelled", output, self.teacher(images[0]), labelled)]
        output, teacher = next(outputs), self.teacher(images[1])
        regions = self.context.regions
        self.note_agreement(probabilities(teacher, regions), probabilities(output, regions))
        yield self._terms("unlabelled", output, teacher, unlabelled)

    def _rows(self, image: torch.Tensor, present: torch.Tensor | None) -> Rows:
        """The patches (B, C, *spatial) of cases that have what the student sees; present: bool (B, modalities)."""
        if self.settings.modality is None:
            return Rows(len(image))
        return Rows.with_modality(present, list(self.context.modalities).index(self.settings.modality), len(image))

    def _terms(self, kind: str, output: Logits, teacher: torch.Tensor, rows: Rows) -> list[Term]:
        """Of the patches of one kind. output: the student's. teacher: logits (B, K, *spatial)."""
        settings, regions, scales = self.settings, self.context.regions, all_scales(output)

        def soft_labels(temperature: float) -> list[torch.Tensor]:
            finest = softened(teacher, temperature, regions)
            return [at_grid(finest, scale.shape[2:]) for scale in scales]

        terms = []
        if settings.distillation_weight > 0:
            value = summed_over_scales(
                self.context.scale_weights, lambda z, q: distillation_loss(z, q, settings.temperature, regions),
                scales, soft_labels(settings.temperature))
            terms.append(Term(f"distillation_{kind}", value, self.unlabelled_weight(settings.distillation_weight),
                              patches=rows.number))
        if settings.dice_weight > 0:
            value = summed_over_scales(
                self.context.scale_weights, lambda z, q: soft_dice_loss(probabilities(z, regions), q, regions),
                scales, soft_labels(1.0))
            terms.append(Term(f"distillation_dice_{kind}", value, self.unlabelled_weight(settings.dice_weight),
                              patches=rows.number))
        return terms

    # deployment and checkpoints

    def picture(self, image: torch.Tensor) -> tuple[dict[str, Logits], dict[str, torch.Tensor]]:
        """With what the teacher makes of it."""
        logits, maps = super().picture(image)
        return {**logits, "teacher": self.teacher(image)}, maps

    def get_extra_state(self) -> dict[str, str] | None:
        return self.settings.teacher_sha256

    def set_extra_state(self, state: dict[str, str] | None) -> None:
        if state != self.settings.teacher_sha256:
            raise UserError(f"The training began with another teacher (SHA-256 {state}) than "
                            f"{self.settings.teacher} is now ({self.settings.teacher_sha256}). Give the same one to go "
                            "on.")


def _teacher(settings: DistillationSettings) -> TrainedModel:
    assert settings.teacher is not None
    return TrainedModel.checked(settings.teacher, settings.teacher_folds, settings.teacher_checkpoint)


def _require_same_interface(model: TrainedModel, context: Context) -> None:
    """Raise UserError where the teacher takes other images, or gives other labels, than the student."""
    labels = model.plans.get_label_manager(model.dataset_json)
    facts: dict[str, tuple[object, object]] = {
        "spacing in mm": _rounded(model.configuration.spacing, context.spacing),
        "axes of a patch": (len(model.configuration.patch_size), len(context.patch_size)),
        "image channels": (model.num_channels, context.num_channels),
        "region-based labels": (labels.has_regions, context.regions),
        "classes or regions": (labels.num_segmentation_heads, context.num_heads),
    }
    differ = [f"{name}: {its} and {own}" for name, (its, own) in facts.items() if its != own]
    if differ:
        raise UserError(f"The teacher in {model.folder} and the student's plans differ, so that one's patches mean "
                        f"nothing to the other: {'; '.join(differ)}. Make the student's plans from a copy of the "
                        "teacher's, and change only the architecture, patch_size and batch_size in it.")


def _rounded(first: Iterable[float], second: Iterable[float]) -> tuple[object, object]:
    return [round(float(step), 4) for step in first], [round(float(step), 4) for step in second]
