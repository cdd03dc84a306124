"""SynFoC: a foundation model and nnU-Net's network teach each other.

Source: Ma et al., "Steady progress beats stagnation: mutual aid of foundation and conventional models in mixed domain
semi-supervised medical image segmentation", CVPR 2025.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_semi.data.boxes import Boxes
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.losses.consensus_divergence import consensus_loss, divergence_loss
from nnunetv2_semi.losses.hard_labels import hard_labels, known_labels
from nnunetv2_semi.losses.predictions import (
    Logits,
    agreement,
    all_scales,
    decision_dice,
    full_resolution,
    probabilities,
)
from nnunetv2_semi.methods.base import Method
from nnunetv2_semi.methods.contract import Batch, Context, Target, Term
from nnunetv2_semi.methods.foundation_settings import (
    FoundationSettings,
    absolute,
    build_foundation,
    checked_digest,
    require_foundation,
)
from nnunetv2_semi.methods.mixing import labelled_partners, paste, same_channels
from nnunetv2_semi.methods.optimization import Optimization, WarmedUpPolyLR
from nnunetv2_semi.methods.perturbation import ViewSettings, intensity_view
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.methods.settings import setting, settings_from_plan
from nnunetv2_semi.networks.conventional_and_foundation import (
    CONVENTIONAL,
    FOUNDATION,
    ConventionalAndFoundation,
    Deploy,
)
from nnunetv2_semi.networks.foundation import FoundationModel
from nnunetv2_semi.networks.foundation_weights import RANDOM
from nnunetv2_semi.schedules import sigmoid_ramp_up
from nnunetv2_semi.teachers import EMATeacher


class SynFoCSettings(FoundationSettings, ViewSettings):
    """Settings of SynFoC."""

    models: Literal["both", "conventional", "foundation"] = setting(
        "both",
        "which models train; with one, it learns from its own teacher alone",
    )
    foundation_loss: Literal["own", "patch"] = setting(
        "own",
        'grid of its Dice and cross-entropy: `"own"`, of its logits (SAM: a quarter of `image_size`); `"patch"`, of '
        "the patch",
    )
    alpha: float | None = setting(
        None,
        "weight of the conventional teacher in the pseudo-label, 1 - this of the foundation one; `null`: self-mutual "
        "confidence, which rises with the conventional model",
        at_least=0, at_most=1,
    )
    confidence: float = setting(0.95, "lowest probability of a pseudo-label that counts", at_least=0, at_most=1)
    pseudo_weight: float = setting(1.0, "of the loss on pseudo-labels, of each model", at_least=0)
    consensus_weight: float = setting(1.0, "of the entropy where the models agree", at_least=0)
    divergence_weight: float = setting(1.0, "of the squared difference where they disagree", at_least=0)
    divergence_where: Literal["disagreement", "everywhere"] = setting(
        "disagreement",
        'where that difference counts; `"everywhere"`, with `consensus_weight` 0, is plain consistency',
    )
    ramp_fraction: float = setting(
        0.2,
        "share of training over which all these weights ramp up",
        at_least=0, paper=1.0,
    )
    ramp: Literal["squared", "unsquared"] = setting(
        "squared",
        '`"squared"`: exp(-5 (1 - t)²), as in the released code; `"unsquared"`: exp(-5 (1 - t)), as in the paper',
        paper="unsquared",
    )
    smallest_box: float = setting(
        0.02,
        "smallest share of a patch's area that shows a labelled patch",
        at_least=0, at_most=1,
    )
    largest_box: float = setting(0.4, "largest share", at_least=0, at_most=1)
    ema_decay: float | None = setting(None, "of both teachers, as in Mean Teacher", at_least=0, at_most=1, paper=0.99)
    deploy: Deploy = setting(
        "conventional",
        '`"conventional"`: a plain nnU-Net; `"foundation"`; `"ensemble"`: the mean of both',
    )
    deploy_weights: Literal["teacher", "student"] = setting("teacher", '`"teacher"` or `"student"`')

    @property
    def ramp_power(self) -> int:
        """Of `sigmoid_ramp_up`."""
        return 2 if self.ramp == "squared" else 1


class SynFoC(Method):
    """Two students learn from labels, from the mean of both teachers' pseudo-labels, and from each other.

    L_x + w(t) (L_u + L_c + L_d) of each student. L_x: nnU-Net's loss on labels. L_u: the same on pseudo-labels of
    unlabelled patches that have other intensities and show a box of a labelled patch. L_c, L_d: the two terms of CDCR.
    A step costs two passes with a gradient of each model, one of each teacher, and one of the conventional student
    without a gradient.
    """

    name: ClassVar[str] = "SynFoC"
    Settings: ClassVar[type[BaseSettings]] = SynFoCSettings
    settings: SynFoCSettings

    def __init__(self, student: nn.Module, settings: SynFoCSettings, context: Context) -> None:
        deployed = student if isinstance(student, ConventionalAndFoundation) else None
        super().__init__(student if deployed is None else deployed.conventional, settings, context)
        decay = settings.teacher_decay(settings.ema_decay)
        self.teacher = EMATeacher(self.student, decay)
        self.foundation: FoundationModel | None = None
        if settings.models != CONVENTIONAL:
            self.foundation = deployed.foundation if deployed is not None else build_foundation(
                settings, context.num_channels, context.num_heads, len(context.patch_size))
            self.foundation_teacher = EMATeacher(self.foundation, decay)

    def notes(self) -> list[str]:
        return [] if self.foundation is None else self.foundation.notes

    # networks

    @classmethod
    def build_student(cls, plans_manager: PlansManager, configuration_manager: ConfigurationManager,
                      num_input_channels: int, num_output_channels: int, deep_supervision: bool) -> nn.Module:
        conventional = super().build_student(plans_manager, configuration_manager, num_input_channels,
                                             num_output_channels, deep_supervision)
        semi = configuration_manager.configuration["semi"]
        settings = settings_from_plan(SynFoCSettings, semi, cls.name)
        if settings.deploy == CONVENTIONAL:
            return conventional
        return ConventionalAndFoundation(conventional,
                                         build_foundation(settings, num_input_channels, num_output_channels,
                                                          len(configuration_manager.patch_size)),
                                         settings.deploy, semi["regions"], settings.models == "both")

    @classmethod
    def completed(cls, settings: BaseSettings) -> BaseSettings:
        """With the absolute path and the digest of the foundation model's weights."""
        assert isinstance(settings, SynFoCSettings)
        if settings.models == CONVENTIONAL or settings.weights is None:
            return settings
        return settings.model_copy(update={"weights": absolute(settings.weights),
                                           "weights_sha256": checked_digest(settings)})

    @classmethod
    def check(cls, context: Context, settings: BaseSettings) -> list[str]:
        assert isinstance(settings, SynFoCSettings)
        models, deploy = settings.models, settings.deploy
        if models != "both" and deploy != models:
            raise UserError(f'Plans file, "semi": SynFoC with "models": "{models}" must have "deploy": "{models}", got '
                            f'"{deploy}".')
        if settings.smallest_box > settings.largest_box:
            raise UserError(f'Plans file, "semi": smallest_box of SynFoC, {settings.smallest_box:g}, is larger than '
                            f"largest_box, {settings.largest_box:g}.")
        if models == CONVENTIONAL:
            return []
        require_foundation(settings, len(context.patch_size))
        return ["The foundation model starts from random weights: it has nothing to teach yet."] \
            if settings.weights == RANDOM else []

    @classmethod
    def graphs(cls, settings: BaseSettings) -> int:
        assert isinstance(settings, SynFoCSettings)
        return 4 if settings.models == "both" else 2

    def optimizers(self, initial_lr: float, weight_decay: float, num_epochs: int) -> list[Optimization]:
        """nnU-Net's for the conventional network; AdamW with a warm-up, step by step, for the foundation model."""
        own = [self.sgd(self.student.parameters(), initial_lr, weight_decay, num_epochs)]
        if self.foundation is None:
            return own
        settings = self.settings
        trainable = [p for p in self.foundation.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(trainable, settings.foundation_lr, weight_decay=settings.foundation_weight_decay)
        schedule = WarmedUpPolyLR(adam, settings.foundation_lr, settings.warmup_steps,
                                  num_epochs * settings.num_iterations_per_epoch)
        return [*own, Optimization(adam, schedule, "step")]

    # loss

    def loss(self, batch: Batch) -> Iterator[list[Term]]:
        weight = self.unlabelled_weight(sigmoid_ramp_up(self.progress, self.settings.ramp_fraction,
                                                        self.settings.ramp_power))
        labelled, truth, known = labelled_partners(batch, self.context.regions, self.context.ignore_label)
        inside = self._boxes(labelled, batch.unlabelled)
        view = intensity_view(batch.unlabelled, self.settings, self.context.masked_channels)
        mixed = paste(inside, labelled, view)
        passes = {network: self.passes(network, batch.labelled, mixed) for network in self._students()}
        for network, outputs in passes.items():
            yield [self._labelled_term(network, next(outputs), batch.target)]

        labels, counted = self._pseudo_labels(batch.unlabelled)
        labels = paste(inside, truth.to(labels.dtype), labels)
        counted = paste(inside, known.expand_as(counted), counted)
        outputs_of = {network: next(outputs) for network, outputs in passes.items()}
        terms = [Term(f"pseudo_label{_suffix(network)}", self._hard_label_loss(network, output, labels, counted),
                      weight * self.settings.pseudo_weight) for network, output in outputs_of.items()]
        if len(outputs_of) == 2:
            conventional, foundation = (self._probabilities(network, output, mixed)
                                        for network, output in outputs_of.items())
            terms += self._mutual_terms(conventional, foundation, weight)
        yield terms

    def _students(self) -> list[nn.Module]:
        """The networks that train, the conventional one first."""
        return [*([self.student] if self.settings.models != FOUNDATION else []),
                *([self.foundation] if self.foundation is not None else [])]

    def _teachers(self) -> list[EMATeacher]:
        """Theirs."""
        return [*([self.teacher] if self.settings.models != FOUNDATION else []),
                *([self.foundation_teacher] if self.foundation is not None else [])]

    def _boxes(self, labelled: torch.Tensor, unlabelled: torch.Tensor) -> torch.Tensor:
        """Where unlabelled patches show a labelled one with the same channels: bool (B, 1, *spatial)."""
        boxes = Boxes.draw_areas(len(unlabelled), unlabelled.shape[2:], self.settings.smallest_box,
                                 self.settings.largest_box)
        return boxes.inside(unlabelled.device) & same_channels(labelled, unlabelled)

    def _labelled_term(self, network: nn.Module, output: Logits, target: Target) -> Term:
        if network is self.student:
            return self.supervised(output, target)
        labels, known = known_labels(all_scales(target)[0], self.context.regions, self.context.ignore_label)
        return Term("supervised_foundation", self._hard_label_loss(network, output, labels, known), supervised=True)

    def _hard_label_loss(self, network: nn.Module, output: Logits, labels: torch.Tensor,
                         counted: torch.Tensor) -> torch.Tensor:
        """nnU-Net's loss over the voxels that count; of the foundation model at one scale."""
        if isinstance(network, FoundationModel):
            output = full_resolution(output)
            if self.settings.foundation_loss == "patch":
                output = network.at_patch_grid(output, labels.shape[2:])
        return self.context.weighted_loss(output, labels, counted)

    def _probabilities(self, network: nn.Module, output: Logits, image: torch.Tensor) -> torch.Tensor:
        """(B, K, *spatial) at the grid of ``image``."""
        if isinstance(network, FoundationModel):
            output = network.at_patch_grid(full_resolution(output), image.shape[2:])
        return probabilities(output, self.context.regions)

    @torch.no_grad()
    def _pseudo_labels(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hard labels of the teachers, and where they count, bool, both as nnU-Net lays labels out."""
        teachers = {network: self._probabilities(network, teacher(image), image)
                    for network, teacher in zip(self._students(), self._teachers(), strict=True)}
        mean = self._ensemble(image, *teachers.values()) if len(teachers) == 2 else next(iter(teachers.values()))
        labels, confidence = hard_labels(mean, self.context.regions)
        counted = confidence >= self.settings.confidence
        self.metrics["unlabelled_voxels_used"] = counted.float().mean()
        return labels, counted

    def _ensemble(self, image: torch.Tensor, conventional: torch.Tensor, foundation: torch.Tensor) -> torch.Tensor:
        """alpha P_conventional + (1 - alpha) P_foundation, of the teachers' probabilities."""
        if self.settings.alpha is not None:
            return self.settings.alpha * conventional + (1 - self.settings.alpha) * foundation
        with self.without_graph():
            student = self._probabilities(self.student, self.student(image), image)
        alpha = self_mutual_confidence(student, conventional, foundation, self.context.regions)
        self.metrics["alpha"] = alpha.mean()
        self.note_agreement(conventional, student)
        share = alpha.view(-1, *[1] * (image.ndim - 1))
        return share * conventional + (1 - share) * foundation

    def _mutual_terms(self, conventional: torch.Tensor, foundation: torch.Tensor, weight: float) -> list[Term]:
        """CDCR, or a squared difference everywhere."""
        settings, regions = self.settings, self.context.regions
        self.metrics["models_agree"] = agreement(conventional.detach(), foundation.detach(), regions)
        terms = []
        if settings.consensus_weight > 0:
            terms.append(Term("consensus", consensus_loss(foundation, conventional, regions),
                              weight * settings.consensus_weight))
        if settings.divergence_weight > 0:
            difference = divergence_loss(foundation, conventional, regions) \
                if settings.divergence_where == "disagreement" else ((foundation - conventional) ** 2).mean()
            terms.append(Term("divergence", difference, weight * settings.divergence_weight))
        return terms

    def after_step(self) -> None:
        for teacher in self._teachers():
            teacher.update()

    # deployment and checkpoints

    def deployable(self) -> nn.Module:
        teacher = self.settings.deploy_weights == "teacher"
        conventional = self.teacher.network if teacher else self.student
        if self.settings.deploy == CONVENTIONAL:
            return conventional
        foundation = self.foundation_teacher.network if teacher else self.foundation
        assert isinstance(foundation, FoundationModel)
        return ConventionalAndFoundation(conventional, foundation, self.settings.deploy, self.context.regions,
                                         self.settings.models == "both")

    def get_extra_state(self) -> str | None:
        return self.settings.weights_sha256

    def set_extra_state(self, state: str | None) -> None:
        if state != self.settings.weights_sha256:
            raise UserError(f"The training began with other weights of the foundation model (SHA-256 {state}) than "
                            f"{self.settings.weights} has now ({self.settings.weights_sha256}). The checkpoint holds "
                            "what was trained, not the frozen part: give the same file to go on.")


def self_mutual_confidence(student: torch.Tensor, teacher: torch.Tensor, foundation: torch.Tensor,
                           regions: bool) -> torch.Tensor:
    """Self-mutual confidence (SMC) of each patch, (B,): how far the conventional model is to be trusted.

    The product of two Dice values of decisions: of the conventional student and its teacher (is it steady?), and of
    the teachers of both models (do they see the same?), see `decision_dice`.

    Args:
        student, teacher, foundation: probabilities (B, K, *spatial).
    """
    return decision_dice(student, teacher, regions) * decision_dice(teacher, foundation, regions)


def _suffix(network: nn.Module) -> str:
    return "_foundation" if isinstance(network, FoundationModel) else ""
