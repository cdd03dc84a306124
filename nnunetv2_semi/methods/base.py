"""What a method is: the questions it answers for the trainer, and the parts that methods share.

A method is one small class in one file. It is an ``nn.Module`` that holds the student and whatever networks it needs
besides; what it holds goes to the training device and into the checkpoint.

1. which networks: ``build_student`` (class method) makes the student, ``__init__`` the rest; ``optimizers``
2. the loss: ``loss`` yields named terms
3. after an optimiser step: ``after_step``
4. what a checkpoint carries: ``state_dict`` of the module; what is deployed: ``deployable``
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.losses.hard_labels import voxel_cross_entropy
from nnunetv2_semi.losses.predictions import Logits, agreement, all_scales, full_resolution
from nnunetv2_semi.methods.arrangement import Images
from nnunetv2_semi.methods.contract import Batch, Context, Target, Term
from nnunetv2_semi.methods.optimization import Optimization
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.networks.deployment import Deployed
from nnunetv2_semi.schedules import sigmoid_ramp_up
from nnunetv2_semi.teachers import Teacher


class Method(nn.Module):
    """Base of all methods; by itself the supervised control.

    name: of the method's section in the plans file's ``"semi"``. uses_unlabelled: whether unlabelled batches are
    loaded. progress: fraction of the training's steps done, set by the trainer before each step. metrics: filled by
    ``loss`` with detached scalars to log; emptied by the trainer before each step.
    """

    name: ClassVar[str] = "Supervised"
    Settings: ClassVar[type[BaseSettings]] = BaseSettings
    uses_unlabelled: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.name[:1].isupper():
            raise TypeError(f"{cls.__name__}.name must begin with a capital letter, got {cls.name!r}: that tells a "
                            "method's section in the plans file from a setting")

    def __init__(self, student: nn.Module, settings: BaseSettings, context: Context) -> None:
        super().__init__()
        self.student = student
        self.settings = settings
        self.context = context
        self.progress = 0.0
        self.metrics: dict[str, torch.Tensor] = {}

    # 1. networks

    @classmethod
    def build_student(cls, plans_manager: PlansManager, configuration_manager: ConfigurationManager,
                      num_input_channels: int, num_output_channels: int, deep_supervision: bool) -> nn.Module:
        """The network to train. nnU-Net's predictor calls this too: it may depend on the plans alone."""
        return nnUNetTrainer.build_network_architecture(plans_manager, configuration_manager, num_input_channels,
                                                        num_output_channels, deep_supervision)

    @classmethod
    def build_for_each_modality(cls, plans_manager: PlansManager, configuration_manager: ConfigurationManager,
                                num_output_channels: int, deep_supervision: bool) -> dict[str, nn.Module]:
        """nnU-Net's network for the channels of each modality alone, by name, in the order of the plans."""
        modalities: dict[str, list[int]] = configuration_manager.configuration["semi"]["modalities"]
        return {name: Method.build_student(plans_manager, configuration_manager, len(channels), num_output_channels,
                                           deep_supervision) for name, channels in modalities.items()}

    @classmethod
    def graphs(cls, settings: BaseSettings) -> int:
        """How many forward passes a step holds in memory at once where they are joined; plain nnU-Net holds 1."""
        return 2 if cls.uses_unlabelled else 1

    @classmethod
    def check(cls, context: Context, settings: BaseSettings) -> list[str]:
        """Raise UserError where the data set or the settings cannot work with this method, before anything is built.

        Returns warnings for the log, of what can work but hardly will.
        """
        return []

    @classmethod
    def completed(cls, settings: BaseSettings) -> BaseSettings:
        """``settings`` with what the plans file shall say besides, such as the SHA-256 of a file that they name.

        Called before anything is built. Raises UserError where they cannot be completed.
        """
        return settings

    def optimizers(self, initial_lr: float, weight_decay: float, num_epochs: int) -> list[Optimization]:
        """The optimisers. Default: nnU-Net's for all that trains.

        The first is the one that nnU-Net logs, saves as its own and schedules by epochs.
        """
        return [self.sgd(self.parameters(), initial_lr, weight_decay, num_epochs)]

    def sgd(self, parameters: Iterable[nn.Parameter], initial_lr: float, weight_decay: float,
            num_epochs: int) -> Optimization:
        """nnU-Net's optimiser and schedule, with the settings' momentum, for those of ``parameters`` that train."""
        return Optimization.sgd(parameters, initial_lr, weight_decay, self.settings.momentum, num_epochs)

    def called_networks(self) -> list[nn.Module]:
        """The networks that ``loss`` and prediction call: these are compiled, in place."""
        own = [child for child in self.children() if not any(isinstance(m, Teacher) for m in child.modules())]
        return [*own, *(module.network for module in self.modules() if isinstance(module, Teacher))]

    def notes(self) -> list[str]:
        """What the log shall say of the networks as they were built."""
        return []

    def on_start(self) -> None:
        """Before the first step of a new training, after pretrained weights were loaded: teachers take them over."""
        for module in self.modules():
            if isinstance(module, Teacher):
                module.reset()

    # 2. loss

    def loss(self, batch: Batch) -> Iterator[list[Term]]:
        """Yield the step's terms in groups.

        Run one after another, each group is differentiated and what its passes hold in memory freed before the next
        group is asked for; so ask for the passes of a group (``passes``) only after the group before was yielded.
        """
        passes = self.passes(self.student, batch.labelled)
        yield [self.supervised(next(passes), batch.target)]

    def supervised(self, output: Logits, target: Target, name: str = "supervised", weight: float = 1.0,
                   patches: int | None = None) -> Term:
        """nnU-Net's own loss as a term, of so many patches; of 0 a Dice over several processes counts no voxel."""
        value = self._of_no_voxel(output) if patches == 0 else self.context.supervised_loss(output, target)
        return Term(name, value, weight, supervised=True, patches=patches)

    def _of_no_voxel(self, output: Logits) -> torch.Tensor:
        """nnU-Net's loss of no voxel, which exchanges sums with other processes as often as that of all voxels."""
        finest = all_scales(output)[0]
        nothing = finest.new_zeros((len(finest), finest.shape[1] if self.context.regions else 1, *finest.shape[2:]))
        return self.context.weighted_loss(output, nothing, nothing)

    def pseudo_label_loss(self, output: Logits, labels: torch.Tensor, counted: torch.Tensor, kind: str) -> torch.Tensor:
        """Loss of ``output`` to hard labels, each with the weight in ``counted``, both in the layout of targets.

        kind: ``"dice_ce"``, nnU-Net's Dice and cross-entropy at all outputs over the voxels that count; ``"ce"``,
        cross-entropy of the full-resolution output, mean over all voxels.
        """
        if kind == "dice_ce":
            return self.context.weighted_loss(output, labels, counted)
        labels = torch.where(counted > 0, labels, 0)  # the ignore label is no class
        return (voxel_cross_entropy(full_resolution(output), labels, self.context.regions) * counted).mean()

    def unlabelled_weight(self, weight: float, ramp_fraction: float = 0.0) -> float:
        """``weight`` times the common unlabelled weight, ramped up over the first ``ramp_fraction`` of training."""
        return weight * self.settings.unlabelled_weight * sigmoid_ramp_up(self.progress, ramp_fraction)

    def passes(self, network: Callable[[torch.Tensor], Any], *images: Images, together: bool = False,
               alone: int = 0) -> Iterator[Any]:
        """What the network gives for each of ``images``, see `Arrangement.passes`."""
        return self.context.arrangement.passes(network, *images, together=together, alone=alone)

    @staticmethod
    @contextmanager
    def without_graph() -> Iterator[None]:
        """Within it passes of a network that trains build no graph; such a pass may come before one that does."""
        with torch.no_grad():
            yield
        # Older versions of torch would use half-precision weights made without a graph for passes with one.
        torch.clear_autocast_cache()

    def note_agreement(self, teacher: torch.Tensor, student: torch.Tensor) -> None:
        """Log the share of unlabelled voxels at which teacher and student probabilities decide the same."""
        self.metrics["teacher_student_agreement"] = agreement(teacher, student.detach(), self.context.regions)

    # 3. after a step

    def after_step(self) -> None:
        """After the optimisers' step: teachers, memory banks."""

    def after_epoch(self) -> None:
        """After an epoch's last step."""

    # 4. deployment

    def deployable(self) -> nn.Module:
        """The network that is validated, saved as ``network_weights`` and predicted with."""
        return self.student

    def parts(self) -> dict[str, nn.Module]:
        """Networks validated by themselves besides ``deployable``, by name; each takes the whole image."""
        deployed = self.deployable()
        return deployed.parts() if isinstance(deployed, Deployed) else {}

    def part_applies(self, name: str, present: torch.Tensor) -> torch.Tensor:
        """Which images can be predicted by the part ``name`` alone: bool (B,), of ``present``, bool (B, modalities)."""
        deployed = self.deployable()
        return deployed.part_applies(name, present) if isinstance(deployed, Deployed) \
            else torch.ones(len(present), dtype=torch.bool)

    def predictions(self, image: torch.Tensor) -> tuple[Logits, dict[str, Logits]]:
        """What the deployed network, and what each part, makes of ``image`` (B, C, *spatial).

        For validation in each epoch and pictures.
        """
        deployed = self.deployable()
        if isinstance(deployed, Deployed):
            return deployed.with_parts(image)
        return deployed(image), {name: part(image) for name, part in self.parts().items()}

    def picture(self, image: torch.Tensor) -> tuple[dict[str, Logits], dict[str, torch.Tensor]]:
        """What to show of a patch (1, C, *spatial) in pictures.png: name -> logits, and name -> map (1, *spatial).

        Called without gradients, in evaluation mode.
        """
        deployed, parts = self.predictions(image)
        return {"prediction": deployed, **parts}, {}


def require_modalities(context: Context, need: str, example: str) -> None:
    """Raise UserError, saying what the method's ``need`` is, where the data set has fewer than two modalities.

    example: of how dataset.json names them.
    """
    names = list(context.modalities)
    if len(names) < 2:
        raise UserError(f"{need}; this data set has only {names}. Name them in dataset.json: "
                        f'"semi": {{"modalities": {example}}}. With one modality use nnUNetTrainerSemiMix.')
