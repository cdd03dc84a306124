"""The one class that touches nnU-Net's hooks: for unlabelled batches, further networks, and further loss terms."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import torch
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from tqdm import tqdm

from nnunetv2_semi import compat
from nnunetv2_semi.data.atomic_files import remove_unfinished
from nnunetv2_semi.data.case_channels import CaseChannels
from nnunetv2_semi.data.dataset_json import check_dataset_json, preprocessed_dataset_json
from nnunetv2_semi.data.dataset_settings import (
    checked_modalities,
    folder_name,
    modalities_or_channels,
    num_channels,
    read_dataset_settings,
)
from nnunetv2_semi.data.labelled_checks import check_preprocessed
from nnunetv2_semi.data.loader import BatchStream, ForegroundVoxels
from nnunetv2_semi.distributed import broadcast_from_first, mean_over_processes, on_first_process
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods.base import Method
from nnunetv2_semi.methods.optimization import Optimization
from nnunetv2_semi.methods.rows import Rows
from nnunetv2_semi.methods.settings import sections_of_others, settings_for_plan, settings_from_plan
from nnunetv2_semi.methods.supervised import Supervised
from nnunetv2_semi.networks.gradient_checkpointing import checkpoint_stages
from nnunetv2_semi.present_channels import present_modalities
from nnunetv2_semi.schedules import snapshot_after
from nnunetv2_semi.training import batches, checkpoints, pictures, splits, unlabelled_foreground
from nnunetv2_semi.training.context import build_context
from nnunetv2_semi.training.domains import cases_of_domains, print_dice_of_domains
from nnunetv2_semi.training.logs import EpochValues, SemiLocalLogger, log_values, to_floats, values_of_terms
from nnunetv2_semi.training.skipped_steps import refuse_mostly_skipped
from nnunetv2_semi.training.step import TrainingStep
from nnunetv2_semi.training.validation import COUNTS, Predicted, dice_by_name, rows_with_own_target, without_loss


class nnUNetTrainerSemi(nnUNetTrainer):
    """nnU-Net's trainer with a method (see ``nnunetv2_semi.methods.base``).

    A trainer that users name is a subclass that sets ``method_class`` and nothing else.
    """

    method_class: ClassVar[type[Method]] = Supervised

    method: Method
    step: TrainingStep
    configuration_manager: ConfigurationManager
    output_folder: str
    dataloader_train: BatchStream
    dataloader_val: BatchStream
    was_initialized: bool

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device("cuda")) -> None:  # noqa: B008
        check_dataset_json(dataset_json, preprocessed_dataset_json(plans["dataset_name"]))
        super().__init__(plans, configuration, fold, dataset_json, device)
        compat.train_on_cpu_under_gloo(self)
        if self.is_ddp:
            compat.let_processes_differ_in_patches()
        self.logger.local_logger = SemiLocalLogger(lambda: self.num_epochs)
        name = self.method_class.name
        asked = self.configuration_manager.configuration.get("semi", {})
        found = self.method_class.completed(settings_from_plan(self.method_class.Settings, asked, name))
        if found.modalities is not None:
            checked_modalities(found.modalities, num_channels(dataset_json), "the plans file")
        self.modalities = found.modalities or modalities_or_channels(dataset_json)
        self.domains = read_dataset_settings(dataset_json).domains
        self.settings = found.model_copy(update={"modalities": self.modalities,
                                                 "regions": self.label_manager.has_regions})
        # What a network depends on travels in the plans, and with them how the model was made.
        self.semi = settings_for_plan(self.settings, name)
        plans["configurations"][configuration]["semi"] = self.semi
        self.plans_manager = PlansManager(plans)
        self.configuration_manager = self.plans_manager.get_configuration(configuration)
        self.logger.update_config({"semi": {"method": name, **self.semi}})
        if others := sections_of_others(self.method_class.Settings, asked, name):
            self.print_to_log_file(f'Not used by {name}: the settings in {", ".join(others)} of "semi".')

        compat.take_over_settings(self, self.settings)
        compat.no_more_threads_than_cores(self.device)

        self.optimizations: list[Optimization] = []
        self._epoch_values = EpochValues()
        self._steps_in_epoch = 0
        self._restored = False
        self._trained_here = False
        self._validation_cases: list[str] | None = None
        self._bar: tqdm | None = None
        self.foreground: ForegroundVoxels = {}

    # networks and optimisers

    @classmethod
    def build_network_architecture(cls, plans_manager: PlansManager, configuration_manager: ConfigurationManager,
                                   num_input_channels: int, num_output_channels: int,
                                   enable_deep_supervision: bool = True) -> nn.Module:
        """The method's deployed architecture; nnU-Net's predictor calls this."""
        return cls.method_class.build_student(plans_manager, configuration_manager, num_input_channels,
                                              num_output_channels, enable_deep_supervision)

    def initialize(self) -> None:
        """Build the method with its networks, the optimisers and nnU-Net's loss; weights depend on the seed alone."""
        if self.was_initialized:
            raise RuntimeError("initialize() was called twice")
        check_preprocessed(self.plans_manager, self.configuration_manager)
        self._set_batch_size_and_oversample()
        self.loss = self._build_loss()
        self.num_input_channels = determine_num_input_channels(self.plans_manager, self.configuration_manager,
                                                               self.dataset_json)
        context = build_context(self)
        lone = self.settings.of_lone_patches(*batches.smallest_batch_sizes(self, self.settings),
                                             len(context.patch_size))
        for warning in [*self.method_class.check(context, self.settings), *lone]:
            self.print_to_log_file(f"WARNING: {warning}")

        torch.manual_seed(self.settings.seed)
        student = self.build_network_architecture(self.plans_manager, self.configuration_manager,
                                                  self.num_input_channels, context.num_heads,
                                                  self.enable_deep_supervision)
        if self.enable_deep_supervision and not any(hasattr(m, "deep_supervision") for m in student.modules()):
            raise UserError(f"The network of {self.method_class.name} has no deep supervision. Set "
                            '"deep_supervision": false in the "semi" object of the configuration in the plans file.')
        if self.is_ddp and self.device.type == "cuda":
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
        self.method = self.method_class(student, self.settings, context).to(self.device)
        broadcast_from_first(self.method)
        if self.settings.gradient_checkpointing:
            checkpoint_stages(self.method)
        self.network = self.method.student
        if self._do_i_compile():
            self.print_to_log_file("Using torch.compile...")
            for network in self.method.called_networks():
                network.compile()
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        self.step = TrainingStep(self.method, self.optimizations, self.grad_scaler, self.device, rank=self.local_rank,
                                 seed=self.settings.seed, max_skipped_steps=self.settings.max_skipped_steps)
        self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        self.was_initialized = True
        for note in self.method.notes():
            self.print_to_log_file(note)
        self.print_to_log_file(f"Method {self.method.name}, forward passes "
                               f"{'all at once' if context.arrangement.one_pass else 'one after another'}, "
                               f"settings: {self.semi}", add_timestamp=False)

    def configure_optimizers(self) -> tuple:
        """The method's optimisers and schedules; the first pair is the one nnU-Net knows of."""
        self.optimizations = self.method.optimizers(self.initial_lr, self.weight_decay, self.num_epochs)
        return self.optimizations[0].optimizer, self.optimizations[0].schedule

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switch it in all networks of the method; never on where the settings have it off."""
        for module in self.method.modules():
            if hasattr(module, "deep_supervision"):
                setattr(module, "deep_supervision", enabled and self.enable_deep_supervision)  # noqa: B010

    # data

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:
        """nnU-Net's, with mirroring and rotation as the settings say."""
        rotation, dummy_2d, initial_patch_size, mirror_axes = \
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if self.settings.rotation is not None:
            largest = float(np.deg2rad(self.settings.rotation))
            rotation = (-largest, largest)
            needed = get_patch_size(self.configuration_manager.patch_size, *[rotation] * 3, (0.85, 1.25))
            turned = slice(1 if dummy_2d else 0, None)
            initial_patch_size[turned] = np.maximum(initial_patch_size[turned], needed[turned])
        if not self.settings.mirroring:
            mirror_axes = self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, mirror_axes

    def get_dataloaders(self) -> tuple[BatchStream, BatchStream]:
        """Streams of seeded batches: labelled and unlabelled patches together, and validation patches."""
        unlabelled = None
        on_first_process(lambda: batches.check_labelled(self))
        on_first_process(lambda: splits.prepare_split(self))  # before what may take hours
        splits.name_cases_left_out(self)
        if self.method_class.uses_unlabelled:
            unlabelled = on_first_process(lambda: batches.prepare(self, self.settings))
        training, validation = compat.plain_dataloaders(super().get_dataloaders)
        sources = {"labelled": training}
        if unlabelled is not None:
            sources["unlabelled"] = batches.unlabelled_loader(self, self.settings, unlabelled, training,
                                                                    self.foreground)
        return (
            batches.stream(self, self.settings, "training", sources, self.num_iterations_per_epoch),
            batches.stream(self, self.settings, "validation", {"labelled": validation},
                                 self.num_val_iterations_per_epoch))

    # training

    def run_training(self) -> None:
        """nnU-Net's loop; the loaders' processes end with it, however it ends."""
        self._trained_here = True
        try:
            super().run_training()
        finally:
            for stream in (self.dataloader_train, self.dataloader_val):
                if isinstance(stream, BatchStream):
                    stream.close()
            self._close_bar()

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        if not self._restored:
            self.method.on_start()
        if self.local_rank == 0:
            remove_unfinished(self.output_folder, "checkpoint_")
            if not self._restored:
                pictures.remove_earlier(self.output_folder)
        super().on_train_start()

    def on_train_epoch_start(self) -> None:
        unlabelled_foreground.look_again(self)
        self.method.train()
        super().on_train_epoch_start()
        for optimization in self.optimizations[1:]:
            if optimization.scheduled_every == "epoch":
                optimization.schedule.step(self.current_epoch)
        self._epoch_values, self._steps_in_epoch = EpochValues(), 0
        self._bar = tqdm(total=self.num_iterations_per_epoch, desc=f"epoch {self.current_epoch}", leave=False,
                         disable=None if self.local_rank == 0 else True)

    def train_step(self, batch: dict) -> dict:
        """One step on ``batch``: {"labelled": nnU-Net's batch, "unlabelled": {"data": (B_u, C, *spatial)}}."""
        step = self.current_epoch * self.num_iterations_per_epoch + self._steps_in_epoch
        terms, values = self.step.run(batches.on_device(batch, self.modalities, self.device), step,
                                      step / (self.num_epochs * self.num_iterations_per_epoch))
        self._steps_in_epoch += 1
        floats = to_floats({**values, **values_of_terms(terms)})
        self._epoch_values.add(floats)
        if self._bar is not None:
            self._bar.update()
        supervised = [floats[f"loss_{term.name}"] for term in terms if term.applies and term.supervised]
        return {"loss": float(np.mean(supervised)) if supervised else None}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        self._close_bar()
        # A step whose labelled patches all lack the modality has no loss. nnU-Net needs as many from each process.
        losses = [single["loss"] for single in train_outputs]
        mean = float(np.mean([loss for loss in losses if loss is not None] or [np.nan]))
        super().on_train_epoch_end([{"loss": mean if loss is None else loss} for loss in losses])
        self.method.after_epoch()
        means = mean_over_processes(self._epoch_values.means())
        means["skipped_steps"] *= self.num_iterations_per_epoch
        log_values(self, means)
        refuse_mostly_skipped(self)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_epoch_end(self) -> None:
        number = snapshot_after(self.current_epoch + 1, self.num_epochs, self.settings.snapshots)
        if number is not None:
            self.save_checkpoint(os.path.join(self.output_folder, checkpoints.snapshot_file(number)))
        super().on_epoch_end()

    # validation

    @contextmanager
    def _validating(self, network: nn.Module, cases: list[str] | None = None) -> Iterator[None]:
        """Within the block nnU-Net's hooks see ``network`` instead of the student, and only ``cases`` to validate."""
        self.network, self._validation_cases = network, cases
        try:
            yield
        finally:
            self.network, self._validation_cases = self.method.student, None

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's split into cases for training and validation; of fewer than five cases it has fewer folds."""
        on_first_process(lambda: splits.prepare_split(self))
        training, validation = super().do_split()
        return training, validation if self._validation_cases is None else self._validation_cases

    def on_validation_epoch_start(self) -> None:
        self.method.eval()

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's validation step with the deployed network, with each part by itself, and of each domain."""
        outputs = {}
        present = batches.modalities_of(batch["labelled"], self.modalities)
        labelled = {**batch["labelled"], "data": batch["labelled"]["data"].to(self.device, non_blocking=True)}
        with self.step.autocast():
            deployed, parts = self.method.predictions(labelled["data"])
        chosen = {name: (logits, self.method.part_applies(name, present)) for name, logits in parts.items()}
        chosen.update({f"domain_{name}": (deployed, own)
                       for name, own in cases_of_domains(self.domains, labelled["keys"]).items()})
        for name, (logits, applies) in chosen.items():
            rows = Rows.where(applies)
            with self._validating(Predicted(rows.of(logits))), without_loss(self):
                counts = super().validation_step(rows_with_own_target(labelled, rows))
            outputs.update({f"{count}/{name}": counts[count] * (not rows.empty) for count in COUNTS})
        with self._validating(Predicted(deployed)):
            return {**super().validation_step(labelled), **outputs}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        super().on_validation_epoch_end(val_outputs)
        log_values(self, dice_by_name(val_outputs, self.device))
        pictures.draw_when_due(self)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's validation, of each part by itself into ``<fold>/<part>/validation``, then of the deployed one."""
        if self._trained_here and not self.settings.final_validation:
            self.print_to_log_file('No validation after training, as "final_validation" says.')
            return
        parts = self.method.parts()
        cases = self.do_split()[1] if parts else []
        channels = CaseChannels(self.dataset_class(self.preprocessed_dataset_folder))
        present = present_modalities(channels.present(cases, self.num_input_channels), self.modalities.values())
        for name, part in parts.items():
            own = [case for case, has in zip(cases, self.method.part_applies(name, present), strict=True) if has]
            if not own:
                self.print_to_log_file(f"No validation of {name} alone: no validation case has that modality.")
                continue
            self.print_to_log_file(f"Validation of {name} alone:")
            whole, self.output_folder = self.output_folder, os.path.join(self.output_folder, folder_name(name))
            try:
                with self._validating(part, own):
                    super().perform_actual_validation()
            finally:
                self.output_folder = whole
        if parts:
            self.print_to_log_file("Validation of the deployed network:")
        with self._validating(self.method.deployable()):
            super().perform_actual_validation(save_probabilities)
        print_dice_of_domains(self, self.domains)

    # checkpoints

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint with the deployed network's weights, plus what continues the training, written whole."""
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        checkpoints.save_whole(checkpoints.contents(self), filename)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Restore everything that ``save_checkpoint`` wrote. Raises UserError for another trainer's checkpoint."""
        if not self.was_initialized:
            self.initialize()
        path = filename_or_checkpoint if isinstance(filename_or_checkpoint, str) else "The checkpoint"
        checkpoint = filename_or_checkpoint if isinstance(filename_or_checkpoint, dict) else \
            torch.load(filename_or_checkpoint, map_location=self.device, weights_only=False)
        checkpoints.restore(self, checkpoint, path)
        self._restored = True
