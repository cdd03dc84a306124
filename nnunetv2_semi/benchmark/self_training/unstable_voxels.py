"""Label maps in which voxels that are predicted differently have nnU-Net's ignore label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunetv2_semi.data.atomic_files import whole_folder
from nnunetv2_semi.processes.pool import results_in_parallel


def with_ignore_label(dataset_json: Mapping) -> dict:
    """Content of dataset.json with an ignore label, the next after the largest value, as nnU-Net wants it."""
    labels = dataset_json["labels"]
    if "ignore" in labels:
        return dict(dataset_json)
    largest = max(int(value) for values in labels.values() for value in np.atleast_1d(values))
    return {**dataset_json, "labels": {**labels, "ignore": largest + 1}}


def stable_labels(final: np.ndarray, others: Sequence[np.ndarray], ignore_label: int) -> np.ndarray:
    """The final label map ``(*spatial)``, with the ignore label where any of the others has another label."""
    unstable = np.zeros(final.shape, dtype=bool)
    for other in others:
        unstable |= other != final
    smallest = np.uint8 if ignore_label < 256 else np.uint16
    return np.where(unstable, ignore_label, final).astype(smallest)


def write_stable_labels(
    final: Path, others: Sequence[Path], files: Sequence[str], ignore_label: int, reader: type[BaseReaderWriter],
    folder: Path, num_processes: int,
) -> None:
    """``stable_labels`` of each file, from predictions of the same name in several folders, in a new folder.

    The folder appears when all are written.
    """
    with whole_folder(folder) as unfinished:
        write = partial(_write_stable_labels, final=final, others=others, ignore_label=ignore_label, reader=reader,
                        folder=Path(unfinished))  # fmt: skip
        for _ in results_in_parallel(write, files, num_processes=num_processes, description="Writing stable labels"):
            pass


def _write_stable_labels(
    file: str, final: Path, others: Sequence[Path], ignore_label: int, reader: type[BaseReaderWriter], folder: Path
) -> None:
    labels, properties = reader().read_seg(str(final / file))
    compared = [reader().read_seg(str(other / file))[0][0] for other in others]
    reader().write_seg(stable_labels(labels[0], compared, ignore_label), str(folder / file), properties)
