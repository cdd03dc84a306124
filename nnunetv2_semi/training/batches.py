"""Where a trainer's batches come from: unlabelled cases, loaders, and streams of both kinds of patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunetv2_semi import compat
from nnunetv2_semi.data.labelled_checks import check_labelled_cases
from nnunetv2_semi.data.loader import BatchStream, ForegroundVoxels, SeededBatches, UnlabelledPatchLoader
from nnunetv2_semi.data.patch_channels import ModalityDrop
from nnunetv2_semi.data.preprocessing import UnlabelledCases, prepare_unlabelled
from nnunetv2_semi.methods.contract import Batch
from nnunetv2_semi.methods.settings import Settings
from nnunetv2_semi.present_channels import present_modalities
from nnunetv2_semi.processes.pool import default_processes


def check_labelled(trainer: nnUNetTrainer) -> None:
    """Refuse labelled cases that are not those of the raw data set, or no images or labels; see the function called."""
    check_labelled_cases(
        trainer.plans_manager, trainer.configuration_manager, trainer.dataset_json,
        num_processes=default_processes(), report=trainer.print_to_log_file)


def prepare(trainer: nnUNetTrainer, settings: Settings) -> UnlabelledCases:
    """The unlabelled cases, preprocessed where new or changed. Raises UserError for what is wrong with them."""
    cases = prepare_unlabelled(
        trainer.plans_manager, trainer.configuration_manager, trainer.dataset_json,
        num_processes=default_processes(), skip_unreadable=settings.skip_unreadable,
        report=trainer.print_to_log_file)
    trainer.print_to_log_file(f"{len(cases.identifiers)} unlabelled cases in {cases.folder}")
    return cases


def unlabelled_loader(trainer: nnUNetTrainer, settings: Settings, cases: UnlabelledCases, labelled: nnUNetDataLoader,
                      foreground: ForegroundVoxels) -> UnlabelledPatchLoader:
    """Draws unlabelled patches of the same sizes, with the same augmentation, as nnU-Net's ``labelled`` loader.

    foreground: where the network has found some, see `nnunetv2_semi.training.unlabelled_foreground`.
    """
    spatial = slice(1, None) if labelled.patch_size_was_2d else slice(None)
    dataset = infer_dataset_class(cases.folder)(cases.folder, list(cases.identifiers))
    return UnlabelledPatchLoader(
        dataset, unlabelled_batch_size(trainer, settings), labelled.patch_size[spatial],
        labelled.final_patch_size[spatial], trainer.label_manager, compat.training_transforms_without_target(trainer),
        mask_needed=any(trainer.configuration_manager.use_mask_for_norm), foreground=foreground,
        foreground_share=settings.unlabelled_foreground)


def unlabelled_batch_size(trainer: nnUNetTrainer, settings: Settings) -> int:
    """Unlabelled patches a step of this process, at least 1; with several GPUs the first ones take what is left over.
    """
    size = settings.unlabelled_batch_size
    if size is None:
        return int(trainer.batch_size)
    if not trainer.is_ddp:
        return size
    each, left_over = divmod(size, dist.get_world_size())
    return max(1, each + (dist.get_rank() < left_over))


def smallest_batch_sizes(trainer: nnUNetTrainer, settings: Settings) -> tuple[int, int]:
    """Labelled and unlabelled patches a step of the process that has the fewest."""
    processes = dist.get_world_size() if trainer.is_ddp else 1
    labelled = trainer.configuration_manager.batch_size
    unlabelled = settings.unlabelled_batch_size or labelled
    return max(1, labelled // processes), max(1, unlabelled // processes)


def stream(trainer: nnUNetTrainer, settings: Settings, name: str, sources: Mapping[str, nnUNetDataLoader],
           batches_per_epoch: int) -> BatchStream:
    """Batches of ``sources`` from the trainer's current epoch on, made by nnU-Net's number of worker processes.

    The validation stream gets half of them, as in nnU-Net.
    """
    workers = get_allowed_n_proc_DA()
    drop = None
    if name == "training" and settings.drop_modality > 0:
        drop = ModalityDrop(settings.drop_modality, list((settings.modalities or {}).values()))
    return BatchStream(
        SeededBatches(sources, seed=settings.seed, stream=name, rank=trainer.local_rank, drop=drop),
        start=trainer.current_epoch * batches_per_epoch,
        num_workers=workers if name == "training" else (workers + 1) // 2,
        pin_memory=trainer.device.type == "cuda")


def on_device(batch: dict, modalities: Mapping[str, Sequence[int]], device: torch.device) -> Batch:
    """A step's batch of a stream, on the training device."""
    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, non_blocking=True)
    target = batch["labelled"]["target"]
    labelled = move(batch["labelled"]["data"])
    present = {name: modalities_of(part, modalities) for name, part in batch.items()}
    return Batch(labelled, [move(t) for t in target] if isinstance(target, list) else move(target),
                 move(batch["unlabelled"]["data"]) if "unlabelled" in batch else labelled[:0],
                 present["labelled"], present.get("unlabelled"))


def modalities_of(batch: dict, modalities: Mapping[str, Sequence[int]]) -> torch.Tensor:
    """Which modalities the patches of a loader's batch have, bool (B, modalities); all where it does not say."""
    present = batch.get("present")
    if present is None:
        present = torch.ones(batch["data"].shape[:2], dtype=torch.bool)
    return present_modalities(present, modalities.values())
