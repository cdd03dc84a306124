"""Fusion: one encoder per modality, fused by attention; dynamic pseudo-labels, weighted by what speaks against them.

Source: the dual-branch system described beside Semi-CML ("multi-modal contrastive mutual learning and pseudo-label
re-learning, a new paradigm"): its loss terms, its rising threshold and its weights are built as described.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, repeat
from typing import ClassVar, Literal

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_semi.losses.consensus_divergence import same_decision
from nnunetv2_semi.losses.consistency import mean_squared_difference, predictive_entropy
from nnunetv2_semi.losses.hard_labels import hard_labels, known_labels
from nnunetv2_semi.losses.inter_modal import inter_modal_loss
from nnunetv2_semi.losses.predictions import Logits, all_scales, probabilities
from nnunetv2_semi.methods.base import Method, require_modalities
from nnunetv2_semi.methods.contract import Batch, Context, Target, Term
from nnunetv2_semi.methods.perturbation import PerturbationSettings, perturbed
from nnunetv2_semi.methods.rows import Rows, of_patches_with_both
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.methods.settings import setting, settings_from_plan
from nnunetv2_semi.networks.fused_network import FusedNetwork, FusionCore, attention_scales
from nnunetv2_semi.networks.monte_carlo import summed_probabilities
from nnunetv2_semi.schedules import rising_threshold
from nnunetv2_semi.teachers import EMATeacher


class FusionSettings(PerturbationSettings):
    """Settings of Fusion."""

    attention: bool = setting(True, "attention between modalities at the bottleneck at all")
    attention_tokens: int = setting(
        2048,
        "the stage above has attention too, if it has at most so many voxels, of all modalities together",
        at_least=0,
    )
    attention_heads: int = setting(4, "of the attention", at_least=1)
    dropout: float = setting(
        0.1,
        "probability with which a channel of the fused bottleneck is dropped",
        at_least=0, below=1,
    )
    modality_weight: float = setting(0.5, "of nnU-Net's loss of each modality's light decoder", at_least=0)
    inter_weight: float = setting(
        0.1,
        "of 1 - Dice between two modalities' predictions of unlabelled patches; `0`: none",
        at_least=0,
    )
    intra_weight: float = setting(
        10.0,
        "of the mean squared difference of student and teacher; `0`: none",
        at_least=0,
    )
    pseudo_weight: float = setting(1.0, "of nnU-Net's loss on pseudo-labels; `0`: none", at_least=0)
    ramp_fraction: float = setting(0.2, "share of training over which these three weights ramp up", at_least=0)
    threshold: float = setting(
        0.7,
        "tau_0: lowest probability of a pseudo-label that counts, at first; it rises by nine tenths of what is left to "
        "1, to 0.97",
        at_least=0, at_most=1,
    )
    threshold_warmup: float | None = setting(
        0.2,
        "share of training over which it rises; `null`: it stays",
        above=0,
    )
    threshold_warmup_epochs: int | None = setting(
        None,
        "the same in epochs, if given",
        at_least=1,
    )
    uncertainty_passes: int = setting(
        4,
        "passes of the teacher with dropout, whose entropy H weighs a pseudo-label by exp(-H); `0`: no weights",
        at_least=0,
    )
    disagreement_factor: float = setting(
        0.3,
        "weighs pseudo-labels where the modalities' own predictions disagree; `1`: no check",
        at_least=0, at_most=1,
    )
    ema_decay: float | None = setting(None, "of the teacher, as in Mean Teacher", at_least=0, at_most=1)
    deploy: Literal["teacher", "student"] = setting("teacher", '`"teacher"` or `"student"`')


@dataclass(frozen=True)
class PseudoLabels:
    """What a teacher makes of patches; all but ``disagree`` of B patches at full resolution.

    probability: (B, K, *spatial), the mean over passes. labels: hard ones, in nnU-Net's layout. uncertainty: entropy in
    nats, zero without passes; disagree: where the modalities differ, bool; both (B, 1, *spatial), of regions
    (B, K, *spatial). weight: of each label, in the layout of ``labels``, 0 where it does not count.
    """

    probability: torch.Tensor
    labels: torch.Tensor
    uncertainty: torch.Tensor
    disagree: torch.Tensor
    weight: torch.Tensor


class Fusion(Method):
    """L(fused) + w_m sum_m L(m) + w(t) (inter + intra + pseudo-labels); L: nnU-Net's loss."""

    name: ClassVar[str] = "Fusion"
    Settings: ClassVar[type[BaseSettings]] = FusionSettings
    settings: FusionSettings
    student: FusedNetwork

    def __init__(self, student: FusedNetwork, settings: FusionSettings, context: Context) -> None:
        super().__init__(student, settings, context)
        self.teacher = EMATeacher(student, settings.teacher_decay(settings.ema_decay))

    # networks

    @classmethod
    def build_student(cls, plans_manager: PlansManager, configuration_manager: ConfigurationManager,
                      num_input_channels: int, num_output_channels: int, deep_supervision: bool) -> FusedNetwork:
        semi = configuration_manager.configuration["semi"]
        settings = settings_from_plan(FusionSettings, semi, cls.name)
        networks = cls.build_for_each_modality(plans_manager, configuration_manager, num_output_channels,
                                               deep_supervision)
        strides = configuration_manager.network_arch_init_kwargs["strides"]
        scales = attention_scales(strides, configuration_manager.patch_size, len(networks), settings.attention_tokens) \
            if settings.attention else []
        return FusedNetwork(networks, semi["modalities"], scales, settings.attention_heads, settings.dropout)

    @classmethod
    def check(cls, context: Context, settings: BaseSettings) -> list[str]:
        require_modalities(context, "Fusion needs two or more modalities of the same patient", '{"T1": [0], "T2": [1]}')
        assert isinstance(settings, FusionSettings)
        if settings.modality_weight == settings.inter_weight == 0 and settings.disagreement_factor < 1:
            return ['light decoders do not train without "modality_weight" and "inter_weight", but pseudo-labels count '
                    'less where they disagree. Set "disagreement_factor" to 1.']
        return []

    def called_networks(self) -> list[nn.Module]:
        teacher = self.teacher_core  # of which the parts are called one by one
        return [self.student.core, *teacher.encoders, teacher.head, *teacher.own_decoders]

    @property
    def teacher_core(self) -> FusionCore:
        """The teacher's encoders and decoders."""
        assert isinstance(self.teacher.network, FusedNetwork)
        return self.teacher.network.core

    # loss

    def loss(self, batch: Batch) -> Iterator[list[Term]]:
        settings, regions = self.settings, self.context.regions
        image, mixing = perturbed(batch.unlabelled, settings, self.context.masked_channels)
        passes = self.passes(partial(self.student.core, each=True), batch.labelled, image)
        fused, each = next(passes)
        yield [self.supervised(fused, batch.target), *self._modality_terms(each, batch.target, batch.labelled_present)]

        teacher = self.pseudo_labels(batch.unlabelled)
        self._note(teacher)
        fused, each = next(passes)
        student = probabilities(fused, regions)
        expected = mixing.of(teacher.probability)
        self.note_agreement(expected, student)
        terms = [self._inter_modal(each, batch.unlabelled_present)] if settings.inter_weight > 0 else []
        if settings.intra_weight > 0:
            terms.append(Term("intra", mean_squared_difference(student, expected),
                              self.unlabelled_weight(settings.intra_weight, settings.ramp_fraction)))
        if settings.pseudo_weight > 0:
            loss = self.context.weighted_loss(fused, mixing.of(teacher.labels), mixing.of(teacher.weight))
            terms.append(Term("pseudo_label", loss,
                              self.unlabelled_weight(settings.pseudo_weight, settings.ramp_fraction)))
        yield terms

    def _modality_terms(self, each: Sequence[torch.Tensor], target: Target,
                        present: torch.Tensor | None) -> list[Term]:
        """nnU-Net's loss of each modality's own predictions, over the patches that have it."""
        if self.settings.modality_weight == 0:
            return []
        labels, known = known_labels(all_scales(target)[0], self.context.regions, self.context.ignore_label)
        terms = []
        for index, (name, logits) in enumerate(zip(self.student.core.names, each, strict=True)):
            rows = Rows.with_modality(present, index, len(logits))
            value = self.context.weighted_loss(rows.of(logits), rows.of(labels), rows.of(known) & (not rows.empty))
            terms.append(Term(f"supervised_{name}", value, self.settings.modality_weight, supervised=True,
                              patches=rows.number))
        return terms

    def _inter_modal(self, each: Sequence[torch.Tensor], present: torch.Tensor | None) -> Term:
        """Mean over pairs of modalities, of the patches that have both."""
        predicted = [probabilities(logits, self.context.regions) for logits in each]
        if present is None:
            present = torch.ones(len(predicted[0]), len(predicted), dtype=torch.bool)
        pairs = of_patches_with_both(predicted, present)
        losses = [inter_modal_loss(first, second, self.context.regions)
                  for first, second in pairs or combinations(predicted, 2)]
        weight = self.unlabelled_weight(self.settings.inter_weight, self.settings.ramp_fraction)
        return Term("inter", torch.stack(losses).mean(), weight, patches=int((present.sum(1) > 1).sum()))

    @torch.no_grad()
    def pseudo_labels(self, image: torch.Tensor) -> PseudoLabels:
        """What the teacher makes of patches (B, C, *spatial).

        Encoders run once: passes that differ by dropout differ from the bottleneck on.
        """
        settings, regions, core = self.settings, self.context.regions, self.teacher_core
        fused, own = core.features(image)
        count = settings.uncertainty_passes
        if count > 0:
            probability = summed_probabilities(core.head, repeat(fused, count), regions) / count
            uncertainty = predictive_entropy(probability, regions)
        else:
            probability = probabilities(core.head(fused), regions)
            uncertainty = torch.zeros_like(predictive_entropy(probability, regions))
        labels, confidence = hard_labels(probability, regions)
        disagree = self._disagreement([probabilities(logits, regions) for logits in core.of_each(own)],
                                      core.present(image))
        weight = (-uncertainty).exp() * (confidence > self.current_threshold())
        weight = weight * torch.where(disagree, settings.disagreement_factor, 1.0)
        return PseudoLabels(probability, labels, uncertainty, disagree, weight)

    def current_threshold(self) -> float:
        """tau(t)"""
        settings = self.settings
        warmup = settings.threshold_warmup
        if settings.threshold_warmup_epochs is not None:
            warmup = settings.threshold_warmup_epochs / settings.num_epochs
        return settings.threshold if warmup is None else rising_threshold(self.progress, settings.threshold, warmup)

    def _disagreement(self, predicted: Sequence[torch.Tensor], present: torch.Tensor) -> torch.Tensor:
        """Where two modalities that a patch has decide differently: bool, in the layout of labels."""
        disagree = torch.zeros_like(same_decision(predicted[0], predicted[0], self.context.regions))
        for first, second in combinations(range(len(predicted)), 2):
            both = present[:, [first, second]].all(1).view(-1, *[1] * (disagree.ndim - 1))
            disagree |= ~same_decision(predicted[first], predicted[second], self.context.regions) & both
        return disagree

    def _note(self, teacher: PseudoLabels) -> None:
        self.metrics["threshold"] = teacher.weight.new_tensor(self.current_threshold())
        self.metrics["unlabelled_voxels_used"] = (teacher.weight > 0).float().mean()
        self.metrics["modalities_disagree"] = teacher.disagree.float().mean()
        largest = math.log(2 if self.context.regions else self.context.num_heads)
        self.metrics["uncertainty"] = teacher.uncertainty.mean() / largest

    def after_step(self) -> None:
        self.teacher.update()

    # deployment

    def deployable(self) -> nn.Module:
        return self.teacher.network if self.settings.deploy == "teacher" else self.student

    def picture(self, image: torch.Tensor) -> tuple[dict[str, Logits], dict[str, torch.Tensor]]:
        """Predictions, the teacher's certainty exp(-H), and where no modality is suspected of error (white)."""
        predictions, maps = super().picture(image)
        teacher = self.pseudo_labels(image)
        return predictions, {**maps, "certainty": (-teacher.uncertainty).exp().amin(1),
                             "agreement": (~teacher.disagree).all(1).float(),
                             "pseudo-label counts": (teacher.weight > 0).all(1).float()}
