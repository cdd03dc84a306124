"""Which images are the same image, whatever their file is called."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

from nnunetv2_semi.data.cached_reading import read_cached
from nnunetv2_semi.data.file_integrity import check_file_complete
from nnunetv2_semi.data.grids import Grid, grid_difference, grid_of

HASHES_FILE = "semi_content_hashes.json"
_CACHE_VERSION = 2


@dataclass(frozen=True)
class ImageContent:
    """What one image file holds.

    Attributes:
        digest: BLAKE2b of shape and decoded voxels (hexadecimal); the same for two files with equal voxels, whatever
            their compression or integer type.
        constant: all voxels are equal, so that the image says nothing about which patient it shows.
        shape: (C, X, Y, Z) as nnU-Net's reader gives it; C is 1 unless the file holds several channels.
        spacing: mm, one per spatial axis in the reader's order.
        origin, direction: see `nnunetv2_semi.data.grids.Grid`.
    """

    digest: str
    constant: bool
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...] = ()
    direction: tuple[float, ...] = ()

    @property
    def grid(self) -> Grid:
        """Where the voxels lie."""
        return Grid(self.spacing, self.origin, self.direction)


@dataclass(frozen=True)
class Duplicate:
    """Two cases that share the voxels of a channel: files `file` and `other_file` are the same image."""

    case: str
    file: str
    other_case: str
    other_file: str


def read_content(path: str, reader_name: str) -> ImageContent:
    """What one image file holds, see `read_file`."""
    return read_file(path, reader_name)[0]


def read_file(path: str, reader_name: str, *, is_label: bool = False) -> tuple[ImageContent, np.ndarray]:
    """Read one image or label file as nnU-Net does, with its reader of that name.

    Returns:
        What it holds, and its voxels (C, X, Y, Z), float32.

    Raises:
        Exception: whatever the reader or `check_file_complete` raises on a damaged file; ValueError for voxels that are
            not finite.
    """
    check_file_complete(path)
    reader = recursive_find_reader_writer_by_name(reader_name)()
    voxels, properties = reader.read_seg(path) if is_label else reader.read_images([path])
    voxels = np.ascontiguousarray(voxels, dtype=np.float32)
    low, high = float(voxels.min()), float(voxels.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("the image has voxels that are not finite numbers (NaN or infinity)")
    digest = voxels_digest(voxels)
    grid = grid_of(properties)
    content = ImageContent(
        digest=digest,
        constant=low == high,
        shape=tuple(int(size) for size in voxels.shape),
        spacing=tuple(float(size) for size in properties["spacing"]),
        origin=grid.origin,
        direction=grid.direction,
    )
    return content, voxels


def voxels_digest(voxels: np.ndarray) -> str:
    """BLAKE2b, in hexadecimal, of the shape and values of a contiguous float32 array, in which -0 becomes 0."""
    voxels += 0.0  # minus zero and zero are the same value
    hasher = hashlib.blake2b(repr(voxels.shape).encode(), digest_size=20)
    hasher.update(voxels.data)
    return hasher.hexdigest()


def image_contents(
    files: Iterable[str],
    *,
    raw_dataset_folder: str,
    cache_file: str,
    reader_name: str,
    num_processes: int,
    show_progress_bar: bool = True,
    report: Callable[[str], None] = print,
) -> tuple[dict[str, ImageContent], dict[str, str]]:
    """Content of each image file; files that were read before and are unchanged are not read again, see `read_cached`.

    Args:
        files: paths.
        raw_dataset_folder: paths below it are cached relative to it.
        cache_file: JSON.
        reader_name: nnU-Net's reader, as in the plans ("image_reader_writer").
        num_processes: of the reading.
        show_progress_bar: one step per file that has to be read.
        report: receives one line if the cache cannot be written.

    Returns:
        Content by path, and the reason by path for files that cannot be read.
    """
    return read_cached(
        files,
        partial(read_content, reader_name=reader_name),
        content_from_json,
        made_by={"version": _CACHE_VERSION, "reader": reader_name},
        raw_dataset_folder=raw_dataset_folder,
        cache_file=cache_file,
        num_processes=num_processes,
        description="Reading images",
        show_progress_bar=show_progress_bar,
        report=report,
    )


def find_duplicates(
    unlabelled: Mapping[str, Iterable[str]],
    contents: Mapping[str, ImageContent],
    labelled: Mapping[str, Iterable[str]] | None = None,
) -> list[Duplicate]:
    """Pairs of cases that share the content of any channel under another name; one entry per pair of cases.

    Args:
        unlabelled: case name to its image files.
        contents: content by file; files that are absent from it are not compared.
        labelled: case name to its image files. If given, each unlabelled case is compared with these; if not,
            unlabelled cases are compared with each other.

    Constant images (a filler for a channel that was not taken) are not the same image.
    """
    first_with_digest: dict[str, tuple[str, str]] = {}
    if labelled is not None:
        for case, files in labelled.items():
            for file in files:
                if file in contents and not contents[file].constant:
                    first_with_digest.setdefault(contents[file].digest, (case, file))
    duplicates: dict[tuple[str, str], Duplicate] = {}
    for case, files in unlabelled.items():
        for file in files:
            if file not in contents or contents[file].constant:
                continue
            if labelled is None:
                other_case, other_file = first_with_digest.setdefault(contents[file].digest, (case, file))
                found = other_case != case
            else:
                other_case, other_file = first_with_digest.get(contents[file].digest, ("", ""))
                found = bool(other_file)
            if found:
                duplicates.setdefault((case, other_case), Duplicate(case, file, other_case, other_file))
    return list(duplicates.values())


def geometry_difference(files: Iterable[str], contents: Mapping[str, ImageContent]) -> str | None:
    """How the files of one case, channels or a label, differ from the grid of the first; None if they agree."""
    present = [(os.path.basename(file), contents[file]) for file in files if file in contents]
    for name, content in present[1:]:
        first_name, first = present[0]
        if content.shape[1:] != first.shape[1:]:
            return f"shape {list(content.shape[1:])} of {name} differs from {list(first.shape[1:])} of {first_name}"
        different = grid_difference(first.grid, content.grid)
        if different is not None:
            here, there = (list(getattr(image.grid, different)) for image in (content, first))
            return f"{different} {here} of {name} differs from {there} of {first_name}"
    return None


def content_from_json(entry: dict) -> ImageContent:
    """Inverse of `dataclasses.asdict` after a trip through JSON, which turns tuples into lists."""
    return ImageContent(
        digest=entry["digest"],
        constant=entry["constant"],
        shape=tuple(entry["shape"]),
        spacing=tuple(entry["spacing"]),
        origin=tuple(entry["origin"]),
        direction=tuple(entry["direction"]),
    )
