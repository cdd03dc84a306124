"""The table of a study's numbers: means of methods, their intervals, and how each stands to its control.

A training is a data set and a seed; its folds are averaged.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd

from nnunetv2_semi.benchmark.report.measures import HIGHER_IS_BETTER, LABEL_MEAN, METRICS, label_means, values_of
from nnunetv2_semi.benchmark.report.pairing import Arm, Pair, control_of, pair_of, upper_bound_of
from nnunetv2_semi.benchmark.report.uncertainty import (
    FEWEST_CASES,
    SIGNIFICANT,
    bootstrap_means,
    holm,
    interval_of,
    nonzero,
    signed_rank_test,
    verdict,
)

PRIMARY = "dice"
REPEATS = 10_000

Columns = dict[str, np.ndarray | float]


def summarise(measures: pd.DataFrame, repeats: int = REPEATS, seed: int = 0, *, tested: bool = True) -> pd.DataFrame:
    """One row per group, labelled count, method, metric and label (``LABEL_MEAN`` first).

    Columns: ``cases`` and ``trainings`` counted; ``mean`` over cases of the mean over trainings; ``sd_cases`` of these
    means of cases; ``sd_trainings`` of the mean over cases; ``low`` and ``high`` of the mean; ``difference`` to the
    control of the same group and count, of what ``pair_of`` gives, on ``paired_cases``, with ``difference_low`` and
    ``difference_high``; ``gap_closed`` with ``gap_low`` and ``gap_high``, share of the way from control to upper bound
    (1 is all of it); of ``PRIMARY`` and ``LABEL_MEAN`` alone ``differing_cases`` with a difference other than 0, ``p``,
    ``p_corrected`` (Holm over all of these) and ``verdict``; ``note``. Numbers that do not exist are NaN.

    Args:
        measures: Table of ``measure_runs``.
        repeats: Of the bootstrap.
        seed: Of the bootstrap's random numbers.
        tested: Without it ``p`` and what follows from it do not exist.

    Raises:
        UserError: one group and count has two controls.
    """
    measures = pd.concat([label_means(measures), measures], ignore_index=True)
    arms = {
        Arm(group, None if pd.isna(labelled) else int(labelled), method, role): rows
        for (group, labelled, method, role), rows in measures.groupby(
            ["group", "labelled", "method", "role"], sort=False, dropna=False
        )
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing: NaN
        summary = pd.concat([_rows_of_arm(arm, arms, repeats, seed, tested) for arm in arms], ignore_index=True)
    table = summary.reindex(
        columns=[*Arm._fields, "metric", "label", "cases", "trainings", "mean", "sd_cases", "sd_trainings", "low",
                 "high", "paired_cases", "differing_cases", "difference", "difference_low", "difference_high", "p",
                 "p_corrected", "direction", "verdict", "gap_closed", "gap_low", "gap_high", "note"]
    )  # fmt: skip
    table = table.astype(dict.fromkeys(["labelled", "paired_cases", "differing_cases"], "Int64"))
    table["p_corrected"] = holm(table["p"].to_numpy(float))
    table["verdict"] = [
        verdict(*row) for row in zip(table["p_corrected"], table["direction"], table["difference_low"],
                                     table["difference_high"], strict=True)
    ]
    return table.drop(columns="direction")


def rows_of_metric(summary: pd.DataFrame, metric: str = PRIMARY, label: str = LABEL_MEAN) -> pd.DataFrame:
    """Rows of one metric and label, of the summary or a part of it."""
    return summary[(summary["metric"] == metric) & (summary["label"] == label)]


def _rows_of_arm(arm: Arm, arms: Mapping[Arm, pd.DataFrame], repeats: int, seed: int, tested: bool) -> pd.DataFrame:
    """Rows of the summary, without what needs all arms."""
    rows = arms[arm]
    labels = list(rows["label"].unique())
    values = values_of(rows, labels, rows["case"].unique())
    columns = _described(values, repeats, seed)
    notes = ["1 training: interval over cases only"] if values.shape[2] == 1 else []
    shape = values.shape[:2]
    gap_notes = np.full(shape, "")
    control = control_of(arm, arms) if arm.role == "method" else None
    if arm.role == "method" and control is None:
        notes.append("no control")
    if control is not None:
        pair = pair_of(rows, arms[control])
        compared, more = _compared(pair, labels, repeats, seed, tested and pair.fair)
        columns, notes = columns | compared, notes + more
        if pair.fair and (bound := upper_bound_of(arm, arms)) is not None:
            gap, gap_notes = _gap_closed(pair, arms[bound], labels, repeats, seed)
            columns |= gap
    table = pd.DataFrame({name: np.broadcast_to(column, shape).ravel() for name, column in columns.items()})
    table[["metric", "label"]] = [(metric, label) for metric in METRICS for label in labels]
    table["note"] = ["; ".join(filter(None, [*notes, note])) for note in np.broadcast_to(gap_notes, shape).ravel()]
    return table.assign(**arm._asdict()).astype({"labelled": "Int64"})


def _described(values: np.ndarray, repeats: int, seed: int) -> Columns:
    case_means, training_means = np.nanmean(values, axis=-2), np.nanmean(values, axis=-1)
    trainings, cases = values.shape[-2:]
    low, high = interval_of(bootstrap_means([values], repeats, seed)[0]) if cases > 1 else (math.nan, math.nan)
    return {
        "cases": cases,
        "trainings": trainings,
        "mean": _mean(values),
        "sd_cases": np.nanstd(case_means, axis=-1, ddof=1) if cases > 1 else math.nan,
        "sd_trainings": np.nanstd(training_means, axis=-1, ddof=1) if trainings > 1 else math.nan,
        "low": low,
        "high": high,
    }


def _compared(pair: Pair, labels: list[str], repeats: int, seed: int, tested: bool) -> tuple[Columns, list[str]]:
    """Columns of the comparison with the control, and notes on it."""
    own_cases, control_cases = set(pair.own["case"]), set(pair.control["case"])
    shared = sorted(own_cases & control_cases)
    notes = list(pair.notes)
    if own_cases != control_cases:
        notes.append(f"compared on the {len(shared)} cases that both have")
    if not shared:
        return {"paired_cases": 0}, notes
    ours, controls = (values_of(rows, labels, shared) for rows in (pair.own, pair.control))
    differences = np.nanmean(ours, axis=-2) - np.nanmean(controls, axis=-2)
    columns: Columns = {"paired_cases": len(shared), "difference": np.nanmean(differences, axis=-1)}
    if len(shared) > 1:
        our_means, control_means = bootstrap_means([ours, controls], repeats, seed, pair.matched)
        columns["difference_low"], columns["difference_high"] = interval_of(our_means - control_means)
    if tested:
        metric, label = METRICS.index(PRIMARY), labels.index(LABEL_MEAN)
        differing = len(nonzero(differences[metric, label]))
        results = np.full((3, *differences.shape[:2]), math.nan)
        results[:, metric, label] = differing, *signed_rank_test(differences[metric, label])
        columns |= zip(("differing_cases", "p", "direction"), results, strict=True)
        if differing < FEWEST_CASES:
            notes.append(
                f"Dice differs in {differing} of {len(shared)} cases: the test cannot reach p < {SIGNIFICANT:g}"
            )
    return columns, notes


def _gap_closed(
    pair: Pair, bound: pd.DataFrame, labels: list[str], repeats: int, seed: int
) -> tuple[Columns, np.ndarray]:
    """(method - control) / (upper bound - control) on the cases that all three have, or notes why there is none."""
    tables = (pair.own, pair.control, bound)
    shared = sorted(set.intersection(*(set(table["case"]) for table in tables)))
    if len(shared) < 2:
        return {}, np.array("gap undefined: fewer than 2 cases in common with the upper bound")
    values = [values_of(table, labels, shared) for table in tables]
    our_means, control_means, bound_means = bootstrap_means(values, repeats, seed, pair.matched)
    gaps = bound_means - control_means
    low, high = interval_of(gaps)
    none = ~((low > 0) | (high < 0))
    behind = (low > 0) != np.array([[HIGHER_IS_BETTER[metric]] for metric in METRICS])
    # In a few of the draws there may be no gap.
    low, high = interval_of((our_means - control_means) / np.where(gaps == 0, math.nan, gaps))
    ours, controls, bounds = map(_mean, values)
    columns = {"gap_closed": (ours - controls) / (bounds - controls), "gap_low": low, "gap_high": high}
    reasons = ["the interval of upper bound - control includes 0", "the upper bound is behind the control"]
    notes = np.select([none, behind], [f"gap undefined: {reason}" for reason in reasons], "")
    return {name: np.where(none | behind, math.nan, column) for name, column in columns.items()}, notes


def _mean(values: np.ndarray) -> np.ndarray:
    """Over trainings, then cases."""
    return np.nanmean(np.nanmean(values, axis=-2), axis=-1)
