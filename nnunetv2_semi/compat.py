"""Whatever depends on how nnU-Net 2.8 is written inside."""

from __future__ import annotations

import os
from collections.abc import Callable
from unittest import mock

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.crossval_split import generate_crossval_split
from torch import nn

from nnunetv2_semi.methods.settings import Settings


def plain_dataloaders(get_dataloaders: Callable[[], tuple]) -> tuple[nnUNetDataLoader, nnUNetDataLoader]:
    """nnU-Net's training and validation loaders without the augmenters that draw from them unseeded.

    With no worker processes nnU-Net wraps its loaders in an object that keeps them as ``data_loader``.
    """
    with mock.patch.dict(os.environ, {"nnUNet_n_proc_DA": "0"}):
        training, validation = get_dataloaders()
    return training.data_loader, validation.data_loader


def training_transforms_without_target(trainer: nnUNetTrainer) -> Callable:
    """nnU-Net's own training augmentation for images whose only "segmentation" is the outside mask."""
    rotation, dummy_2d, _, mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    return trainer.get_training_transforms(
        trainer.configuration_manager.patch_size, rotation, None, mirror_axes, dummy_2d,
        use_mask_for_norm=trainer.configuration_manager.use_mask_for_norm, is_cascaded=False,
        foreground_labels=trainer.label_manager.foreground_labels, regions=None, ignore_label=None)


def crossval_split(identifiers: list[str], num_folds: int) -> list[dict[str, list[str]]]:
    """nnU-Net's own seeded split, with another number of folds."""
    return generate_crossval_split(sorted(identifiers), seed=12345, n_splits=num_folds)


def sliding_window(trainer: nnUNetTrainer, network: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """nnU-Net's sliding window, without overlap and mirroring: image (C, *spatial) -> logits (K, *spatial) on the CPU.

    The network is used as it is, compiled or not; its deep supervision must be off.
    """
    predictor = nnUNetPredictor(tile_step_size=1.0, use_gaussian=False, use_mirroring=False,
                                perform_everything_on_device=False, device=trainer.device, allow_tqdm=False)
    with mock.patch.dict(os.environ, {"nnUNet_compile": "f"}):
        predictor.manual_initialization(network, trainer.plans_manager, trainer.configuration_manager, None,
                                        trainer.dataset_json, type(trainer).__name__, None)
    return torch.no_grad()(predictor.predict_sliding_window_return_logits)


def no_more_threads_than_cores(device: torch.device) -> None:
    """On a processor nnU-Net's commands ask for as many threads as the machine has cores, however few are allowed.

    Threads that share a core wait for each other: two on one core took 1.65 times as long as one.
    """
    if device.type == "cpu" and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(min(torch.get_num_threads(), len(os.sched_getaffinity(0))))


def take_over_settings(trainer: nnUNetTrainer, settings: Settings) -> None:
    """Those of our settings that are attributes of nnU-Net's trainer."""
    for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every", "initial_lr"):
        setattr(trainer, name, getattr(settings, name))
    trainer.enable_deep_supervision = settings.deep_supervision
