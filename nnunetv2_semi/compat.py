"""Workarounds for what nnU-Net 2.8 and batchgeneratorsv2 do inside, and calls that their interfaces do not offer.

What extends a class of nnU-Net's depends on that version as well, in its own file: trainers (hooks, private attributes,
entries of checkpoints), logger, loader, preprocessor, planners, and networks made of nnU-Net's encoders and decoders.
`nnunetv2_semi.planning.whole_volumes` repeats numbers of nnU-Net's planner.

Of ours only `processes.pool` is imported, which needs nothing of this kind, so that every module may import this one;
what is slow to import is imported where it is needed, since worker processes import this module.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from unittest import mock

import torch
import torch.distributed as dist
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform
from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.utilities.ddp_allgather import AllGatherGrad
from torch import nn

from nnunetv2_semi.processes.pool import allowed_cores

if TYPE_CHECKING:
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

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


def use_one_blur(transform: BasicTransform | None) -> None:
    """Set blurring to one algorithm: it takes the one that was faster in a trial, and the two differ in last digits."""
    for part in _parts(transform):
        if isinstance(part, GaussianBlurTransform):
            part.benchmark = False


def restore_channel_order(transform: BasicTransform | None) -> None:
    """Undo what earlier batches did to a cascade's transforms, which shuffle their list of channels in place."""
    for part in _parts(transform):
        if isinstance(part, (ApplyRandomBinaryOperatorTransform,
                             RemoveRandomConnectedComponentFromOneHotEncodingTransform)):
            part.channel_idx.sort()


def add_empty_class_locations(properties_file: str) -> None:
    """nnU-Net's data loader reads this key of every case; without a label its preprocessor leaves it out."""
    with open(properties_file, "rb") as file:
        properties = pickle.load(file)
    properties["class_locations"] = {}
    with open(properties_file, "wb") as file:
        pickle.dump(properties, file)


def crossval_split(identifiers: list[str], num_folds: int) -> list[dict[str, list[str]]]:
    """nnU-Net's own seeded split, with another number of folds."""
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    return generate_crossval_split(sorted(identifiers), seed=12345, n_splits=num_folds)


def sliding_window(trainer: nnUNetTrainer, network: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """nnU-Net's sliding window, without overlap and mirroring: image (C, *spatial) -> logits (K, *spatial) on the CPU.

    The network is used as it is, compiled or not; its deep supervision must be off.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(tile_step_size=1.0, use_gaussian=False, use_mirroring=False,
                                perform_everything_on_device=False, device=trainer.device, allow_tqdm=False)
    with mock.patch.dict(os.environ, {"nnUNet_compile": "f"}):
        predictor.manual_initialization(network, trainer.plans_manager, trainer.configuration_manager, None,
                                        trainer.dataset_json, type(trainer).__name__, None)
    return torch.no_grad()(predictor.predict_sliding_window_return_logits)


def train_on_cpu_under_gloo(trainer: nnUNetTrainer) -> None:
    """nnU-Net takes it for granted that DDP means CUDA."""
    if trainer.is_ddp and dist.get_backend() == "gloo":
        trainer.device, trainer.grad_scaler = torch.device("cpu"), None


class _GatherOfSums:
    """nnU-Net's gathering of a Dice over several processes, of each one's sum over its patches."""

    @staticmethod
    def apply(sums: torch.Tensor) -> torch.Tensor:
        """``sums``: (patches, classes). Returns (processes, 1, classes), with a gradient."""
        return AllGatherGrad.apply(sums.sum(0, keepdim=True))


def let_processes_differ_in_patches() -> None:
    """nnU-Net's Dice of a batch gathers a row for each patch, which hangs or fails where processes have not equally
    many: with an unlabelled batch that does not divide evenly, or patches that lack a modality."""
    from nnunetv2.training.loss import dice

    dice.AllGatherGrad = _GatherOfSums


def no_more_threads_than_cores(device: torch.device) -> None:
    """On a processor nnU-Net's commands ask for as many threads as the machine has cores, however few are allowed.

    Allowed are the cores that this process may use, and OMP_NUM_THREADS where it is a number. Threads that share a core
    wait for each other: two on one core took 1.65 times as long as one.
    """
    if device.type != "cpu":
        return
    allowed = [torch.get_num_threads(), allowed_cores()]
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        allowed.append(int(asked))
    torch.set_num_threads(min(allowed))


def take_over_settings(trainer: nnUNetTrainer, settings: Settings) -> None:
    """Those of our settings that are attributes of nnU-Net's trainer."""
    for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every", "initial_lr"):
        setattr(trainer, name, getattr(settings, name))
    trainer.enable_deep_supervision = settings.deep_supervision


def _parts(transform: BasicTransform | None) -> Iterator[BasicTransform]:
    """The transform and all that it is composed of."""
    if transform is None:
        return
    yield transform
    for value in vars(transform).values():
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, BasicTransform):
                yield from _parts(part)
