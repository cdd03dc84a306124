"""Semi-CML: one network per modality; they contrast areas of each other, then the better one teaches with soft labels.

Source: Zhang et al., "Multi-modal contrastive mutual learning and pseudo-label re-learning for semi-supervised medical
image segmentation", Medical Image Analysis 83, 2023, 102656.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import ClassVar, Literal

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_semi.data.views import with_noise
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.losses.area_similarity import area_similarity_contrast, slices_as_areas
from nnunetv2_semi.losses.predictions import foreground, full_resolution, probabilities
from nnunetv2_semi.losses.soft_labels import soft_cross_entropy, soft_dice_loss
from nnunetv2_semi.methods.base import Method, require_modalities
from nnunetv2_semi.methods.contract import Batch, Context, Term
from nnunetv2_semi.methods.modality_scores import ModalityScores
from nnunetv2_semi.methods.rows import Rows
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.methods.settings import setting
from nnunetv2_semi.networks.modality_branches import ModalityBranches
from nnunetv2_semi.networks.monte_carlo import summed_probabilities
from nnunetv2_semi.teachers import BestModelAverage, EMATeacher, Teacher


class SemiCMLSettings(BaseSettings):
    """Settings of SemiCML."""

    asc: bool = setting(True, "area-similarity contrast at all, in both stages")
    asc_weight: float = setting(
        0.1,
        "its weight in stage 1; paper: 3.5, beside a larger supervised loss",
        at_least=0, paper=3.5,
    )
    asc_ramp_fraction: float = setting(0.0, "share of training over which that weight ramps up", at_least=0)
    temperature: float = setting(1.0, "similarities are divided by it", above=0)
    areas: Literal["slice", "volume"] = setting(
        "slice",
        '`"slice"`: in 3D, slices along the coarsest axis; `"volume"`: whole patches',
    )
    max_slices: int = setting(16, "at most so many slices a patch", at_least=1)
    empty_areas: bool = setting(
        False,
        "areas without a predicted foreground voxel take part in the contrast",
        paper=True,
    )
    consistency_weight: float = setting(1.0, "of the mean squared difference in stage 1", at_least=0)
    ramp_fraction: float = setting(0.2, "share of training over which that weight ramps up", at_least=0, paper=1.0)
    prel: bool = setting(True, "stage 2 at all")
    prel_weight: float = setting(
        0.1,
        "of all terms of stage 2; paper: 1, beside a larger supervised loss that its code drops",
        at_least=0, paper=1,
    )
    prel_start: float = setting(0.63, "share of training after which stage 2 begins", at_least=0, at_most=1)
    prel_passes: int = setting(4, "noisy passes whose mean is the soft label", at_least=1)
    prel_noise: float = setting(
        0.1,
        "standard deviation of that noise, before it is clamped to [0, 2 × this]",
        at_least=0,
    )
    alpha_weaker: float = setting(0.01, "share of the contrast in stage 2, weaker modalities", at_least=0, at_most=1)
    alpha_better: float = setting(0.2, "the same, better modality", at_least=0, at_most=1)
    self_relearning: float = setting(
        0.2,
        "last share of stage 2 in which the better modality learns from itself too",
        at_least=0, at_most=1,
    )
    better_modality: str | None = setting(
        None,
        "which modality teaches; `null`: the higher Dice on labelled training patches",
    )
    soft_label: Literal["better", "mean"] = setting(
        "better",
        "`\"better\"`: of the better modality's teacher; `\"mean\"`: of all teachers, and all modalities learn "
        "from it throughout stage 2",
    )
    teacher: Literal["ema", "best_model_average"] = setting(
        "ema",
        'paper: `"best_model_average"`',
        paper="best_model_average",
    )
    ema_decay: float | None = setting(None, 'of the `"ema"` teacher, as in Mean Teacher', at_least=0, at_most=1)
    drop_supervised_in_prel: bool = setting(False, "paper's code: `true`, no labelled loss in stage 2", paper=True)
    deploy: Literal["student", "teacher"] = setting(
        "student",
        '`"student"` or `"teacher"`: which networks are validated, saved and predicted with',
    )


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

    def loss(self, batch: Batch) -> Iterator[list[Term]]:
        relearning = self.settings.prel and self.progress >= self.settings.prel_start
        keep_supervised = not (relearning and self.settings.drop_supervised_in_prel)
        labelled, unlabelled = self._labelled_rows(batch), self._unlabelled_rows(batch, relearning)
        outputs = {}
        for name, rows in labelled.items():
            images = [rows.of(batch.labelled), *([unlabelled[name].of(batch.unlabelled)] if name in unlabelled else [])]
            own = [self.student.select(image, name) for image in images]
            outputs[name] = self.passes(self.student.branch(name), *own, together=not relearning, alone=1)
        for name, rows in labelled.items():
            output, target = next(outputs[name]), rows.of(batch.target)
            self.scores.count(name, output, target, rows)
            yield [self.supervised(output, target, f"supervised_{name}", applies=not rows.empty)] \
                if keep_supervised else []
        if relearning:
            yield from self._relearning(batch, unlabelled, outputs)
        else:
            yield self._mutual_learning(batch, unlabelled, outputs)

    def _labelled_rows(self, batch: Batch) -> dict[str, Rows]:
        """The labelled patches that each modality learns from: those that have it."""
        if batch.labelled_present is None:
            return {name: Rows() for name in self.names}
        return {name: Rows.where(has) for name, has in zip(self.names, batch.labelled_present.T, strict=True)}

    def _unlabelled_rows(self, batch: Batch, relearning: bool) -> dict[str, Rows]:
        """The unlabelled patches that each modality learns from.

        In stage 1 those with two modalities or more; in stage 2, for those modalities that learn then, those that have
        it and a modality that teaches.
        """
        present = batch.unlabelled_present
        if present is None:
            present = torch.ones(len(batch.unlabelled), len(self.names), dtype=torch.bool)
        if not relearning:
            return dict.fromkeys(self.names, Rows.where(present.sum(1) > 1))
        taught = present[:, [self.names.index(name) for name in self._teaching()]].any(1)
        return {name: Rows.where(present[:, self.names.index(name)] & taught) for name in self._learners()}

    def _mutual_learning(self, batch: Batch, unlabelled: dict[str, Rows], outputs: dict[str, Iterator]) -> list[Term]:
        """Stage 1: asc_weight L_ASC(p_1, p_2) + w(t) mean (p_1 - p_2)^2, the mean over pairs of modalities."""
        predicted = [probabilities(next(outputs[name]), self.context.regions) for name in unlabelled]
        applies = not unlabelled[self.names[0]].empty
        pairs = self._pairs(predicted, batch.unlabelled_present, unlabelled[self.names[0]])
        if applies:
            self.note_agreement(pairs[0][0].detach(), pairs[0][1])
        difference = sum(torch.mean((first - second) ** 2) for first, second in pairs) / len(pairs)
        weight = self.unlabelled_weight(self.settings.consistency_weight, self.settings.ramp_fraction)
        terms = [Term("consistency", torch.as_tensor(difference), weight, applies=applies)]
        if self.settings.asc:
            contrasts = [self._contrast(*self._areas(first, second)) for first, second in pairs]
            terms.append(Term("asc", torch.stack(contrasts).mean(), self.unlabelled_weight(
                self.settings.asc_weight, self.settings.asc_ramp_fraction), applies=applies))
        return terms

    @staticmethod
    def _pairs(predicted: list[torch.Tensor], present: torch.Tensor | None,
               rows: Rows) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Predictions of two modalities for the patches that have both, of all pairs of which there are patches."""
        pairs = []
        for first, second in combinations(range(len(predicted)), 2):
            both = Rows() if present is None or rows.empty else Rows.where(rows.of(present)[:, [first, second]].all(1))
            if not both.empty:
                pairs.append((both.of(predicted[first]), both.of(predicted[second])))
        return pairs

    def _relearning(self, batch: Batch, unlabelled: dict[str, Rows], outputs: dict[str, Iterator],
                    ) -> Iterator[list[Term]]:
        """Stage 2: alpha L_ASC(p_t, p_m) + (1 - alpha)(L_CE + L_Dice), p_t the better modality's soft label."""
        better = self.better_modality()
        soft_labels = self._soft_labels(batch)
        for name, rows in unlabelled.items():
            logits = full_resolution(next(outputs[name]))
            predicted, soft_label = probabilities(logits, self.context.regions), rows.of(soft_labels)
            applies = not rows.empty
            if applies:
                self.note_agreement(soft_label, predicted)
            alpha = self.settings.alpha_better if name == better else self.settings.alpha_weaker
            regions, whole = self.context.regions, self.settings.prel_weight
            relearn = (soft_cross_entropy(logits, soft_label, regions) + soft_dice_loss(predicted, soft_label, regions))
            if not self.settings.asc:
                yield [Term(f"prel_{name}", relearn, self.unlabelled_weight(whole), applies=applies)]
                continue
            contrast = self._contrast(*self._areas(soft_label, predicted))
            yield [Term(f"prel_{name}", relearn, self.unlabelled_weight(whole * (1.0 - alpha)), applies=applies),
                   Term(f"prel_asc_{name}", contrast, self.unlabelled_weight(whole * alpha), applies=applies)]

    def _teaching(self) -> list[str]:
        """The modalities whose teachers make the soft label."""
        return [self.better_modality()] if self.settings.soft_label == "better" else list(self.names)

    def _learners(self) -> list[str]:
        """The modalities that re-learn now: the better one learns from itself at the end of stage 2 alone."""
        if self.settings.soft_label == "mean":
            return list(self.names)
        joins_at = 1.0 - self.settings.self_relearning * (1.0 - self.settings.prel_start)
        return [name for name in self.names if name != self.better_modality() or self.progress >= joins_at]

    def _soft_labels(self, batch: Batch) -> torch.Tensor:
        """Mean probability, over noisy passes with dropout active, of the teaching modalities that a patch has."""
        noise, passes = self.settings.prel_noise, self.settings.prel_passes
        image, present = batch.unlabelled, batch.unlabelled_present
        total: torch.Tensor | float = 0.0
        number: torch.Tensor | float = 0.0
        for name in self._teaching():
            index = self.names.index(name)
            own = self.student.select(image, name)
            has = torch.ones(len(image)) if present is None else present[:, index]
            share = has.to(image, non_blocking=True).reshape(-1, *[1] * (image.ndim - 1))
            number = number + passes * share
            # the paper's noise: clamp(0.1 N(0, 1), 0, 0.2), never negative
            noisy = (with_noise(own, noise, 0.0, 2 * noise) for _ in range(passes))
            total = total + summed_probabilities(self.teachers[index].network, noisy, self.context.regions) * share
        assert isinstance(total, torch.Tensor) and isinstance(number, torch.Tensor)
        return total / number.clamp_min(1)

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
