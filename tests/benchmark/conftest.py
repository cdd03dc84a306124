"""Tables of measures with given values, and what a summary says of them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from nnunetv2_semi.benchmark.report.measures import COLUMNS, LABEL_MEAN
from nnunetv2_semi.benchmark.report.summary import rows_of_metric, summarise


def measures_of(
    values: np.ndarray,
    method: str = "Ours",
    role: str = "method",
    labelled: int | None = 4,
    *,
    seeds: list[int | None] | None = None,
    cases: list[str] | None = None,
    fold: str = "all",
    dataset: str = "Dataset001_Test",
    labels: tuple[str, ...] = ("liver",),
) -> pd.DataFrame:
    """A table of measures with ``values`` (seeds, cases) as Dice of every label; other metrics follow from it."""
    seeds = list(range(values.shape[0])) if seeds is None else seeds
    cases = [f"case_{index:02d}" for index in range(values.shape[1])] if cases is None else cases
    rows = []
    for (i, seed), (j, case), label in itertools.product(enumerate(seeds), enumerate(cases), labels):
        dice = values[i, j]
        metrics = {"dice": dice, "jaccard": dice / 2, "hd95_mm": 10 * (1 - dice), "asd_mm": 1 - dice, "nsd": dice}
        described = (dataset, "Test", labelled, method, role, seed, fold, case, label)
        rows.append(dict(zip(COLUMNS, described, strict=False)) | metrics
                    | {"truth_empty": False, "prediction_empty": False})  # fmt: skip
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"labelled": "Int64", "seed": "Int64"})


def summary_of(*tables: pd.DataFrame, repeats: int = 500) -> pd.DataFrame:
    return summarise(pd.concat(tables, ignore_index=True), repeats)


def row_of(summary: pd.DataFrame, method: str = "Ours", metric: str = "dice", label: str = LABEL_MEAN) -> pd.Series:
    found = rows_of_metric(summary[summary["method"] == method], metric, label)
    assert len(found) == 1
    return found.iloc[0]


def random_dice(seed: int, shape: tuple[int, int], mean: float = 0.7) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 0.05, shape)


@pytest.fixture
def tools() -> SimpleNamespace:
    """The helpers above."""
    return SimpleNamespace(measures=measures_of, summary=summary_of, row=row_of, dice=random_dice)
