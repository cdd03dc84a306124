"""Where the network finds foreground in unlabelled cases, so that patches can be drawn there.

nnU-Net centres a third of the labelled patches on labelled foreground. Patches at random positions of a large volume
are nearly all background: without labels the network in training says where to look, anew at some points of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from nnunetv2_semi.distributed import shared_out
from nnunetv2_semi.losses.predictions import hard_foreground

# Per case, per foreground label or region (numbered from 0): voxels as nnU-Net stores them, rows (0, z, y, x).
ForegroundVoxels = dict[str, dict[int, np.ndarray]]

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
