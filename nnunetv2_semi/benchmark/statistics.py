"""Means, their uncertainty, and comparisons with the control, from the measures of cases."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import rankdata, wilcoxon
from statsmodels.stats.multitest import multipletests

from nnunetv2_semi.benchmark.measures import HIGHER_IS_BETTER
from nnunetv2_semi.errors import UserError

PRIMARY = "dice"
LABEL_MEAN = "mean over labels"
SIGNIFICANT = 0.05
REPEATS = 10_000
# Two-sided, the smallest p of a signed-rank test of n cases is 2 / 2^n.
FEWEST_CASES = 6

AHEAD, LEVEL, BEHIND = "ahead of", "not distinguishable from", "behind"
Interval = tuple[float, float]
UNKNOWN: Interval = (math.nan, math.nan)


class Arm(NamedTuple):
    """Trainings that differ in nothing but seed and fold."""

    group: str
    labelled: int | None
    method: str
    role: str


def summarise(measures: pd.DataFrame, repeats: int = REPEATS, seed: int = 0) -> pd.DataFrame:
    """One row per group, labelled count, method, metric and label (``LABEL_MEAN`` first).

    Columns: ``cases`` and ``seeds`` counted; ``mean`` over cases of the mean over seeds; ``sd_cases`` of these means of
    cases; ``sd_seeds`` of the mean over cases; ``low`` and ``high`` of the mean; ``difference`` to the control of the
    same group and count, on ``paired_cases``, with ``difference_low`` and ``difference_high``; ``gap_closed`` with
    ``gap_low`` and ``gap_high``, share of the way from control to upper bound (1 is all of it); of ``PRIMARY`` and
    ``LABEL_MEAN`` alone ``p``, ``p_corrected`` (Holm over all of these) and ``verdict``; ``note``. Numbers that do not
    exist are NaN.

    Args:
        measures: Table of ``measure_runs``.
        repeats: Of the bootstrap.
        seed: Of the bootstrap's random numbers.

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
    summary = []
    for arm, rows in arms.items():
        references = (control_of(arm, arms), upper_bound_of(arm, arms)) if arm.role == "method" else (None, None)
        for metric in HIGHER_IS_BETTER:
            for label in rows["label"].unique():
                own = matrix_of(rows, metric, label)
                control, bound = (
                    None if reference is None else matrix_of(arms[reference], metric, label) for reference in references
                )
                row = arm._asdict() | {"metric": metric, "label": label} | _described(own, repeats, seed)
                notes = ["1 seed: interval over cases only"] if len(own) == 1 else []
                if arm.role == "method":
                    tested = (metric, label) == (PRIMARY, LABEL_MEAN)
                    compared, more = _compared(own, control, tested, repeats, seed)
                    row, notes = row | compared, notes + more
                if control is not None and bound is not None:
                    gap, more = _gap_closed(own, control, bound, HIGHER_IS_BETTER[metric], repeats, seed)
                    row, notes = row | gap, notes + more
                summary.append(row | {"note": "; ".join(notes)})
    table = pd.DataFrame(summary).reindex(
        columns=[*Arm._fields, "metric", "label", "cases", "seeds", "mean", "sd_cases", "sd_seeds", "low", "high",
                 "paired_cases", "difference", "difference_low", "difference_high", "p", "p_corrected", "direction",
                 "verdict", "gap_closed", "gap_low", "gap_high", "note"]
    )  # fmt: skip
    table = table.astype({"labelled": "Int64", "paired_cases": "Int64"})
    table["p_corrected"] = holm(table["p"].to_numpy(float))
    table["verdict"] = [
        verdict(*row) for row in zip(table["p_corrected"], table["direction"], table["difference"], strict=True)
    ]
    return table.drop(columns="direction")


def label_means(measures: pd.DataFrame) -> pd.DataFrame:
    """Rows with the mean over labels of each case of each training, under the label ``LABEL_MEAN``."""
    keys = ["dataset", "group", "labelled", "method", "role", "seed", "fold", "case"]
    means = measures.groupby(keys, sort=False, dropna=False)[list(HIGHER_IS_BETTER)].mean().reset_index()
    return means.assign(label=LABEL_MEAN)


def control_of(arm: Arm, arms: Collection[Arm]) -> Arm | None:
    """The control with as many labelled cases. Raises UserError if there are two."""
    found = [other for other in arms if other.role == "control" and other[:2] == arm[:2]]
    if len(found) > 1:
        names = " and ".join(other.method for other in found)
        raise UserError(f"{arm.group} has two controls for one number of labelled cases: {names}. Name one.")
    return found[0] if found else None


def upper_bound_of(arm: Arm, arms: Collection[Arm]) -> Arm | None:
    """The upper bound of the group; of several, the one with most labelled cases."""
    found = [other for other in arms if other.role == "upper bound" and other.group == arm.group]
    return max(found, key=lambda other: other.labelled or 0, default=None)


def matrix_of(rows: pd.DataFrame, metric: str, label: str) -> pd.DataFrame:
    """Seeds x cases, mean over folds; NaN where a seed has no such case. Unknown seeds are one seed."""
    rows = rows[rows["label"] == label].assign(seed=lambda table: table["seed"].fillna(-1))
    return rows.pivot_table(index="seed", columns="case", values=metric, aggfunc="mean")


def bootstrap_means(matrices: Sequence[np.ndarray], repeats: int, seed: int) -> list[np.ndarray]:
    """Means ``(repeats,)`` of each matrix ``(seeds, cases)`` over seeds and then cases, both drawn with replacement.

    All matrices have the same cases, and the same draw of them; seeds are drawn for each by itself. NaN is left out.
    """
    generator = np.random.default_rng(seed)
    cases = matrices[0].shape[1]
    case_draws = generator.multinomial(cases, np.full(cases, 1 / cases), size=repeats)
    means = []
    for matrix in matrices:
        seeds = len(matrix)
        seed_draws = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=repeats)
        counts = seed_draws @ (~np.isnan(matrix)).astype(float)
        case_means = seed_draws @ np.nan_to_num(matrix) / np.maximum(counts, 1)
        weights = case_draws * (counts > 0)
        with np.errstate(invalid="ignore"):  # no case left: NaN
            means.append((weights * case_means).sum(1) / weights.sum(1))
    return means


def interval_of(samples: np.ndarray) -> Interval:
    """Percentile interval of 95 %."""
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    return float(low), float(high)


def signed_rank_test(differences: np.ndarray) -> tuple[float, float]:
    """Two-sided p of Wilcoxon's signed-rank test, and the sign of its rank sum."""
    # Means over seeds of equal values differ in the last digit, which would be a rank.
    differences = np.round(differences, 12)
    if not differences.any():
        return 1.0, 0.0
    nonzero = differences[differences != 0]
    return float(wilcoxon(differences).pvalue), float(np.sign(np.sum(np.sign(nonzero) * rankdata(np.abs(nonzero)))))


def holm(p: np.ndarray) -> np.ndarray:
    """p-values corrected by Holm's method for as many tests as there are; NaN stays NaN and does not count."""
    corrected = np.full(len(p), math.nan)
    tested = ~np.isnan(p)
    if tested.any():
        corrected[tested] = multipletests(p[tested], method="holm")[1]
    return corrected


def verdict(p_corrected: float, direction: float, difference: float) -> str:
    """How a method stands to its control, from the corrected test; empty where there was none."""
    if math.isnan(p_corrected):
        return ""
    # Many small gains and one large loss: ranks and mean contradict each other, and neither is reported as the winner.
    if p_corrected >= SIGNIFICANT or direction * difference <= 0:
        return LEVEL
    return AHEAD if difference > 0 else BEHIND


def smallest_corrected_p(paired_cases: Sequence[int]) -> float:
    """The smallest corrected p that as many tests with as many cases can reach."""
    return min(1.0, len(paired_cases) * 2.0 ** (1 - max(paired_cases))) if paired_cases else 1.0


def _described(matrix: pd.DataFrame, repeats: int, seed: int) -> dict[str, object]:
    values = matrix.to_numpy(float)
    case_means, seed_means = np.nanmean(values, axis=0), np.nanmean(values, axis=1)
    seeds, cases = values.shape
    low, high = interval_of(bootstrap_means([values], repeats, seed)[0]) if cases > 1 else UNKNOWN
    return {
        "cases": cases,
        "seeds": seeds,
        "mean": float(case_means.mean()),
        "sd_cases": float(case_means.std(ddof=1)) if cases > 1 else math.nan,
        "sd_seeds": float(seed_means.std(ddof=1)) if seeds > 1 else math.nan,
        "low": low,
        "high": high,
    }


def _compared(
    matrix: pd.DataFrame, control: pd.DataFrame | None, tested: bool, repeats: int, seed: int
) -> tuple[dict[str, object], list[str]]:
    """Columns of the comparison with the control, and notes on it."""
    if control is None:
        return {}, ["no control"]
    shared = matrix.columns.intersection(control.columns)
    notes = []
    if len(shared) < max(len(matrix.columns), len(control.columns)):
        notes.append(f"compared on the {len(shared)} cases that both have")
    if set(matrix.index) != set(control.index):
        notes.append(f"other seeds than the control ({len(matrix)}, not {len(control)})")
    if tested and len(shared) < FEWEST_CASES:
        notes.append(f"{len(shared)} cases: the test cannot reach p < {SIGNIFICANT:g}")
    if len(shared) == 0:
        return {"paired_cases": 0}, notes
    ours, controls = (table[shared].to_numpy(float) for table in (matrix, control))
    differences = np.nanmean(ours, axis=0) - np.nanmean(controls, axis=0)
    low, high = UNKNOWN
    if len(shared) > 1:
        our_means, control_means = bootstrap_means([ours, controls], repeats, seed)
        low, high = interval_of(our_means - control_means)
    p, direction = signed_rank_test(differences) if tested else UNKNOWN
    return {
        "paired_cases": len(shared),
        "difference": float(differences.mean()),
        "difference_low": low,
        "difference_high": high,
        "p": p,
        "direction": direction,
    }, notes


def _gap_closed(
    matrix: pd.DataFrame, control: pd.DataFrame, bound: pd.DataFrame, higher_is_better: bool, repeats: int, seed: int
) -> tuple[dict[str, object], list[str]]:
    """(method - control) / (upper bound - control) on the cases that all three have, or a note why there is none."""
    shared = matrix.columns.intersection(control.columns).intersection(bound.columns)
    if len(shared) < 2:
        return {}, ["gap undefined: fewer than 2 cases in common with the upper bound"]
    matrices = [table[shared].to_numpy(float) for table in (matrix, control, bound)]
    our_means, control_means, bound_means = bootstrap_means(matrices, repeats, seed)
    low, high = interval_of(bound_means - control_means)
    if low <= 0 <= high:
        return {}, ["gap undefined: the interval of upper bound - control includes 0"]
    if (low > 0) != higher_is_better:
        return {}, ["gap undefined: the upper bound is behind the control"]
    # In a few of the draws there may be no gap.
    gaps = bound_means - control_means
    low, high = interval_of((our_means - control_means)[gaps != 0] / gaps[gaps != 0])
    ours, controls, bounds = (float(np.nanmean(values, axis=0).mean()) for values in matrices)
    return {"gap_closed": (ours - controls) / (bounds - controls), "gap_low": low, "gap_high": high}, []
