"""How large a case becomes when it is resampled to the spacing of the plans: known before that is tried."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

NO_RESAMPLING = "no_resampling_hack"  # nnU-Net's function that leaves images as they are
_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_FLOAT32 = 4
_FLOAT64_AND_MASK = 8 + 1  # nnU-Net resamples one channel after the other, in double precision


def resampled_shape(
    shape: Sequence[int], spacing: Sequence[float], plans_manager: PlansManager, configuration: ConfigurationManager
) -> tuple[int, ...]:
    """Shape (voxels) after resampling, in the plans' order of axes; without the cropping that precedes it.

    Args:
        shape: of the raw image, in the reader's order, without channels.
        spacing: mm, likewise.
        plans_manager: with the order of axes.
        configuration: with the spacing; of 2D plans the number of slices stays.
    """
    order = plans_manager.transpose_forward
    shape, spacing = [shape[axis] for axis in order], [float(spacing[axis]) for axis in order]
    target = [float(size) for size in configuration.spacing]
    return tuple(int(size) for size in compute_new_shape(shape, spacing, [*spacing[: len(shape) - len(target)],
                                                                          *target]))


def size_problem(
    shape: Sequence[int],
    spacing: Sequence[float],
    num_channels: int,
    plans_manager: PlansManager,
    configuration: ConfigurationManager,
) -> str | None:
    """Why a case cannot be resampled to the spacing of the plans; None if it can. Arguments as `resampled_shape`."""
    stated = f"its size is {_times(shape)} voxels of {_times(spacing)} mm"
    if not all(math.isfinite(size) and size > 0 for size in spacing):
        return f"{stated}: no voxel size. Correct the header"
    if configuration.configuration.get("resampling_fn_data") == NO_RESAMPLING:
        return None
    resampled = resampled_shape(shape, spacing, plans_manager, configuration)
    plan = f"{_times(configuration.spacing)} mm"
    if 0 in resampled:
        return (f"{stated}, so that resampled to {plan} it would have no voxel ({_times(resampled)}). Correct the "
                "voxel size in the header, or take an image of more slices")
    needed, available = resampled_bytes(resampled, num_channels), memory_bytes()
    if needed > available:
        return (f"{stated}, so that resampled to {plan} it would have {_times(resampled)} voxels, which need "
                f"{_in_words(needed)} of memory, and there are {_in_words(available)}. Correct the voxel size in the "
                "header (micrometres, or pixels, in place of mm?)")
    return None


def resampled_bytes(shape: Sequence[int], num_channels: int) -> int:
    """Memory (bytes) that resampling to that shape needs at least."""
    return math.prod(shape) * (_FLOAT32 * num_channels + _FLOAT64_AND_MASK)


def memory_bytes() -> int:
    """Memory of this machine, or of the container if that is less."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    for file in map(Path, _MEMORY_LIMITS):
        text = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
        sizes += [int(text)] if text.isdigit() else []
    return min(sizes, default=1 << 63)


def _times(sizes: Sequence[float]) -> str:
    return " x ".join(f"{size:g}" for size in sizes)


def _in_words(size: float) -> str:
    unit, bytes_of_it = next(((unit, 10**power) for unit, power in (("TB", 12), ("GB", 9)) if size >= 10**power),
                             ("MB", 10**6))
    return f"{size / bytes_of_it:.3g} {unit}"
