"""What image and label files hold, read as nnU-Net reads them and kept in a cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from nnunetv2.imageio.reader_writer_registry import (
    determine_reader_writer_from_dataset_json,
    recursive_find_reader_writer_by_name,
)

from nnunetv2_semi.data.cached_reading import companion_files, read_cached
from nnunetv2_semi.data.file_integrity import check_file_complete
from nnunetv2_semi.data.grids import Grid, grid_difference, grid_of
from nnunetv2_semi.data.thumbnails import thumbnail
from nnunetv2_semi.errors import UserError, shown

HASHES_FILE = "semi_content_hashes.json"
LABELS_FILE = "semi_label_contents.json"
_CACHE_VERSION = 3
_VALUES_KEPT = 1000  # of a label that is an image by mistake there are as many as voxels
_VOXELS_FOR_MEDIAN = 100_000


@dataclass(frozen=True)
class FileContent:
    """What one image or label file holds.

    Attributes:
        digest: BLAKE2b of shape and decoded voxels (hexadecimal); the same for two files with equal voxels, whatever
            their compression or integer type.
        constant: all voxels are equal, so that an image says nothing about which patient it shows.
        shape: (C, X, Y, Z) as nnU-Net's reader gives it; C is 1 unless the file holds several channels.
        spacing: mm, one per spatial axis in the reader's order; () of a label in TIFF, which has none of its own.
        origin, direction: see `nnunetv2_semi.data.grids.Grid`.
        values: different voxel values of a label, in ascending order; the first 1000. () for an image.
        intensities: lowest, about the median, and highest voxel of an image. () for a label.
        thumbnail: see `nnunetv2_semi.data.thumbnails`. "" for a label.
    """

    digest: str
    constant: bool
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...] = ()
    direction: tuple[float, ...] = ()
    values: tuple[float, ...] = ()
    intensities: tuple[float, ...] = ()
    thumbnail: str = ""

    @property
    def grid(self) -> Grid:
        """Where the voxels lie."""
        return Grid(self.spacing, self.origin, self.direction)


def name_of_reader(dataset_json: dict, example: str) -> str:
    """The reader that nnU-Net would choose: the first that reads an example, where several share a file ending.

    Raises:
        UserError: nnU-Net has none for this file ending.
    """
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        try:
            reader = determine_reader_writer_from_dataset_json(dataset_json, example, verbose=False)
        except RuntimeError:
            try:
                reader = determine_reader_writer_from_dataset_json(dataset_json, verbose=False)
            except RuntimeError as error:
                raise UserError(f"nnU-Net has no reader for {example}: {error}") from error
    return str(reader.__name__)


def read_image(path: str, reader_name: str) -> FileContent:
    """Read one image file with nnU-Net's reader of that name.

    Raises:
        Exception: whatever the reader or `check_file_complete` raises on a damaged file; ValueError for voxels that are
            not finite.
    """
    content, voxels = _read(path, reader_name, is_label=False)
    low, high = float(voxels.min()), float(voxels.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("the image has voxels that are not finite numbers (NaN or infinity)")
    median = float(np.median(voxels.ravel()[:: max(1, voxels.size // _VOXELS_FOR_MEDIAN)]))
    return FileContent(
        **content, constant=low == high, intensities=(low, median, high), thumbnail=thumbnail(voxels.mean(axis=0))
    )


def read_label(path: str, reader_name: str) -> FileContent:
    """Read one label file with nnU-Net's reader of that name. Raises what `read_image` raises, ValueError apart."""
    content, voxels = _read(path, reader_name, is_label=True)
    # Without sorting, unlike numpy's: label files have up to 10^9 voxels.
    values = sorted(float(value) for value in pd.unique(voxels.ravel()))
    return FileContent(**content, constant=len(values) == 1, values=tuple(values[:_VALUES_KEPT]))


def file_contents(
    files: Iterable[str],
    *,
    labels: bool = False,
    cache_folder: str | None,
    raw_dataset_folder: str,
    reader_name: str,
    num_processes: int,
    show_progress_bar: bool = True,
    report: Callable[[str], None] = print,
) -> tuple[dict[str, FileContent], dict[str, str]]:
    """Content of each file; files that were read before and are unchanged are not read again, see `read_cached`.

    Args:
        files: paths.
        labels: whether these are label files; else they are images.
        cache_folder: of the cache, which is another for labels; None for no cache.
        raw_dataset_folder: paths below it are cached relative to it.
        reader_name: nnU-Net's reader, as in the plans ("image_reader_writer").
        num_processes: of the reading.
        show_progress_bar: one step per file that has to be read.
        report: receives one line if the cache cannot be written.

    Returns:
        Content by path, and the reason by path for files that cannot be read.
    """
    cache_name = LABELS_FILE if labels else HASHES_FILE
    return read_cached(
        files,
        partial(read_label if labels else read_image, reader_name=reader_name),
        content_from_json,
        made_by={"version": _CACHE_VERSION, "reader": reader_name},
        raw_dataset_folder=raw_dataset_folder,
        cache_file=cache_folder and os.path.join(cache_folder, cache_name),
        num_processes=num_processes,
        description=f"Reading {'labels' if labels else 'images'}",
        show_progress_bar=show_progress_bar,
        report=report,
    )


def content_from_json(entry: dict) -> FileContent:
    """Inverse of `dataclasses.asdict` after a trip through JSON, which turns tuples into lists."""
    fields: dict = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return FileContent(**fields)


def geometry_difference(files: Iterable[str], contents: Mapping[str, FileContent]) -> str | None:
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


def _read(path: str, reader_name: str, *, is_label: bool) -> tuple[dict, np.ndarray]:
    """What images and labels have in common, by its name in `FileContent`, and the voxels (C, X, Y, Z), float32."""
    check_file_complete(path)
    reader = recursive_find_reader_writer_by_name(reader_name)()
    with contextlib.redirect_stdout(io.StringIO()):  # a reader of TIFF files prints a line for each
        voxels, properties = reader.read_seg(path) if is_label else reader.read_images([path])
    voxels = np.ascontiguousarray(voxels, dtype=np.float32)
    grid = grid_of(properties)
    guessed = is_label and reader_name == "Tiff3DIO" and not companion_files(path)
    return {
        "digest": _digest(voxels),
        "shape": tuple(int(size) for size in voxels.shape),
        "spacing": () if guessed else tuple(float(size) for size in properties["spacing"]),
        "origin": grid.origin,
        "direction": grid.direction,
    }, voxels


def _digest(voxels: np.ndarray) -> str:
    """BLAKE2b, in hexadecimal, of the shape and values of a contiguous float32 array, in which -0 becomes 0."""
    voxels += 0.0  # minus zero and zero are the same value
    hasher = hashlib.blake2b(repr(voxels.shape).encode(), digest_size=20)
    hasher.update(voxels.data)
    return hasher.hexdigest()


def refuse_unreadable(reasons: Mapping[str, str]) -> None:
    """Raise UserError where images, told with the reason of each, cannot be read."""
    if reasons:
        files = shown([f"{file} ({reason})" for file, reason in sorted(reasons.items())])
        raise UserError(f"{len(reasons)} image(s) cannot be read. Replace them, or remove these cases: {files}")
