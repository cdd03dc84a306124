"""nnU-Net's own trainer with the length, learning rate and seed of a study: the reference that is not ours."""

from __future__ import annotations

import random

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nnunetv2_semi import compat
from nnunetv2_semi.data.atomic_files import remove_unfinished, whole_file
from nnunetv2_semi.data.dataset_json import check_dataset_json, preprocessed_dataset_json
from nnunetv2_semi.data.labelled_checks import check_preprocessed
from nnunetv2_semi.distributed import on_first_process
from nnunetv2_semi.methods.settings import Settings, sections_of_others, settings_from_plan
from nnunetv2_semi.training import batches, splits

# Of the "semi" object.
USED = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every", "initial_lr",
        "momentum", "deep_supervision", "seed", "final_validation")


class nnUNetTrainerSemiStock(nnUNetTrainer):
    """nnU-Net's loader, augmentation, loss and step. Of the ``"semi"`` object it takes what `USED` names.

    Its worker processes draw patches unseeded, so a seed decides the initial weights alone.
    """

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device("cuda")) -> None:  # noqa: B008
        check_dataset_json(dataset_json, preprocessed_dataset_json(plans["dataset_name"]))
        super().__init__(plans, configuration, fold, dataset_json, device)
        asked = self.configuration_manager.configuration.get("semi", {})
        self.settings = settings_from_plan(Settings, asked, "Stock")
        defaults = Settings(planned_graphs=self.settings.planned_graphs)  # the planner's
        if unused := [*(name for name, value in self.settings if name not in USED and value != getattr(defaults, name)),
                      *sections_of_others(Settings, asked, "Stock")]:
            self.print_to_log_file(f'Not used by Stock: {", ".join(unused)} of "semi".')
        compat.take_over_settings(self, self.settings)
        compat.no_more_threads_than_cores(self.device)
        self._trained_here = False

    def initialize(self) -> None:
        check_preprocessed(self.plans_manager, self.configuration_manager)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(self.settings.seed % 2**32)  # numpy takes no larger one
        super().initialize()

    def configure_optimizers(self) -> tuple[Optimizer, LRScheduler]:
        optimizer, schedule = super().configure_optimizers()
        for group in optimizer.param_groups:
            group["momentum"] = self.settings.momentum
            group["nesterov"] = self.settings.momentum > 0
        return optimizer, schedule

    def do_split(self) -> tuple[list[str], list[str]]:
        splits.prepare_split(self)
        return super().do_split()

    def on_train_start(self) -> None:
        on_first_process(lambda: batches.check_labelled(self))
        if self.local_rank == 0:
            remove_unfinished(self.output_folder, "checkpoint_")
        super().on_train_start()

    def run_training(self) -> None:
        self._trained_here = True
        super().run_training()

    def save_checkpoint(self, filename: str) -> None:
        if self.local_rank == 0 and not self.disable_checkpointing:
            with whole_file(filename) as unfinished:
                super().save_checkpoint(unfinished)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        if self.settings.final_validation or not self._trained_here:
            super().perform_actual_validation(save_probabilities)
