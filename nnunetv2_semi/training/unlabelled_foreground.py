"""Where the network finds foreground in unlabelled cases, so that patches can be drawn there.

nnU-Net centres a third of the labelled patches on labelled foreground. Patches at random positions of a large volume
are nearly all background: without labels the network in training says where to look, anew at some points of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

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


class Window(NamedTuple):
    """A part of a case, as large as a patch where the case is. lower, upper: its voxels along each axis."""

    case: str
    lower: tuple[int, ...]
    upper: tuple[int, ...]


def windows_to_predict(shapes: Mapping[str, Sequence[int]], patch_size: Sequence[int], training_patches: int,
                       seed: int) -> list[Window]:
    """As many windows as the cost allows, at least one, drawn by the seed from those that cover all cases.

    Args:
        shapes: spatial shape of each case, voxels.
        patch_size: voxels; of two axes, windows are in slices along the first axis of a case.
        training_patches: unlabelled patches of the whole training.
        seed: of the choice.
    """
    names = sorted(shapes)
    sides = {name: [*[1] * (len(shapes[name]) - len(patch_size)), *patch_size] for name in names}
    grids = [[math.ceil(size / side) for size, side in zip(shapes[name], sides[name], strict=True)] for name in names]
    ends = np.cumsum([math.prod(grid) for grid in grids])
    allowed = max(int(_COST * training_patches), 1)
    chosen = np.random.default_rng(seed).choice(ends[-1], min(allowed, ends[-1]), replace=False)
    windows = []
    for number in sorted(chosen):
        of = int(np.searchsorted(ends, number, side="right"))
        place = np.unravel_index(ends[of] - 1 - number, grids[of])  # counted from the case's last window
        extents = list(zip(place, grids[of], shapes[names[of]], sides[names[of]], strict=True))
        lower = tuple(round(step * (size - side) / max(count - 1, 1)) for step, count, size, side in extents)
        upper = tuple(min(first + side, size) for first, (_, _, size, side) in zip(lower, extents, strict=True))
        windows.append(Window(names[of], lower, upper))
    return windows


def find_foreground(windows: Sequence[Window], dataset: nnUNetBaseDataset,
                    predict: Callable[[torch.Tensor], torch.Tensor], regions: bool, seed: int) -> ForegroundVoxels:
    """Foreground voxels of each case in the windows, at most 200 of each label, drawn by the seed.

    Processes of one training share the windows; each gets what all have found.

    Args:
        windows: parts of cases.
        dataset: of the preprocessed cases.
        predict: image (C, *spatial) -> logits (K, *spatial), both float.
        regions: region-based labels.
        seed: of the choice of voxels.
    """
    def drawn(voxels: np.ndarray, *entropy: int) -> np.ndarray:
        number = min(len(voxels), _VOXELS_PER_LABEL)
        return np.random.default_rng([seed, *entropy]).choice(voxels, number, replace=False)

    def found(window: Window) -> dict[int, np.ndarray]:
        inside = tuple(slice(*ends) for ends in zip(window.lower, window.upper, strict=True))
        image = dataset.load_case(window.case)[0][(slice(None), *inside)]
        logits = predict(torch.from_numpy(np.asarray(image)).float()).float()[None]
        masks = hard_foreground(logits.sigmoid() if regions else logits, regions)[0].cpu().numpy()
        return {label: drawn(np.argwhere(mask) + window.lower, *window.case.encode(), *window.lower)
                for label, mask in enumerate(masks) if mask.any()}
    voxels: dict[str, dict[int, list[np.ndarray]]] = {}
    for window, labels in shared_out(windows, found).items():
        own = voxels.setdefault(window.case, {})
        for label, rows in labels.items():
            own.setdefault(label, []).append(rows)
    return {case: {label: np.pad(drawn(np.concatenate(parts), *case.encode()), ((0, 0), (1, 0)))
                   for label, parts in own.items()} for case, own in voxels.items()}


def brought_up_to_date(known: ForegroundVoxels, windows: Sequence[Window], found: ForegroundVoxels) -> ForegroundVoxels:
    """``known`` without its voxels inside ``windows``, and with those that were ``found`` there."""
    result = dict(known)
    for case, new in found.items():
        own = [window for window in windows if window.case == case]
        labels = {label: [rows[~_inside(rows, own)]] for label, rows in known.get(case, {}).items()}
        for label, rows in new.items():
            labels.setdefault(label, []).append(rows)
        joined = {label: np.concatenate(parts) for label, parts in labels.items()}
        result[case] = {label: rows for label, rows in joined.items() if len(rows)}
    return {case: voxels for case, voxels in result.items() if voxels}


def _inside(rows: np.ndarray, windows: Sequence[Window]) -> np.ndarray:
    """Whether each of ``rows`` (0, z, y, x) lies in one of ``windows``."""
    inside = np.zeros(len(rows), dtype=bool)
    for window in windows:
        inside |= ((rows[:, 1:] >= window.lower) & (rows[:, 1:] < window.upper)).all(1)
    return inside


def look_again(trainer: nnUNetTrainerSemi) -> None:
    """Where it is due, ask the deployed network anew, and draw patches where it finds foreground from now on."""
    settings = trainer.settings
    if not settings.unlabelled_foreground or not trainer.method_class.uses_unlabelled \
            or not is_due(trainer.current_epoch, trainer.num_epochs):
        return
    sources = trainer.dataloader_train.batches.loaders
    dataset = sources["unlabelled"]._data
    shapes = {case: dataset.load_case(case)[0].shape[1:] for case in dataset.identifiers}
    # Of all processes, which must choose the same windows: their own batches may differ in size.
    batch_size = settings.unlabelled_batch_size or trainer.configuration_manager.batch_size
    patches = trainer.num_epochs * trainer.num_iterations_per_epoch * batch_size
    seed = settings.seed + trainer.current_epoch
    windows = windows_to_predict(shapes, trainer.configuration_manager.patch_size, patches, seed)
    trainer.set_deep_supervision_enabled(False)
    trainer.method.eval()
    found = find_foreground(windows, dataset, compat.sliding_window(trainer, trainer.method.deployable()),
                            trainer.label_manager.has_regions, seed)
    trainer.set_deep_supervision_enabled(True)
    trainer.foreground = brought_up_to_date(trainer.foreground, windows, found)
    trainer.print_to_log_file(f"Unlabelled foreground: {len(windows)} windows of {len(found)} cases predicted; known "
                              f"in {len(trainer.foreground)} of {len(shapes)} cases.")
    trainer.dataloader_train.close()
    sources["unlabelled"].foreground = trainer.foreground
    trainer.dataloader_train = batches.stream(trainer, settings, "training", sources, trainer.num_iterations_per_epoch)
