"""How far predictions of a case agree: which pseudo-labels can be trusted.

They are those of one model while it was trained, or those of several models.

Source: ST++ (Yang et al., "ST++: make self-training work better for semi-supervised semantic segmentation", CVPR 2022):
images whose predictions by earlier checkpoints agree with the last one's have the more reliable pseudo-labels.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunetv2_semi.data.atomic_files import whole_file
from nnunetv2_semi.processes.pool import results_in_parallel

# Label values of each structure; regions have several.
Structures = Sequence[Sequence[int]]


def stability(final: np.ndarray, snapshots: Sequence[np.ndarray], structures: Structures) -> float | None:
    """Mean over the others of ``mean_iou`` with the final prediction; None if that has no structure.

    ST++ sums over checkpoints, which gives the same order, and counts background as a class, which fills most of a
    volume.

    Args:
        final: Label map ``(*spatial)`` of one case.
        snapshots: Label maps of the same case, by the model on its way, or by each model of an ensemble.
        structures: Without background.
    """
    if not np.isin(final, [value for values in structures for value in values]).any():
        return None
    return math.fsum(mean_iou(final, snapshot, structures) for snapshot in snapshots) / len(snapshots)


def mean_iou(first: np.ndarray, second: np.ndarray, structures: Structures) -> float:
    """Mean intersection over union of the structures that are in either label map ``(*spatial)``; NaN if none is."""
    counts = _joint_counts(first, second, 1 + max(max(values) for values in structures))
    overlaps = []
    for values in map(list, structures):
        intersection = counts[np.ix_(values, values)].sum()
        union = counts[values].sum() + counts[:, values].sum() - intersection
        if union:
            overlaps.append(intersection / union)
    return float(np.mean(overlaps)) if overlaps else math.nan


def most_stable(scores: Mapping[str, float | None], keep: float) -> list[str]:
    """Names of the cases to keep, the most stable first; equal ones by name.

    Args:
        scores: By case; cases with None are never kept.
        keep: Share of all cases, rounded, at least one.
    """
    return ranked(scores)[: number_kept(len(scores), keep)]


def ranked(scores: Mapping[str, float | None]) -> list[str]:
    """Cases that have a score, the most stable first; equal ones by name."""
    known = {case: score for case, score in scores.items() if score is not None}
    return sorted(known, key=lambda case: (-known[case], case))


def number_kept(cases: int, keep: float) -> int:
    """The share ``keep`` of so many cases, rounded, at least one."""
    return max(1, math.floor(cases * keep + 0.5))


def stability_of_cases(
    final: Path, snapshots: Sequence[Path], files: Sequence[str], structures: Structures,
    reader: type[BaseReaderWriter], num_processes: int,
) -> dict[str, float | None]:
    """``stability`` of each file, in order, from predictions of the same name in several folders."""
    rate = partial(_stability_of_file, final=final, snapshots=snapshots, structures=structures, reader=reader)
    found = dict(results_in_parallel(rate, files, num_processes=num_processes, description="Comparing predictions"))
    return {file: found[file] for file in files}


def write_scores(file: Path, scores: Mapping[str, float | None], kept: Sequence[str]) -> None:
    """A table with the columns case, stability (empty if None) and kept (0 or 1), the most stable first."""
    order = ranked(scores)
    with whole_file(file) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as table:
        rows = csv.writer(table)
        rows.writerow(("case", "stability", "kept"))
        for case in (*order, *sorted(set(scores) - set(order))):
            rows.writerow((case, "" if scores[case] is None else repr(scores[case]), int(case in kept)))


def read_scores(file: Path) -> dict[str, float | None]:
    """Stability per case from a table of ``write_scores``."""
    with open(file, newline="", encoding="utf-8") as table:
        return {row["case"]: float(row["stability"]) if row["stability"] else None for row in csv.DictReader(table)}


def _joint_counts(first: np.ndarray, second: np.ndarray, values: int) -> np.ndarray:
    """Voxels per pair of label values, ``(values, values)``; higher values count as background."""
    counts = np.zeros(values * values, dtype=np.int64)
    # Slice by slice: the pairs of a whole volume would need several times its memory.
    for pair in zip(np.atleast_2d(first), np.atleast_2d(second), strict=True):
        one, other = (np.where(labels < values, labels, 0).astype(np.int64).ravel() for labels in pair)
        counts += np.bincount(one * values + other, minlength=len(counts))
    return counts.reshape(values, values)


def _stability_of_file(
    file: str, final: Path, snapshots: Sequence[Path], structures: Structures, reader: type[BaseReaderWriter]
) -> float | None:
    last, *earlier = (reader().read_seg(str(folder / file))[0][0] for folder in (final, *snapshots))
    return stability(last, earlier, structures)
