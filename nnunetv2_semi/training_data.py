"""Where a trainer's batches come from: splits, unlabelled cases, and streams of both kinds of patches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.configuration import default_num_processes
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import nn

from nnunetv2_semi import compat
from nnunetv2_semi.data.largest_component import number_of_components
from nnunetv2_semi.data.loader import BatchStream, SeededBatches, UnlabelledPatchLoader
from nnunetv2_semi.data.modalities import CaseChannels, ModalityDrop
from nnunetv2_semi.data.preprocessing import UnlabelledCases, prepare_unlabelled
from nnunetv2_semi.data.whole_files import write_json_whole
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods.base import WholeCase
from nnunetv2_semi.methods.settings import Settings
from nnunetv2_semi.present_channels import fill_absent, present_modalities
from nnunetv2_semi.unlabelled_foreground import ForegroundVoxels, cases_to_predict, find_foreground

NNUNET_FOLDS = 5


def write_small_split(trainer: nnUNetTrainer) -> None:
    """With fewer than five labelled cases nnU-Net's five folds cannot be made: make as many as there are cases.

    Does nothing where a split exists or fold is "all". Raises UserError for a fold that the cases do not make.
    """
    path = os.path.join(trainer.preprocessed_dataset_folder_base, "splits_final.json")
    if trainer.fold == "all" or os.path.isfile(path):
        return
    folder = trainer.preprocessed_dataset_folder
    cases = infer_dataset_class(folder).get_identifiers(folder)
    if len(cases) >= NNUNET_FOLDS:
        return
    if len(cases) < 2 or trainer.fold >= len(cases):
        raise UserError(f"{len(cases)} labelled cases make {max(len(cases), 1)} fold(s), so there is no fold "
                        f"{trainer.fold}. Train with fold 'all', or write your own splits to {path}.")
    trainer.print_to_log_file(f"Only {len(cases)} labelled cases: writing a split with {len(cases)} folds to {path}.")
    write_json_whole(path, compat.crossval_split(cases, len(cases)))


def prepare(trainer: nnUNetTrainer, settings: Settings) -> UnlabelledCases:
    """The unlabelled cases, preprocessed where new or changed. Raises UserError for what is wrong with them."""
    cases = prepare_unlabelled(
        trainer.plans_manager, trainer.configuration_manager, trainer.dataset_json, num_processes=default_num_processes,
        skip_unreadable=settings.skip_unreadable, report=trainer.print_to_log_file)
    trainer.print_to_log_file(f"{len(cases.identifiers)} unlabelled cases in {cases.folder}")
    return cases


def unlabelled_loader(trainer: nnUNetTrainer, settings: Settings, cases: UnlabelledCases, labelled: nnUNetDataLoader,
                      foreground: ForegroundVoxels) -> UnlabelledPatchLoader:
    """Draws unlabelled patches of the same sizes, with the same augmentation, as nnU-Net's ``labelled`` loader.

    foreground: where the network has found some, see `nnunetv2_semi.unlabelled_foreground`.
    """
    size = settings.unlabelled_batch_size
    if size is None:
        size = trainer.batch_size
    elif trainer.is_ddp:
        size = max(1, size // dist.get_world_size())
    spatial = slice(1, None) if labelled.patch_size_was_2d else slice(None)
    dataset = infer_dataset_class(cases.folder)(cases.folder, list(cases.identifiers))
    return UnlabelledPatchLoader(
        dataset, size, labelled.patch_size[spatial], labelled.final_patch_size[spatial], trainer.label_manager,
        compat.training_transforms_without_target(trainer),
        mask_needed=any(trainer.configuration_manager.use_mask_for_norm), foreground=foreground,
        foreground_share=settings.unlabelled_foreground)


def predicted_foreground(trainer: nnUNetTrainer, settings: Settings, loader: UnlabelledPatchLoader,
                         network: nn.Module) -> ForegroundVoxels:
    """Where ``network`` finds foreground in some of the unlabelled cases; of the others what was known before."""
    dataset = loader._data
    shapes = {case: dataset.load_case(case)[0].shape[1:] for case in dataset.identifiers}
    patches = trainer.num_epochs * trainer.num_iterations_per_epoch * trainer.batch_size
    seed = settings.seed + trainer.current_epoch
    cases = cases_to_predict(shapes, trainer.configuration_manager.patch_size, patches, seed)
    found = find_foreground(cases, dataset, compat.sliding_window(trainer, network),
                            trainer.label_manager.has_regions, seed)
    known = {**loader.foreground, **found}
    trainer.print_to_log_file(f"Unlabelled foreground: {len(cases)} of {len(shapes)} cases predicted, found in "
                              f"{sum(bool(found[case]) for case in cases)} of them.")
    return {case: dict(voxels) for case, voxels in known.items()}


def whole_training_cases(trainer: nnUNetTrainer, modalities: Mapping[str, Sequence[int]]) -> Iterator[WholeCase]:
    """The labelled training cases of the fold, see `WholeCase`; of a 3D case in 2D the slice with most foreground."""
    names = sorted(trainer.do_split()[0])
    dataset = infer_dataset_class(trainer.preprocessed_dataset_folder)(trainer.preprocessed_dataset_folder, names)
    labels = trainer.label_manager
    transforms = trainer.get_validation_transforms(
        None, foreground_labels=labels.foreground_labels, regions=labels.foreground_regions if labels.has_regions
        else None, ignore_label=labels.ignore_label)
    channels, patch = CaseChannels(dataset), trainer.configuration_manager.patch_size
    for name in names:
        image, segmentation = (np.asarray(array[:]) for array in dataset.load_case(name)[:2])
        if len(patch) == 2:
            foreground = (segmentation > 0) & (segmentation != labels.ignore_label)
            fullest = int(foreground.sum((0, 2, 3)).argmax())
            image, segmentation = image[:, fullest], segmentation[:, fullest]
        box = [[(size - wanted) // 2, (size - wanted) // 2 + wanted]
               for size, wanted in zip(image.shape[1:], patch, strict=True)]
        sample = transforms(image=torch.from_numpy(crop_and_pad_nd(image, box, 0)).float(),
                            segmentation=torch.from_numpy(crop_and_pad_nd(segmentation, box, -1)).to(torch.int16))
        present = channels.present([name], len(image))
        own = present_modalities(present, modalities.values())[0].nonzero()[:, 0].tolist()
        yield WholeCase(name, fill_absent(sample["image"], present[0]), sample["segmentation"], own)


def single_components(trainer: nnUNetTrainer) -> bool:
    """See ``Context.single_components``."""
    names = sorted(trainer.do_split()[0])
    dataset = infer_dataset_class(trainer.preprocessed_dataset_folder)(trainer.preprocessed_dataset_folder, names)
    labels, slices = trainer.label_manager, len(trainer.configuration_manager.patch_size) == 2
    classes = [region if isinstance(region, (tuple, list)) else (region,) for region in
               (labels.foreground_regions if labels.has_regions else labels.foreground_labels)]
    for name in names:
        segmentation = np.asarray(dataset.load_case(name)[1][:])[0]
        for single in segmentation if slices else [segmentation]:
            if any(number_of_components(np.isin(single, members)) > 1 for members in classes):
                return False
    return True


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
