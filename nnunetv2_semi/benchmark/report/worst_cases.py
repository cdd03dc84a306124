"""Pictures of the cases that went worst."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

from nnunetv2_semi.benchmark.report.measures import (
    LABEL_MEAN,
    case_files,
    read_dataset_json,
    read_segmentation,
    reader_name,
    structures,
)
from nnunetv2_semi.benchmark.report.page import Picture
from nnunetv2_semi.benchmark.report.plots import overlay_picture
from nnunetv2_semi.benchmark.report.runs import PredictedRun
from nnunetv2_semi.benchmark.report.summary import PRIMARY
from nnunetv2_semi.data.dataset_settings import named_channels
from nnunetv2_semi.pictures import COLOURS, PictureRow


def worst_cases_picture(runs: Sequence[PredictedRun], measures: pd.DataFrame, count: int, title: str) -> Picture:
    """The cases with the lowest Dice (mean over labels) in any of the runs, each once.

    Args:
        runs: Of one method and number of labelled cases.
        measures: Their rows, with those of ``label_means``.
        count: Of cases.
        title: Method and number of labelled cases.
    """
    rows = measures[measures["label"] == LABEL_MEAN].sort_values(PRIMARY).drop_duplicates("case").head(count)
    drawn = [_drawn(_run_of(row, runs), row) for _, row in rows.iterrows()]
    labels = label_values(read_dataset_json(runs[0].dataset_json))
    return overlay_picture(drawn, labels, title, f"{runs[0].group}, {title}: {', '.join(rows['case'])}")


def label_values(dataset_json: dict) -> dict[str, int]:
    """Label values that can be drawn, by name; regions are drawn as the values they are made of."""
    named = structures(dataset_json)
    if all(len(values) == 1 for values in named.values()):
        found = {name: values[0] for name, values in named.items()}
    else:
        found = {f"label {value}": value for value in sorted({v for values in named.values() for v in values}) if value}
    return dict(list(found.items())[: len(COLOURS)])


def _run_of(row: pd.Series, runs: Sequence[PredictedRun]) -> PredictedRun:
    def same(value: object, cell: object) -> bool:
        return bool(pd.isna(cell)) if value is None else value == cell

    return next(run for run in runs if run.dataset == row["dataset"] and same(run.seed, row["seed"])
                and same(run.fold, row["fold"]))  # fmt: skip


def _drawn(run: PredictedRun, row: pd.Series) -> PictureRow:
    case = next(case for case in case_files(run) if case.name == row["case"])
    reader = reader_name(run, case.truth)
    truth, spacing, _ = read_segmentation(case.truth, reader)
    prediction, _, _ = read_segmentation(case.prediction, reader)
    if truth.ndim == 2:
        truth, prediction = truth[None], prediction[None]
    image, title = np.zeros(truth.shape), "No image"
    content = read_dataset_json(run.dataset_json)
    file = run.images / f"{case.name}_0000{content['file_ending']}" if run.images else Path()
    if file.is_file():
        image, title = _first_channel(file, reader), str(named_channels(content).get("0", "Image"))
    maps = {"Truth": truth, "Prediction": prediction}
    return PictureRow(case.name, {title: image}, maps, {"Prediction": float(row[PRIMARY])}, spacing[-2] / spacing[-1])


def _first_channel(file: Path, reader: str) -> np.ndarray:
    return recursive_find_reader_writer_by_name(reader)().read_images([str(file)])[0][0]
