"""The fold's labelled training cases as wholes, not as patches of batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semi.data.case_channels import CaseChannels
from nnunetv2_semi.data.largest_component import always_connected
from nnunetv2_semi.methods.contract import WholeCase
from nnunetv2_semi.present_channels import fill_absent, present_modalities


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


def connected_classes(trainer: nnUNetTrainer) -> frozenset[tuple[int, int]]:
    """See ``Context.connected_classes``."""
    names = sorted(trainer.do_split()[0])
    dataset = infer_dataset_class(trainer.preprocessed_dataset_folder)(trainer.preprocessed_dataset_folder, names)
    labels, slices = trainer.label_manager, len(trainer.configuration_manager.patch_size) == 2
    if labels.has_regions:
        classes = {(channel, 1): region if isinstance(region, (tuple, list)) else (region,)
                   for channel, region in enumerate(labels.foreground_regions)}
    else:
        classes = {(0, label): (label,) for label in labels.foreground_labels}
    segmentations = (np.asarray(dataset.load_case(name)[1][:])[0] for name in names)
    return frozenset(always_connected(
        (single for whole in segmentations for single in (whole if slices else [whole])), classes, labels.ignore_label))
