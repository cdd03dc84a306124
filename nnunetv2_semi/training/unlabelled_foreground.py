"""Where the network finds foreground in unlabelled cases, so that patches can be drawn there.

nnU-Net centres a third of the labelled patches on labelled foreground. Patches at random positions of a large volume
are nearly all background: without labels the network in training says where to look, anew at some points of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from nnunetv2_semi import compat
from nnunetv2_semi.data.loader import ForegroundVoxels
from nnunetv2_semi.distributed import shared_out
from nnunetv2_semi.losses.predictions import hard_foreground
from nnunetv2_semi.training import batches

if TYPE_CHECKING:
    from nnunetv2_semi.trainer import nnUNetTrainerSemi

_VOXELS_PER_LABEL = 200
# Points of training, as fractions, at which the network looks again.
_REFRESHED_AT = (0.1, 0.3, 0.6)
# So many windows at most are predicted at each point, as a share of the patches of the whole training.
_COST = 0.02


def is_due(epoch: int, num_epochs: int) -> bool:
    """Whether to look again before so many finished epochs are followed by the next."""
    return epoch > 0 and epoch in {math.ceil(num_epochs * point) for point in _REFRESHED_AT}


def cases_to_predict(shapes: Mapping[str, Sequence[int]], patch_size: Sequence[int], training_patches: int,
                     seed: int) -> list[str]:
    """As many cases as the cost allows, at least one, drawn by the seed.

    Args:
        shapes: spatial shape of each case, voxels.
        patch_size: voxels; of two axes, slices along the first axis of a case are predicted.
        training_patches: unlabelled patches of the whole training.
        seed: of the choice.
    """
    names, windows = sorted(shapes), 0
    chosen: list[str] = []
    for number in np.random.default_rng(seed).permutation(len(names)):
        shape = shapes[names[number]]
        whole = [*[1] * (len(shape) - len(patch_size)), *patch_size]
        windows += math.prod(math.ceil(size / side) for size, side in zip(shape, whole, strict=True))
        if chosen and windows > _COST * training_patches:
            break
        chosen.append(names[number])
    return chosen


def find_foreground(cases: Sequence[str], dataset: nnUNetBaseDataset, predict: Callable[[torch.Tensor], torch.Tensor],
                    regions: bool, seed: int) -> ForegroundVoxels:
    """Foreground voxels of each case, at most 200 of each label, drawn by the seed.

    Processes of one training share the cases; each gets what all have found.

    Args:
        cases: names.
        dataset: of the preprocessed cases.
        predict: image (C, *spatial) -> logits (K, *spatial), both float.
        regions: region-based labels.
        seed: of the choice of voxels.
    """
    def found(case: str) -> dict[int, np.ndarray]:
        image = torch.from_numpy(np.asarray(dataset.load_case(case)[0][:])).float()
        logits = predict(image).float()[None]
        generator, voxels = np.random.default_rng([seed, *case.encode()]), {}
        masks = hard_foreground(logits.sigmoid() if regions else logits, regions)[0]
        for label, mask in enumerate(masks.cpu().numpy()):
            inside = np.argwhere(mask)
            if len(inside):
                drawn = generator.choice(len(inside), min(len(inside), _VOXELS_PER_LABEL), replace=False)
                voxels[label] = np.pad(inside[drawn], ((0, 0), (1, 0)))
        return voxels
    return shared_out(cases, found)


def look_again(trainer: nnUNetTrainerSemi) -> None:
    """Where it is due, ask the deployed network anew, and draw patches where it finds foreground from now on."""
    settings = trainer.settings
    if not settings.unlabelled_foreground or not trainer.method_class.uses_unlabelled \
            or not is_due(trainer.current_epoch, trainer.num_epochs):
        return
    sources = trainer.dataloader_train.batches.loaders
    dataset = sources["unlabelled"]._data
    shapes = {case: dataset.load_case(case)[0].shape[1:] for case in dataset.identifiers}
    # Of all processes, which must choose the same cases: their own batches may differ in size.
    batch_size = settings.unlabelled_batch_size or trainer.configuration_manager.batch_size
    patches = trainer.num_epochs * trainer.num_iterations_per_epoch * batch_size
    seed = settings.seed + trainer.current_epoch
    cases = cases_to_predict(shapes, trainer.configuration_manager.patch_size, patches, seed)
    trainer.set_deep_supervision_enabled(False)
    trainer.method.eval()
    found = find_foreground(cases, dataset, compat.sliding_window(trainer, trainer.method.deployable()),
                            trainer.label_manager.has_regions, seed)
    trainer.set_deep_supervision_enabled(True)
    trainer.print_to_log_file(f"Unlabelled foreground: {len(cases)} of {len(shapes)} cases predicted, found in "
                              f"{sum(map(bool, found.values()))} of them.")
    trainer.foreground = {**trainer.foreground, **found}
    trainer.dataloader_train.close()
    sources["unlabelled"].foreground = trainer.foreground
    trainer.dataloader_train = batches.stream(trainer, settings, "training", sources, trainer.num_iterations_per_epoch)
