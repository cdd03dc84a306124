"""Batches of patches: from unlabelled cases, repeatable, and made by processes that always end."""

from __future__ import annotations

import inspect
import random
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader, Dataset

from nnunetv2_semi import compat
from nnunetv2_semi.data.case_channels import CaseChannels
from nnunetv2_semi.data.patch_channels import ModalityDrop, mark_present
from nnunetv2_semi.processes.pool import exit_with_parent

LoadedBatch = dict[str, object]
# Per case, per foreground label or region (numbered from 0): voxels as nnU-Net stores them, rows (0, z, y, x).
ForegroundVoxels = dict[str, dict[int, np.ndarray]]
_WAIT = -1  # in place of an index
_SECONDS_TO_WAIT = 0.05
_AS_SOON_AS_READY: dict = {"in_order": False} if "in_order" in inspect.signature(DataLoader).parameters else {}


class UnlabelledPatchLoader(nnUNetDataLoader):
    """nnU-Net's loader for cases without labels: patches at random positions, no target.

    Args:
        data: cases are opened when a patch of them is drawn, not before.
        batch_size: patches per batch.
        initial_patch_size: voxels, before augmentation; 2 entries take slices of 3D cases.
        patch_size: voxels, after augmentation.
        label_manager: of the data set.
        transforms: nnU-Net's training transforms; None for none.
        mask_needed: give the transforms the mask of the non-zero region (-1 outside) as segmentation.
        foreground: of some cases, voxels that a network takes for foreground, by label, as rows (0, z, y, x).
        foreground_share: of the patches, on average, that are of a case with such voxels and centred on one, as nnU-Net
            centres some of the labelled patches; while no case has any, all are at random positions.
    """

    def __init__(
        self,
        data: nnUNetBaseDataset,
        batch_size: int,
        initial_patch_size: Sequence[int],
        patch_size: Sequence[int],
        label_manager: LabelManager,
        transforms: BasicTransform | None,
        mask_needed: bool,
        foreground: ForegroundVoxels | None = None,
        foreground_share: float = 0.0,
    ) -> None:
        super().__init__(data, batch_size, tuple(initial_patch_size), tuple(patch_size), label_manager)
        self.transforms = transforms
        self.mask_needed = mask_needed
        self.foreground = foreground or {}
        self.foreground_share = foreground_share
        # with an ignore label nnU-Net draws from annotated voxels only; here there are none
        self.has_ignore = False

    def generate_train_batch(self) -> LoadedBatch:
        """Return {"data": float32 (B, C, *spatial), "keys": names of the B cases}."""
        keys = [str(key) for key in self.get_indices()]
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            on_foreground = self._number_on_foreground(len(keys))
            known = [case for case in self._data.identifiers if self.foreground.get(case)] if on_foreground else []
            if known:  # the last ones, as nnU-Net's
                keys[-on_foreground:] = map(str, np.random.choice(known, on_foreground))
            patches = [self._patch(key, number >= len(keys) - on_foreground) for number, key in enumerate(keys)]
            return {"data": torch.stack(patches), "keys": keys}

    def _number_on_foreground(self, batch_size: int) -> int:
        """The share of the batch, rounded up or down at random so that it holds on average, for one patch too."""
        if self.foreground_share == 0:
            return 0
        return int(batch_size * self.foreground_share + np.random.uniform())

    def _patch(self, key: str, on_foreground: bool) -> torch.Tensor:
        image, mask, _, _ = self._data.load_case(key)
        voxels = self.foreground.get(key, {}) if on_foreground else {}
        lower, upper = self.get_bbox(image.shape[1:], bool(voxels), voxels)
        box = [list(bounds) for bounds in zip(lower, upper, strict=True)]
        sample = {"image": torch.from_numpy(crop_and_pad_nd(image, box, 0)).float()}
        if self.mask_needed:
            outside_value = -1
            mask_patch = crop_and_pad_nd(mask, box, outside_value, cast_cropped_to=np.int16)
            sample["segmentation"] = torch.from_numpy(mask_patch).to(torch.int16)
        if self.patch_size_was_2d:
            sample = {name: tensor[:, 0] for name, tensor in sample.items()}
        if self.transforms is not None:
            sample = self.transforms(**sample)
        return sample["image"].float()


class SeededBatches(Dataset):
    """Item i is {name: batch of that loader}, a function of (seed, stream, rank, name, i) and nothing else.

    Neither the number of workers nor a restart nor the other loaders change a batch, so that two trainers with one seed
    see the same labelled batches. The caller's random states (Python, numpy, torch on the CPU) are left as they were.
    A batch says which channels its patches have, see `mark_present`.

    Args:
        loaders: nnU-Net loaders by name. Their transforms are changed, see `compat.use_one_blur`.
        seed: of the run, 0 or greater.
        stream: name that keeps apart uses within a run ("training", "validation").
        rank: of the process under DDP, 0 or greater.
        drop: augmentation that takes modalities away.
    """

    def __init__(self, loaders: Mapping[str, nnUNetDataLoader], seed: int, stream: str = "", rank: int = 0,
                 drop: ModalityDrop | None = None) -> None:
        self.loaders = dict(loaders)
        self.drop = drop
        self._cases = {name: CaseChannels(loader._data) for name, loader in self.loaders.items()}
        self.seed = seed
        self.stream = stream
        self.rank = rank
        for loader in self.loaders.values():
            compat.use_one_blur(loader.transforms)

    def __getitem__(self, index: int) -> dict[str, LoadedBatch]:
        batches: dict[str, LoadedBatch] = {}
        for name, loader in self.loaders.items():
            compat.restore_channel_order(loader.transforms)
            entropy = (self.seed, zlib.crc32(self.stream.encode()), self.rank, zlib.crc32(name.encode()), index)
            with _seeded(np.random.SeedSequence(entropy)):
                batches[name] = loader.generate_train_batch()
                mark_present(batches[name], self._cases[name], self.drop)
        return batches


class _Numbered(Dataset):
    """Items with their index, for those that arrive in another order; nothing for `_WAIT`, after a while."""

    def __init__(self, batches: SeededBatches) -> None:
        self.batches = batches

    def __getitem__(self, index: int) -> tuple[int, dict[str, LoadedBatch]]:
        if index == _WAIT:
            time.sleep(_SECONDS_TO_WAIT)
            return index, {}
        return index, self.batches[index]


class _Indices:
    """Indices of items to make, at most ``ahead`` from the one that is next to be used; beyond these `_WAIT`."""

    def __init__(self, start: int, stop: int, ahead: int) -> None:
        self.next_used = start
        self._made, self._stop, self._ahead = start, stop, ahead

    def __iter__(self) -> Iterator[int]:
        while self._made < self._stop:
            if self._made >= self.next_used + self._ahead:
                yield _WAIT
            else:
                self._made += 1
                yield self._made - 1


class BatchStream(Iterator[dict[str, LoadedBatch]]):
    """The items of `SeededBatches` in order, made ahead by worker processes.

    A worker that is done takes the next item even while an earlier one, slow to make, is waited for; items that are
    ready too early are kept until it is their turn, twice as many as are made ahead: then workers wait, so that neither
    memory nor file handles run out. (With torch before 2.6 workers take items in turn, and wait.)

    Workers end on `close`, when the stream is garbage, when the interpreter exits and when the parent is killed. What a
    worker raises is raised by `next`.

    Args:
        batches: what to iterate over.
        start: index of the first item: the number of items consumed before an interruption.
        length: index at which to stop; None for never.
        num_workers: processes; 0 makes batches in the calling process.
        pin_memory: copy batches to page-locked memory, for a GPU.
        prefetch: batches made ahead by each worker.
        start_method: "fork", "spawn" or "forkserver"; None for the system's default.
    """

    def __init__(
        self,
        batches: SeededBatches,
        *,
        start: int = 0,
        length: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch: int = 2,
        start_method: str | None = None,
    ) -> None:
        self.batches = batches
        self._indices = _Indices(start, sys.maxsize if length is None else length, max(1, 2 * prefetch * num_workers))
        self._early: dict[int, dict[str, LoadedBatch]] = {}
        loader: DataLoader = DataLoader(
            _Numbered(batches),
            batch_size=None,
            sampler=self._indices,
            num_workers=num_workers,
            collate_fn=_unchanged,
            pin_memory=pin_memory,
            prefetch_factor=prefetch if num_workers > 0 else None,
            multiprocessing_context=start_method if num_workers > 0 else None,
            worker_init_fn=_start_worker if num_workers > 0 else None,
            # without one of its own the loader draws from the caller's random state
            generator=torch.Generator(),
            **_AS_SOON_AS_READY,
        )
        self._batches: Iterator[tuple[int, dict[str, LoadedBatch]]] | None = iter(loader)

    @property
    def next_index(self) -> int:
        """Index of the item that `next` gives: `start` of a stream that continues this one."""
        return self._indices.next_used

    def __next__(self) -> dict[str, LoadedBatch]:
        if self._batches is None:
            raise RuntimeError("This stream of batches was closed.")
        while self.next_index not in self._early:
            index, batch = next(self._batches)
            if index != _WAIT:
                self._early[index] = batch
        self._indices.next_used += 1
        return self._early.pop(self.next_index - 1)

    def close(self) -> None:
        """Stop the workers; may be called more than once."""
        batches, self._batches = getattr(self, "_batches", None), None
        self._early = {}
        # dropping the iterator is not enough while a traceback refers to it
        stop_workers = getattr(batches, "_shutdown_workers", None)
        if stop_workers is not None:
            stop_workers()

    def __del__(self) -> None:
        self.close()


@contextmanager
def _seeded(sequence: np.random.SeedSequence) -> Iterator[None]:
    """Seed the global generators of python, numpy and torch (CPU) within the block; restore them after it."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = sequence.generate_state(12, np.uint32)
    try:
        random.seed(words[:4].tobytes())
        np.random.seed(words[4:8])
        # torch.manual_seed would seed the generators of all GPUs too
        torch.default_generator.manual_seed(int(words[8]) << 32 | int(words[9]))
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def _unchanged(batch: object) -> object:
    return batch


def _start_worker(worker: int) -> None:
    exit_with_parent()
