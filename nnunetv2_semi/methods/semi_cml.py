"""Semi-CML: one network per modality; they contrast areas of each other, then the better one teaches with soft labels.

Source: Zhang et al., "Multi-modal contrastive mutual learning and pseudo-label re-learning for semi-supervised medical
image segmentation", Medical Image Analysis 83, 2023, 102656.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, Literal

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_semi.data.views import with_noise
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.losses.area_similarity import area_similarity_contrast, slices_as_areas
from nnunetv2_semi.losses.predictions import (
    Logits,
    confusion_counts,
    dice_from_counts,
    foreground,
    full_resolution,
    probabilities,
)
from nnunetv2_semi.losses.soft_labels import soft_cross_entropy, soft_dice_loss
from nnunetv2_semi.methods.base import Batch, Context, Method, Term
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.networks.modality_branches import ModalityBranches, SingleModality
from nnunetv2_semi.teachers import BestModelAverage, EMATeacher, Teacher

_DICE_MEMORY = 0.99  # of the counts behind "which modality is better", per step


@dataclass(frozen=True)
class SemiCMLSettings(BaseSettings):
    """Stage 1: asc (use the area-similarity contrast at all, in both stages), asc_weight (the paper's 3.5 stands beside
    a supervised loss of 10 BCE + 7 Dice; beside nnU-Net's CE + Dice the same share would be 0.5, at which networks were
    seen to invent foreground that tells areas apart), asc_ramp_fraction (share of training over which that weight
    ramps up; the paper's is constant), temperature, areas
    ("slice": 2D slices along the coarsest axis, at most max_slices a patch; "volume": whole patches), empty_areas
    (those in which neither prediction has a foreground voxel take part too, as in the paper), consistency_weight (of
    the mean squared difference, sigmoid ramp-up over ramp_fraction of training).
    Stage 2: prel (have it at all), prel_weight (of all its terms; the paper's are weighted 1 beside 10 BCE + 7 Dice),
    prel_start (fraction of training), prel_passes and prel_noise (the teacher's noisy
    passes), alpha_weaker, alpha_better (share of the contrast), self_relearning (last fraction of stage 2 in which the
    better modality learns from itself too), better_modality (None: chosen by the Dice on labelled training patches),
    soft_label (the paper's "better": of the better modality's teacher; "mean": of all teachers, and all modalities
    learn from it throughout stage 2),
    teacher ("ema" with ema_decay, or the paper's "best_model_average"), drop_supervised_in_prel (the paper's code).
    deploy: the students or the averaged teachers.
    """

    asc: bool = True
    asc_weight: float = 0.1
    asc_ramp_fraction: float = 0.0
    temperature: float = 1.0
    areas: Literal["slice", "volume"] = "slice"
    max_slices: int = 16
    empty_areas: bool = False
    consistency_weight: float = 1.0
    ramp_fraction: float = 1.0
    prel: bool = True
    prel_weight: float = 0.1
    prel_start: float = 0.63
    prel_passes: int = 4
    prel_noise: float = 0.1
    alpha_weaker: float = 0.01
    alpha_better: float = 0.2
    self_relearning: float = 0.2
    better_modality: str | None = None
    soft_label: Literal["better", "mean"] = "better"
    teacher: Literal["ema", "best_model_average"] = "ema"
    ema_decay: float = 0.99
    drop_supervised_in_prel: bool = False
    deploy: Literal["student", "teacher"] = "student"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prel_start", "alpha_weaker", "alpha_better", "self_relearning", "ema_decay"):
            self.require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name in ("max_slices", "prel_passes"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("temperature", self.temperature > 0, "greater than 0")


class SemiCML(Method):
    """Contrastive mutual learning of paired modalities, then pseudo-label re-learning."""

    name: ClassVar[str] = "SemiCML"
    Settings: ClassVar[type[BaseSettings]] = SemiCMLSettings
    settings: SemiCMLSettings
    student: ModalityBranches
    train_counts: torch.Tensor

    def __init__(self, student: ModalityBranches, settings: SemiCMLSettings, context: Context) -> None:
        super().__init__(student, settings, context)
        self.names = student.names
        self._teachers = nn.ModuleList(
            EMATeacher(branch, settings.ema_decay) if settings.teacher == "ema" else BestModelAverage(branch)
            for branch in student.branches)
        self.better = self.names[0]
        # (modality, true positive / false positive / false negative, foreground class), decayed sums over steps
        self.register_buffer("train_counts", torch.zeros(len(self.names), 3, 0))
        self._step_counts: dict[str, torch.Tensor] = {}

    # networks

    @property
    def teachers(self) -> list[Teacher]:
        """One teacher per modality, in the order of ``names``."""
        return [teacher for teacher in self._teachers if isinstance(teacher, Teacher)]

    @classmethod
    def build_student(cls, plans_manager: PlansManager, configuration_manager: ConfigurationManager,
                      num_input_channels: int, num_output_channels: int, deep_supervision: bool) -> ModalityBranches:
        semi = configuration_manager.configuration["semi"]
        channels: dict[str, list[int]] = semi["modalities"]
        branches = {name: super(SemiCML, cls).build_student(plans_manager, configuration_manager, len(own),
                                                            num_output_channels, deep_supervision)
                    for name, own in channels.items()}
        return ModalityBranches(branches, channels, semi["regions"])

    @classmethod
    def check(cls, context: Context, settings: BaseSettings) -> None:
        names = list(context.modalities)
        if len(names) < 2:
            raise UserError(
                f"Semi-CML needs two or more modalities of the same patient; this data set has only {names}. Name them "
                'in dataset.json: "semi": {"modalities": {"T1": [0], "T2": [1]}}. With one modality use '
                "nnUNetTrainerSemiMeanTeacher.")
        better = settings.better_modality if isinstance(settings, SemiCMLSettings) else None
        if better is not None and better not in names:
            raise UserError(f'Plans file, "semi": better_modality is {better!r}, but the modalities are {names}.')

    @classmethod
    def graphs(cls, settings: BaseSettings) -> int:
        return 2 * len(settings.modalities or {})

    def called_networks(self) -> list[nn.Module]:
        return [*self.student.branches, *(teacher.network for teacher in self.teachers)]

    # loss

    def loss(self, batch: Batch) -> Iterator[list[Term]]:
        relearning = self.settings.prel and self.progress >= self.settings.prel_start
        keep_supervised = not (relearning and self.settings.drop_supervised_in_prel)
        outputs = {name: self.passes(self.student.branch(name), self.student.select(batch.labelled, name),
                                     *self._joined_with_labelled(batch, name, relearning)) for name in self.names}
        for name in self.names:
            output = next(outputs[name])
            self._count(name, output, batch)
            weight = float(keep_supervised)
            yield [self.supervised(output, batch.target, f"supervised_{name}", weight)] if keep_supervised else []
        if relearning:
            yield from self._relearning(batch, outputs)
        else:
            yield self._mutual_learning(batch, outputs)

    def _joined_with_labelled(self, batch: Batch, name: str, relearning: bool) -> list[torch.Tensor]:
        """Unlabelled patches that go through the branch with the labelled ones in the one-pass arrangement."""
        if not self.context.one_pass or (relearning and name not in self._learners()):
            return []
        return [self.student.select(batch.unlabelled, name)]

    def _unlabelled_output(self, batch: Batch, name: str, outputs: dict[str, Iterator], together: bool) -> torch.Tensor:
        """Full-resolution logits of a branch on the unlabelled patches; together with those of the other branches?"""
        if self.context.one_pass:
            return full_resolution(next(outputs[name]))
        image = self.student.select(batch.unlabelled, name)
        return full_resolution(next(self.passes(self.student.branch(name), image, together=together)))

    def _mutual_learning(self, batch: Batch, outputs: dict[str, Iterator]) -> list[Term]:
        """Stage 1: asc_weight L_ASC(p_1, p_2) + w(t) mean (p_1 - p_2)^2, the mean over pairs of modalities."""
        predicted = [probabilities(self._unlabelled_output(batch, name, outputs, together=True), self.context.regions)
                     for name in self.names]
        self.note_agreement(predicted[0].detach(), predicted[1])
        pairs = list(combinations(predicted, 2))
        difference = sum(torch.mean((first - second) ** 2) for first, second in pairs) / len(pairs)
        weight = self.unlabelled_weight(self.settings.consistency_weight, self.settings.ramp_fraction)
        terms = [Term("consistency", torch.as_tensor(difference), weight)]
        if self.settings.asc:
            areas = self._areas(*predicted)
            contrasts = [self._contrast(first, second) for first, second in combinations(areas, 2)]
            terms.append(Term("asc", torch.stack(contrasts).mean(), self.unlabelled_weight(
                self.settings.asc_weight, self.settings.asc_ramp_fraction)))
        return terms

    def _relearning(self, batch: Batch, outputs: dict[str, Iterator]) -> Iterator[list[Term]]:
        """Stage 2: alpha L_ASC(p_t, p_m) + (1 - alpha)(L_CE + L_Dice), p_t the better modality's soft label."""
        better = self.better_modality()
        soft_label = self._soft_label(batch, [better] if self.settings.soft_label == "better" else self.names)
        for name in self._learners():
            logits = self._unlabelled_output(batch, name, outputs, together=False)
            predicted = probabilities(logits, self.context.regions)
            self.note_agreement(soft_label, predicted)
            alpha = self.settings.alpha_better if name == better else self.settings.alpha_weaker
            regions, whole = self.context.regions, self.settings.prel_weight
            relearn = (soft_cross_entropy(logits, soft_label, regions) + soft_dice_loss(predicted, soft_label, regions))
            if not self.settings.asc:
                yield [Term(f"prel_{name}", relearn, self.unlabelled_weight(whole))]
                continue
            contrast = self._contrast(*self._areas(soft_label, predicted))
            yield [Term(f"prel_{name}", relearn, self.unlabelled_weight(whole * (1.0 - alpha))),
                   Term(f"prel_asc_{name}", contrast, self.unlabelled_weight(whole * alpha))]

    def _learners(self) -> list[str]:
        """The modalities that re-learn now: the better one learns from itself at the end of stage 2 alone."""
        if self.settings.soft_label == "mean":
            return list(self.names)
        joins_at = 1.0 - self.settings.self_relearning * (1.0 - self.settings.prel_start)
        return [name for name in self.names if name != self.better_modality() or self.progress >= joins_at]

    def _soft_label(self, batch: Batch, teaching: Sequence[str]) -> torch.Tensor:
        """Mean probability of the teachers of ``teaching`` over noisy passes, dropout active."""
        noise, passes = self.settings.prel_noise, self.settings.prel_passes
        total = None
        for name in teaching:
            image, teacher = self.student.select(batch.unlabelled, name), self.teachers[self.names.index(name)]
            with torch.no_grad(), teacher.dropout_active():
                for _ in range(passes):
                    # the paper's noise: clamp(0.1 N(0, 1), 0, 0.2), never negative
                    single = probabilities(teacher(with_noise(image, noise, 0.0, 2 * noise)), self.context.regions)
                    total = single if total is None else total.add_(single)
        assert total is not None
        return total.div_(passes * len(teaching))

    def _areas(self, *predicted: torch.Tensor) -> list[torch.Tensor]:
        """Foreground probabilities of the same areas in each prediction, (areas, C, *area)."""
        shown = [foreground(p, self.context.regions) for p in predicted]
        if shown[0].ndim == 4 or self.settings.areas == "volume":
            return shown
        spacing = self.context.spacing
        axis, chosen, areas = spacing.index(max(spacing)), None, []
        for probability in shown:
            slices, chosen = slices_as_areas(probability, axis, self.settings.max_slices, chosen)
            areas.append(slices)
        return areas

    def _contrast(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """L_ASC of the same areas in two predictions.

        The overlap does not see how large probabilities are: between two areas that both predict no foreground it
        compares traces of probability, and telling such areas apart means inventing foreground.
        """
        keep = None
        if not self.settings.empty_areas:
            keep = ((first.detach() > 0.5) | (second.detach() > 0.5)).flatten(1).any(1)
        return area_similarity_contrast(first, second, self.settings.temperature, keep)

    # which modality is better

    def _count(self, name: str, output: Logits, batch: Batch) -> None:
        target = batch.target if isinstance(batch.target, torch.Tensor) else batch.target[0]
        with torch.no_grad():
            predicted = probabilities(output, self.context.regions).detach()
            self._step_counts[name] = confusion_counts(predicted, target, self.context.regions,
                                                       self.context.ignore_label)

    def training_dice(self) -> torch.Tensor:
        """Smoothed Dice of each modality on labelled training patches, in the order of ``names``."""
        return torch.nan_to_num(dice_from_counts(self.train_counts))

    def better_modality(self) -> str:
        """The modality that teaches: set by the user, or the one with the higher smoothed training Dice."""
        return self.settings.better_modality or self.better

    def after_step(self) -> None:
        counts = self.context.sum_over_processes(torch.stack([self._step_counts[name] for name in self.names]))
        if self.train_counts.shape[-1] == 0:
            self.train_counts = torch.zeros_like(counts)
        self.train_counts.mul_(_DICE_MEMORY).add_(counts)
        for name, dice in zip(self.names, self.training_dice(), strict=True):
            self.metrics[f"training_dice_{name}"] = dice
        for teacher in self.teachers:
            if isinstance(teacher, EMATeacher):
                teacher.update()

    def after_epoch(self) -> None:
        dice = self.training_dice().tolist()
        self.better = self.names[dice.index(max(dice))]
        for teacher, score in zip(self.teachers, dice, strict=True):
            if isinstance(teacher, BestModelAverage):
                teacher.update(score)

    # state

    def get_extra_state(self) -> str:
        return self.better

    def set_extra_state(self, state: str) -> None:
        self.better = state

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        self.train_counts = torch.zeros_like(state_dict[prefix + "train_counts"], device=self.train_counts.device)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]

    # deployment

    def deployable(self) -> nn.Module:
        if self.settings.deploy == "student":
            return self.student
        averaged = {name: teacher.network for name, teacher in zip(self.names, self.teachers, strict=True)}
        return ModalityBranches(averaged, self.student.channels, self.student.regions)

    def parts(self) -> dict[str, nn.Module]:
        deployed = self.deployable()
        assert isinstance(deployed, ModalityBranches)
        return {name: SingleModality(deployed, name) for name in self.names}

    @classmethod
    def stock_models(cls, semi: dict, weights: dict[str, torch.Tensor],
                     num_channels: int) -> dict[str, tuple[list[int], dict[str, torch.Tensor]]]:
        models = {}
        for index, (name, channels) in enumerate(semi["modalities"].items()):
            prefix = f"branches.{index}."
            models[name] = (channels, {key.removeprefix(prefix): value for key, value in weights.items()
                                       if key.startswith(prefix)})
        return models
