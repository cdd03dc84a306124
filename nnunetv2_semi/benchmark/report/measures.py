"""How well predictions match the truth: Dice, Jaccard, HD95, ASD and NSD of every case and structure."""

from __future__ import annotations

import math
import multiprocessing
import os
import warnings
from collections.abc import Collection, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

from nnunetv2_semi.benchmark.report.runs import PredictedRun
from nnunetv2_semi.data.atomic_files import read_json_object
from nnunetv2_semi.data.cached_reading import companion_files
from nnunetv2_semi.data.file_contents import name_of_reader
from nnunetv2_semi.data.grids import grid_difference, grid_of
from nnunetv2_semi.errors import UserError, one_line
from nnunetv2_semi.processes.pool import default_processes, results_in_parallel

METRICS = ("dice", "jaccard", "hd95_mm", "asd_mm", "nsd")
HIGHER_IS_BETTER = {"dice": True, "jaccard": True, "hd95_mm": False, "asd_mm": False, "nsd": True}
COLUMNS = ("dataset", "group", "labelled", "method", "role", "seed", "fold", "case", "label", *METRICS,
           "truth_empty", "prediction_empty")  # fmt: skip
LABEL_MEAN = "mean over labels"


class CaseFiles(NamedTuple):
    """One case of a run."""

    name: str
    truth: Path
    prediction: Path


def measure_runs(
    runs: Sequence[PredictedRun],
    tolerance_mm: float,
    *,
    num_processes: int | None = None,
    show_progress_bar: bool = True,
) -> pd.DataFrame:
    """One row per run, case and structure, with the columns ``COLUMNS``, sorted by the order of ``runs`` and the case.

    ``labelled``, ``seed`` and ``fold`` are missing values where a run has None.

    Args:
        runs: Each has a prediction for every file of its ``truth``.
        tolerance_mm: Distance up to which NSD counts surfaces as equal.
        num_processes: Cases measured at once; None: `default_processes`.
        show_progress_bar: Of the cases.

    Raises:
        UserError: predictions are missing, lie on another grid than the truth, hold labels that dataset.json does not
            name, or cannot be read; all in one message.
    """
    files = [case_files(run) for run in runs]
    missing = [
        f"{run.name}, {_listed(cases, 'prediction(s) missing', ', ')} (in {run.predictions})"
        for run, run_files in zip(runs, files, strict=True)
        if (cases := [case.name for case in run_files if not case.prediction.is_file()])
    ]
    if missing:
        raise UserError(
            f"{_listed(missing, 'run(s) lack test cases')}. For a study, 'nnunetv2_semi benchmark run' predicts them "
            "again; else predict these cases, or remove their truth."
        )
    readers = {run.truth: reader_name(run, run_files[0].truth) for run, run_files in zip(runs, files, strict=True)}
    tasks = [
        (index, run, case, readers[run.truth])
        for index, (run, run_files) in enumerate(zip(runs, files, strict=True))
        for case in run_files
    ]
    rows: list[tuple[int, str, list[dict[str, object]]]] = []
    problems: list[str] = []
    for (index, _, case, _), (case_rows, problem) in results_in_parallel(
        partial(_rows_of_case, tolerance_mm=tolerance_mm),
        tasks,
        num_processes=num_processes or default_processes(),
        description="Measuring predictions",
        show_progress_bar=show_progress_bar,
    ):
        rows.append((index, case.name, case_rows))
        problems += [problem] if problem else []
    if problems:
        raise UserError(f"{_listed(sorted(problems), 'case(s) cannot be measured')}.")
    rows.sort(key=lambda row: row[:2])
    table = pd.DataFrame([row for _, _, case_rows in rows for row in case_rows], columns=list(COLUMNS))
    return table.astype({"labelled": "Int64", "seed": "Int64"})


def measures_of_masks(
    truth: np.ndarray, prediction: np.ndarray, spacing: Sequence[float], tolerance_mm: float
) -> dict[str, float | bool]:
    """All metrics of one structure, and whether it is empty.

    Surfaces are voxels with a face on the outside (HD95, ASD), and surface elements between voxel centres weighted by
    their area (NSD). HD95 is the larger of both directions' 95th percentiles, ASD the mean over the surface voxels of
    both. Both empty: overlaps 1, distances 0. One empty: overlaps 0, distances the diagonal of the image.

    Args:
        truth, prediction: Boolean ``(*spatial)``, two or three dimensions.
        spacing: mm per axis.
        tolerance_mm: Of NSD.
    """
    counts = {"truth_empty": not truth.any(), "prediction_empty": not prediction.any()}
    if any(counts.values()):
        equal = all(counts.values())
        overlap = float(equal)
        distance = 0.0 if equal else math.hypot(*(size * step for size, step in zip(truth.shape, spacing, strict=True)))
        return dict.fromkeys(METRICS, overlap) | {"hd95_mm": distance, "asd_mm": distance} | counts
    intersection, union = int((truth & prediction).sum()), int((truth | prediction).sum())
    # Nothing outside the box changes a distance: voxels at its edge are surface there as they were in the image.
    box = _bounding_box(truth | prediction)
    first, second = (torch.from_numpy(np.ascontiguousarray(mask[box]))[None, None] for mask in (prediction, truth))
    # Headers hold 32-bit floats: 0.3 mm is read as 0.30000001, and ten voxels of it would be outside 3 mm.
    steps = [round(float(step), 6) for step in spacing]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI warns of an argument that it passes itself
        hd95 = compute_hausdorff_distance(first, second, True, percentile=95, spacing=steps)
        asd = compute_average_surface_distance(first, second, True, symmetric=True, spacing=steps)
        nsd = compute_surface_dice(first, second, [tolerance_mm], True, spacing=steps, use_subvoxels=True)
    return {
        "dice": 2 * intersection / (intersection + union),
        "jaccard": intersection / union,
        "hd95_mm": hd95.item(),
        "asd_mm": asd.item(),
        "nsd": nsd.item(),
        **counts,
    }


def label_means(measures: pd.DataFrame) -> pd.DataFrame:
    """Rows with the mean over labels of each case of each training, under the label ``LABEL_MEAN``."""
    keys = ["dataset", "group", "labelled", "method", "role", "seed", "fold", "case"]
    means = measures.groupby(keys, sort=False, dropna=False)[list(METRICS)].mean().reset_index()
    return means.assign(label=LABEL_MEAN)


def values_of(rows: pd.DataFrame, labels: Collection[str], cases: Collection[str]) -> np.ndarray:
    """``(metrics, labels, trainings, cases)``, mean over folds; NaN where a training has no such case or label.

    A training is a data set and a seed; unknown seeds are one seed.
    """
    metrics = list(METRICS)
    keys = [rows["label"], rows["dataset"], rows["seed"].fillna(-1), rows["case"]]
    wide = rows.groupby(keys)[metrics].mean().unstack("case")
    trainings = wide.index.droplevel("label").unique()
    index = pd.MultiIndex.from_tuples([(label, *training) for label in labels for training in trainings])
    values = wide.reindex(index=index, columns=pd.MultiIndex.from_product([metrics, cases])).to_numpy(float)
    return values.reshape(len(labels), len(trainings), len(metrics), len(cases)).transpose(2, 0, 1, 3)


def dice_of_cases(rows: pd.DataFrame) -> pd.Series:
    """Dice per case, mean over labels, folds and trainings; of measures with the rows of ``label_means``."""
    cases = sorted(rows["case"].unique())
    dice = values_of(rows, [LABEL_MEAN], cases)[METRICS.index("dice"), 0]
    return pd.Series(np.nanmean(dice, axis=0), cases)


def read_dataset_json(file: Path) -> dict:
    """Content of dataset.json. Raises UserError where it is absent or lacks what is needed here."""
    content = read_json_object(str(file))
    if content is None or not isinstance(content.get("labels"), dict) or not content.get("file_ending"):
        raise UserError(f'{file} is not a dataset.json: it must be an object with "labels" and "file_ending".')
    return content


def structures(dataset_json: dict) -> dict[str, tuple[int, ...]]:
    """Label values per label or region, without background and the ignore label."""
    found = {
        name: tuple(int(v) for v in (value if isinstance(value, (list, tuple)) else (value,)))
        for name, value in dataset_json["labels"].items()
        if name != "ignore"
    }
    return {name: values for name, values in found.items() if set(values) != {0}}


def case_files(run: PredictedRun) -> list[CaseFiles]:
    """The cases with truth, by name, and where their predictions should be. Raises UserError if there are none."""
    ending = read_dataset_json(run.dataset_json)["file_ending"]
    files = sorted(run.truth.glob(f"[!.]*{ending}")) if run.truth.is_dir() else []
    if not files:
        raise UserError(f"There are no files *{ending} in {run.truth}: no truth to compare the predictions with.")
    return [CaseFiles(file.name.removesuffix(ending), file, run.predictions / file.name) for file in files]


def reader_name(run: PredictedRun, example: Path) -> str:
    """Name of nnU-Net's reader for a run's files, of which ``example`` is one."""
    return name_of_reader(read_dataset_json(run.dataset_json), str(example))


def read_segmentation(file: Path, reader: str) -> tuple[np.ndarray, list[float], dict]:
    """Label map ``(Z, Y, X)``, or ``(Y, X)`` where there is one slice, mm per axis, and nnU-Net's properties."""
    # Tiff3DIO prints a line for each file without spacing.
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        segmentation, properties = recursive_find_reader_writer_by_name(reader)().read_seg(str(file))
    # In one slice as a volume every voxel would be surface.
    flat = segmentation.shape[1] == 1
    spacing = [float(step) for step in properties["spacing"]]
    return segmentation[0, 0] if flat else segmentation[0], spacing[1:] if flat else spacing, properties


def _rows_of_case(
    task: tuple[int, PredictedRun, CaseFiles, str], tolerance_mm: float
) -> tuple[list[dict[str, object]], str | None]:
    """Rows of one case, or what is wrong with it."""
    _, run, case, reader = task
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)
    maps = []
    for path in (case.truth, case.prediction):
        try:
            maps.append(read_segmentation(path, reader))
        except MemoryError:
            raise
        except Exception as error:  # readers raise whatever their libraries do
            return [], f"{path} cannot be read ({one_line(error)})"
    (truth, spacing, truth_properties), (prediction, spacing_of_prediction, properties) = maps
    if reader == "Tiff3DIO" and not companion_files(str(case.truth)):
        spacing = spacing_of_prediction  # of the image's .json, which nnU-Net copies to its prediction
    if truth.shape != prediction.shape:
        return [], f"{case.prediction} has {prediction.shape} voxels, its truth {truth.shape}"
    if grid_difference(grid_of(truth_properties), grid_of(properties)) is not None:
        return [], f"{case.prediction} has another spacing, origin or direction than {case.truth}"
    content = read_dataset_json(run.dataset_json)
    ignore = content["labels"].get("ignore")
    named = structures(content)
    known = {0, *([] if ignore is None else [ignore]), *(value for values in named.values() for value in values)}
    for path, label_map in ((case.truth, truth), (case.prediction, prediction)):
        if unknown := sorted(set(pd.unique(label_map.ravel()).tolist()) - known):
            return [], f"{path} holds the label(s) {', '.join(f'{v:g}' for v in unknown[:5])}, unknown to dataset.json"
    used = truth != ignore if ignore is not None else np.ones(truth.shape, dtype=bool)
    described = {
        "dataset": run.dataset, "group": run.group, "labelled": run.labelled, "method": run.method,
        "role": run.role, "seed": run.seed, "fold": run.fold, "case": case.name,
    }  # fmt: skip
    rows: list[dict[str, object]] = []
    for name, values in named.items():
        masks = [np.isin(label_map, values) & used for label_map in (truth, prediction)]
        rows.append({**described, "label": name, **measures_of_masks(masks[0], masks[1], spacing, tolerance_mm)})
    return rows, None


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    box = []
    for axis in range(mask.ndim):
        inside = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(int(inside[0]), int(inside[-1]) + 1))
    return tuple(box)


def _listed(items: Sequence[str], what: str, separator: str = "; ") -> str:
    shown = separator.join(items[:10]) + (f"{separator}and {len(items) - 10} more" if len(items) > 10 else "")
    return f"{len(items)} {what}: {shown}"
