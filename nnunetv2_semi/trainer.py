"""The one class that touches nnU-Net's hooks: for unlabelled batches, further networks, and further loss terms."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from tqdm import tqdm

from nnunetv2_semi import checkpoints, compat, training_data, training_pictures
from nnunetv2_semi.data.dataset_settings import folder_name, modalities_or_channels
from nnunetv2_semi.data.loader import BatchStream
from nnunetv2_semi.data.modalities import CaseChannels
from nnunetv2_semi.distributed import (
    broadcast_from_first,
    mean_over_processes,
    on_first_process,
    rows_of_all_processes,
    sum_over_processes,
)
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.logs import PREFIX, EpochValues, SemiLocalLogger, to_floats
from nnunetv2_semi.losses.predictions import Logits, dice_from_counts
from nnunetv2_semi.losses.weighted_dice_ce import WeightedDiceCE
from nnunetv2_semi.methods.base import Batch, Context, Method
from nnunetv2_semi.methods.rows import Rows
from nnunetv2_semi.methods.settings import settings_for_plan, settings_from_plan
from nnunetv2_semi.methods.supervised import Supervised
from nnunetv2_semi.networks.stage_checkpoints import checkpoint_stages
from nnunetv2_semi.present_channels import present_modalities
from nnunetv2_semi.schedules import snapshot_after
from nnunetv2_semi.step import TrainingStep
from nnunetv2_semi.unlabelled_foreground import ForegroundVoxels, is_due

_COUNTS = ("tp_hard", "fp_hard", "fn_hard")  # what nnU-Net's validation step returns


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
    was_initialized: bool

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device("cuda")) -> None:  # noqa: B008
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_ddp and dist.get_backend() == "gloo":  # nnU-Net takes it for granted that DDP means CUDA
            self.device, self.grad_scaler = torch.device("cpu"), None
        self.logger.local_logger = SemiLocalLogger()
        name = self.method_class.name
        found = settings_from_plan(self.method_class.Settings, self.configuration_manager.configuration.get("semi", {}),
                                   name)
        self.modalities = found.modalities or modalities_or_channels(dataset_json)
        self.settings = replace(found, modalities=self.modalities, regions=self.label_manager.has_regions)
        # What a network depends on travels in the plans, and with them how the model was made.
        self.semi = settings_for_plan(self.settings, name)
        plans["configurations"][configuration]["semi"] = self.semi
        self.plans_manager = PlansManager(plans)
        self.configuration_manager = self.plans_manager.get_configuration(configuration)
        self.logger.update_config({"semi": {"method": name, **self.semi}})

        compat.take_over_settings(self, self.settings)

        self.schedules: list = []
        self._epoch_values = EpochValues()
        self._steps_in_epoch = 0
        self._restored = False
        self._trained_here = False
        self._validation_cases: list[str] | None = None
        self._bar: tqdm | None = None
        self._foreground: ForegroundVoxels = {}

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
        self._refuse_cascade()
        self._set_batch_size_and_oversample()
        self.loss = self._build_loss()
        one_pass = self._one_pass()
        num_heads = self.label_manager.num_segmentation_heads
        scale_weights = tuple(float(weight) for weight in getattr(self.loss, "weight_factors", (1.0,)))
        context = Context(
            supervised_loss=lambda output, target: self.loss(output, target),
            weighted_loss=WeightedDiceCE(self.label_manager.has_regions, scale_weights,
                                         self.configuration_manager.batch_dice, self.is_ddp),
            regions=self.label_manager.has_regions, ignore_label=self.label_manager.ignore_label,
            spacing=tuple(self.configuration_manager.spacing), modalities=self.modalities,
            one_pass=one_pass, images_per_pass=self._images_per_pass(), sum_over_processes=sum_over_processes,
            rows_of_all_processes=rows_of_all_processes,
            scale_weights=scale_weights,
            patch_size=tuple(self.configuration_manager.patch_size), image_size=self._image_size(), num_heads=num_heads,
            build_network=lambda channels: nnUNetTrainer.build_network_architecture(
                self.plans_manager, self.configuration_manager, channels, num_heads, self.enable_deep_supervision),
            training_cases=lambda: training_data.whole_training_cases(self, self.modalities),
            mirror_axes=tuple(self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] or ()),
            single_components=lambda: training_data.single_components(self))
        for warning in self.method_class.check(context, self.settings):
            self.print_to_log_file(f"WARNING: {warning}")

        torch.manual_seed(self.settings.seed)
        self.num_input_channels = determine_num_input_channels(self.plans_manager, self.configuration_manager,
                                                               self.dataset_json)
        student = self.build_network_architecture(self.plans_manager, self.configuration_manager,
                                                  self.num_input_channels, num_heads, self.enable_deep_supervision)
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
        self.step = TrainingStep(self.method, self.schedules, self.grad_scaler, self.device, seed=self.settings.seed,
                                 rank=self.local_rank, max_skipped_steps=self.settings.max_skipped_steps)
        self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        self.was_initialized = True
        self.print_to_log_file(f"Method {self.method.name}, passes {'joined' if one_pass else 'one after another'}, "
                               f"settings: {self.semi}", add_timestamp=False)

    def configure_optimizers(self) -> tuple:
        """The method's optimisers and schedules; the first pair is the one nnU-Net knows of."""
        self.schedules = self.method.optimizers(self.initial_lr, self.weight_decay, self.num_epochs)
        return self.schedules[0]

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switch it in all networks of the method; never on where the settings have it off."""
        for module in self.method.modules():
            if hasattr(module, "deep_supervision"):
                setattr(module, "deep_supervision", enabled and self.enable_deep_supervision)  # noqa: B010

    def _image_size(self) -> tuple[float, ...]:
        """See ``Context.image_size``."""
        plan = self.configuration_manager.configuration
        size = [float(axis) for axis in plan.get("median_image_size_in_voxels", plan["patch_size"])]
        whole = [float(axis) for axis in self.plans_manager.original_median_shape_after_transp]
        return tuple(size if len(size) == len(whole) or whole[0] == 1 else [whole[0], *size])

    def _one_pass(self) -> bool:
        if self.settings.arrangement == "auto":
            return self.method_class.graphs(self.settings) <= self.settings.planned_graphs
        return self.settings.arrangement == "one_pass"

    def _images_per_pass(self) -> int:
        return self.settings.planned_graphs if self.settings.arrangement == "auto" else 1

    def _refuse_cascade(self) -> None:
        if self.is_cascaded and self.method_class.uses_unlabelled:
            raise NotImplementedError(
                f"{self.configuration_name} is the second stage of a cascade: it takes the first stage's predictions "
                "as input, and unlabelled cases have none. Train 3d_fullres or 2d with this trainer, or the cascade "
                "with nnUNetTrainerSemiSupervised.")

    # data

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:
        """nnU-Net's, with mirroring and rotation as the settings say."""
        rotation, dummy_2d, initial_patch_size, mirror_axes = \
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if self.settings.rotation is not None:
            largest = float(np.deg2rad(self.settings.rotation))
            rotation = (-largest, largest)
        if not self.settings.mirroring:
            mirror_axes = self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, mirror_axes

    def get_dataloaders(self) -> tuple[BatchStream, BatchStream]:
        """Streams of seeded batches: labelled and unlabelled patches together, and validation patches."""
        unlabelled = None
        if self.method_class.uses_unlabelled:
            unlabelled = on_first_process(lambda: training_data.prepare(self, self.settings))
        training, validation = compat.plain_dataloaders(super().get_dataloaders)
        sources = {"labelled": training}
        if unlabelled is not None:
            sources["unlabelled"] = training_data.unlabelled_loader(self, self.settings, unlabelled, training,
                                                                    self._foreground)
        return (
            training_data.stream(self, self.settings, "training", sources, self.num_iterations_per_epoch),
            training_data.stream(self, self.settings, "validation", {"labelled": validation},
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
        super().on_train_start()

    def on_train_epoch_start(self) -> None:
        self._look_for_foreground()
        self.method.train()
        super().on_train_epoch_start()
        for _, schedule in self.schedules[1:]:
            schedule.step(self.current_epoch)
        self._epoch_values, self._steps_in_epoch = EpochValues(), 0
        self._bar = tqdm(total=self.num_iterations_per_epoch, desc=f"epoch {self.current_epoch}", leave=False,
                         disable=None if self.local_rank == 0 else True)

    def _look_for_foreground(self) -> None:
        """Ask the deployed network anew where unlabelled cases have foreground; patches are drawn there from now on."""
        if not self.settings.unlabelled_foreground or not self.method_class.uses_unlabelled \
                or not is_due(self.current_epoch, self.num_epochs):
            return
        sources = self.dataloader_train.batches.loaders
        self.set_deep_supervision_enabled(False)
        self.method.eval()
        self._foreground = training_data.predicted_foreground(self, self.settings, sources["unlabelled"],
                                                              self.method.deployable())
        self.set_deep_supervision_enabled(True)
        self.dataloader_train.close()
        sources["unlabelled"].foreground = self._foreground
        self.dataloader_train = training_data.stream(self, self.settings, "training", sources,
                                                     self.num_iterations_per_epoch)

    def train_step(self, batch: dict) -> dict:
        """One step on ``batch``: {"labelled": nnU-Net's batch, "unlabelled": {"data": (B_u, C, *spatial)}}."""
        step = self.current_epoch * self.num_iterations_per_epoch + self._steps_in_epoch
        terms, values = self.step.run(self._on_device(batch), step,
                                      step / (self.num_epochs * self.num_iterations_per_epoch))
        self._steps_in_epoch += 1
        terms = [term for term in terms if term.applies]
        for term in terms:
            values[f"loss_{term.name}"] = term.value
            if not term.supervised:
                values[f"weight_{term.name}"] = term.weight
        floats = to_floats(values)
        self._epoch_values.add(floats)
        if self._bar is not None:
            self._bar.update()
        return {"loss": float(np.mean([floats[f"loss_{term.name}"] for term in terms if term.supervised] or [np.nan]))}

    def _on_device(self, batch: dict) -> Batch:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self.device, non_blocking=True)
        target = batch["labelled"]["target"]
        labelled = move(batch["labelled"]["data"])
        present = {name: self._present_modalities(part) for name, part in batch.items()}
        return Batch(labelled, [move(t) for t in target] if isinstance(target, list) else move(target),
                     move(batch["unlabelled"]["data"]) if "unlabelled" in batch else labelled[:0],
                     present["labelled"], present.get("unlabelled"))

    def _present_modalities(self, batch: dict) -> torch.Tensor:
        """Bool (B, modalities); all where a batch does not say."""
        present = batch.get("present")
        if present is None:
            present = torch.ones(batch["data"].shape[:2], dtype=torch.bool)
        return present_modalities(present, self.modalities.values())

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        self._close_bar()
        super().on_train_epoch_end(train_outputs)
        self.method.after_epoch()
        means = mean_over_processes(self._epoch_values.means())
        means["skipped_steps"] *= self.num_iterations_per_epoch
        self._log(means)

    def _log(self, values: dict[str, float]) -> None:
        """Into the training log and nnU-Net's loggers, one value per epoch each."""
        for name, value in values.items():
            self.logger.log(PREFIX + name, value, self.current_epoch)
            if not name.startswith("weight_"):
                weight = values.get(name.replace("loss_", "weight_"), None) if name.startswith("loss_") else None
                shown = f"{value:.4f}" if weight is None else f"{value:.4f} (weight {weight:.4f})"
                self.print_to_log_file(f"{name.removeprefix('loss_')} {shown}")

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
        on_first_process(lambda: training_data.write_small_split(self))
        training, validation = super().do_split()
        return training, validation if self._validation_cases is None else self._validation_cases

    def on_validation_epoch_start(self) -> None:
        self.method.eval()

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's validation step with the deployed network, and with each part by itself."""
        outputs = {}
        present = self._present_modalities(batch["labelled"])
        labelled = {**batch["labelled"], "data": batch["labelled"]["data"].to(self.device, non_blocking=True)}
        with self.step.autocast():
            deployed, parts = self.method.predictions(labelled["data"])
        for name, logits in parts.items():
            rows = Rows.where(self.method.part_applies(name, present))
            with self._validating(_Predicted(rows.of(logits))):
                counts = super().validation_step(_rows_with_own_target(labelled, rows))
            outputs.update({f"{count}/{name}": counts[count] * (not rows.empty) for count in _COUNTS})
        with self._validating(_Predicted(deployed)):
            return {**super().validation_step(labelled), **outputs}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        super().on_validation_epoch_end(val_outputs)
        dice = {}
        for name in self.method.parts():
            counts = np.stack([np.sum([o[f"{count}/{name}"] for o in val_outputs], 0) for count in _COUNTS])
            summed = sum_over_processes(torch.from_numpy(counts.astype(np.float32)).to(self.device))
            dice[f"validation_dice_{name}"] = float(dice_from_counts(summed))
        self._log(dice)
        self._draw_picture()

    def _draw_picture(self) -> None:
        count = self.settings.pictures
        if self.local_rank == 0 and training_pictures.is_shown(self.current_epoch, self.num_epochs, count):
            torch.manual_seed(self.settings.seed)  # every step seeds anew
            batch = self.dataloader_val.batches[0]["labelled"]  # the same one each time
            training_pictures.draw(self.method, batch, self.label_manager, self.device,
                                   self.configuration_manager.spacing, self.current_epoch, self.output_folder)

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

    # checkpoints

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint with the deployed network's weights, plus what continues the training, written whole."""
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        checkpoints.save_whole({
            "network_weights": self.method.deployable().state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            "trainer_name": self.__class__.__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            checkpoints.KEY: checkpoints.our_part(
                self.method.state_dict(), self.method.name, self.semi,
                [{"optimizer": o.state_dict(), "schedule": s.state_dict()} for o, s in self.schedules[1:]],
                self._foreground),
        }, filename)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Restore everything that ``save_checkpoint`` wrote. Raises UserError for another trainer's checkpoint."""
        if not self.was_initialized:
            self.initialize()
        path = filename_or_checkpoint if isinstance(filename_or_checkpoint, str) else "The checkpoint"
        checkpoint = filename_or_checkpoint if isinstance(filename_or_checkpoint, dict) else \
            torch.load(filename_or_checkpoint, map_location=self.device, weights_only=False)
        ours = checkpoints.read_our_part(checkpoint, self.method.name, path)
        for change in checkpoints.changed_settings(ours["semi"], self.semi):
            self.print_to_log_file(f"WARNING: the checkpoint was made with another setting, {change}")
        self.my_init_kwargs = checkpoint["init_args"]
        self.current_epoch = checkpoint["current_epoch"]
        self.logger.load_checkpoint(checkpoint["logging"])
        self._best_ema = checkpoint["_best_ema"]
        self.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
        self.method.load_state_dict(ours["method_state"])
        self._foreground = ours.get("unlabelled_foreground", {})
        self.optimizer.load_state_dict(checkpoint["optimizer_state"])
        for (optimizer, schedule), state in zip(self.schedules[1:], ours["optimizer_states"], strict=True):
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        self._restored = True


class _Predicted(nn.Module):
    """Gives logits that were predicted before."""

    def __init__(self, logits: Logits) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, image: torch.Tensor) -> Logits:
        return self.logits


def _rows_with_own_target(batch: dict, rows: Rows) -> dict:
    """Some patches; nnU-Net's validation step writes into the target where there is an ignore label, so they get one of
    their own."""
    target = rows.of(batch["target"])
    return {"data": rows.of(batch["data"]),
            "target": [t.clone() for t in target] if isinstance(target, list) else target.clone()}
