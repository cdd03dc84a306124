"""Means, their uncertainty, and comparisons with the control, from the measures of cases.

A training is a data set and a seed; its folds are averaged.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import rankdata, wilcoxon
from statsmodels.stats.multitest import multipletests

from nnunetv2_semi.benchmark.report.measures import HIGHER_IS_BETTER, LABEL_MEAN, METRICS, label_means, values_of
from nnunetv2_semi.errors import UserError

PRIMARY = "dice"
SIGNIFICANT = 0.05
REPEATS = 10_000
# Two-sided, the smallest p of a signed-rank test of n cases that differ is 2 / 2^n.
FEWEST_CASES = 6

AHEAD, LEVEL, BEHIND = "ahead of", "not distinguishable from", "behind"
UNFAIR = "trained on other data sets or folds than the control, or not as often"
Columns = dict[str, np.ndarray | float]


class Arm(NamedTuple):
    """Trainings that differ in nothing but data set, seed and fold."""

    group: str
    labelled: int | None
    method: str
    role: str


class Pair(NamedTuple):
    """Measures of a method and of its control that are compared.

    notes: what is not compared. matched: both are the same data sets, seeds and folds. fair: both have equal shares of
    the same data sets and folds.
    """

    own: pd.DataFrame
    control: pd.DataFrame
    notes: list[str]
    matched: bool
    fair: bool


def summarise(measures: pd.DataFrame, repeats: int = REPEATS, seed: int = 0) -> pd.DataFrame:
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
        summary = pd.concat([_rows_of_arm(arm, arms, repeats, seed) for arm in arms], ignore_index=True)
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


def pair_of(rows: pd.DataFrame, control: pd.DataFrame) -> Pair:
    """What of a method and of its control is compared.

    The models (data set, seed and fold) that both have. If there are none, the data sets and folds that both have, with
    whatever seeds: these are exchangeable, folds are not. If there are none either, everything.
    """
    own, other = _models(rows), _models(control)
    same_models = own.isin(other), other.isin(own)
    matched = bool(same_models[0].any())
    same_places = (own.droplevel("seed").isin(other.droplevel("seed")),
                   other.droplevel("seed").isin(own.droplevel("seed")))  # fmt: skip
    if matched:
        (own_kept, control_kept), notes = same_models, []
    elif same_places[0].any():
        (own_kept, control_kept), notes = same_places, ["compared with other seeds of the control"]
    else:
        return Pair(rows, control, [f"no verdict: {UNFAIR}"], False, False)
    models = own.unique().append(other.unique())
    for index, kept, whose in ((own, own_kept, ", which the control lacks"), (other, control_kept, " of the control")):
        if not kept.all():
            notes.append(f"compared without {_named(index[~kept], models)}{whose}")
    fair = _shares(own[own_kept]) == _shares(other[control_kept])
    notes += [] if fair else [f"no verdict: {UNFAIR}"]
    return Pair(rows[own_kept], control[control_kept], notes, matched, fair)


def bootstrap_means(values: Sequence[np.ndarray], repeats: int, seed: int, matched: bool = False) -> list[np.ndarray]:
    """Means ``(..., repeats)`` of each ``(..., trainings, cases)`` over both, which are drawn with replacement.

    All have the same cases, and the same draw of them. Trainings are drawn for each by itself; if ``matched``, the
    first two have the same draw of these too. The mean is over trainings, then cases; NaN is left out.
    """
    case_draws = _draws(values[0].shape[-1], repeats, seed, 0)
    means = []
    for place, single in enumerate(values):
        training_draws = _draws(single.shape[-2], repeats, seed, 1 if matched and place < 2 else place + 1)
        matrices = single.reshape(-1, *single.shape[-2:])
        resampled = [_resampled_means(matrix, training_draws, case_draws) for matrix in matrices]
        means.append(np.stack(resampled).reshape(*single.shape[:-2], repeats))
    return means


def interval_of(samples: np.ndarray) -> np.ndarray:
    """Percentile intervals ``(2, ...)`` of 95 % of samples ``(..., repeats)``."""
    return np.nanpercentile(samples, [2.5, 97.5], axis=-1)


def signed_rank_test(differences: np.ndarray) -> tuple[float, float]:
    """Two-sided p of Wilcoxon's signed-rank test of the differences other than 0, and the sign of its rank sum."""
    # With zeros among them scipy gives a normal approximation, which can be significant where the exact p is not.
    nonzero = _nonzero(differences)
    if not len(nonzero):
        return 1.0, 0.0
    return float(wilcoxon(nonzero).pvalue), float(np.sign(np.sum(np.sign(nonzero) * rankdata(np.abs(nonzero)))))


def holm(p: np.ndarray) -> np.ndarray:
    """p-values corrected by Holm's method for as many tests as there are; NaN stays NaN and does not count."""
    corrected = np.full(len(p), math.nan)
    tested = ~np.isnan(p)
    if tested.any():
        corrected[tested] = multipletests(p[tested], method="holm")[1]
    return corrected


def verdict(p_corrected: float, direction: float, low: float, high: float) -> str:
    """How a method stands to its control, from the corrected test over cases and the interval of the mean difference,
    which is over cases and trainings; empty where there was no test."""
    if math.isnan(p_corrected):
        return ""
    # The test knows these trainings alone: what another training could turn round is not reported as a winner. Nor are
    # many small gains beside one large loss, of which ranks and mean give contradicting accounts.
    if p_corrected >= SIGNIFICANT or low <= 0 <= high or direction * (low + high) <= 0:
        return LEVEL
    return AHEAD if low > 0 else BEHIND


def smallest_corrected_p(differing_cases: Sequence[int]) -> float:
    """The smallest corrected p that as many tests with as many cases that differ can reach."""
    return min(1.0, len(differing_cases) * 2.0 ** (1 - max(differing_cases))) if differing_cases else 1.0


def _models(rows: pd.DataFrame) -> pd.MultiIndex:
    """Data set, seed and fold of each row."""
    return pd.MultiIndex.from_arrays(
        [rows["dataset"], *(rows[name].astype("string").fillna("unknown") for name in ("seed", "fold"))],
        names=["dataset", "seed", "fold"],
    )


def _named(left_out: pd.MultiIndex, models: pd.MultiIndex, most: int = 3) -> str:
    """Models by that in which any of ``models`` differ: seed 2, seed 3."""
    words = [(place, level.replace("dataset", "data set")) for place, level in enumerate(models.names)
             if models.get_level_values(level).nunique() > 1]  # fmt: skip
    names = [" ".join(f"{word} {model[place]}" for place, word in words) for model in left_out.unique()]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _shares(models: pd.MultiIndex) -> dict[tuple[str, str], float]:
    """Weight of each data set and fold in a mean over folds, then trainings."""
    table = models.unique().to_frame(index=False)
    table["share"] = 1 / table.groupby(["dataset", "seed"])["fold"].transform("size")
    shares = table.groupby(["dataset", "fold"])["share"].sum()
    return (shares / shares.sum()).round(9).to_dict()


@lru_cache(maxsize=16)
def _draws(count: int, repeats: int, seed: int, stream: int) -> np.ndarray:
    """How often each of ``count`` things is in a draw with replacement, ``(repeats, count)``."""
    generator = np.random.default_rng([seed, stream])
    return generator.multinomial(count, np.full(count, 1 / count), size=repeats).astype(float)


def _resampled_means(matrix: np.ndarray, training_draws: np.ndarray, case_draws: np.ndarray) -> np.ndarray:
    if not np.isnan(matrix).any():
        return ((case_draws @ matrix.T) * training_draws).sum(1) / matrix.size
    counts = training_draws @ (~np.isnan(matrix)).astype(float)
    case_means = training_draws @ np.nan_to_num(matrix) / np.maximum(counts, 1)
    weights = case_draws * (counts > 0)
    with np.errstate(invalid="ignore"):  # no case left: NaN
        return (weights * case_means).sum(1) / weights.sum(1)


def _nonzero(differences: np.ndarray) -> np.ndarray:
    # Means over trainings of equal values differ in the last digit, which would be a rank.
    differences = np.round(differences, 12)
    return differences[differences != 0]


def _mean(values: np.ndarray) -> np.ndarray:
    """Over trainings, then cases."""
    return np.nanmean(np.nanmean(values, axis=-2), axis=-1)


def _rows_of_arm(arm: Arm, arms: Mapping[Arm, pd.DataFrame], repeats: int, seed: int) -> pd.DataFrame:
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
        compared, more = _compared(pair, labels, repeats, seed)
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


def _compared(pair: Pair, labels: list[str], repeats: int, seed: int) -> tuple[Columns, list[str]]:
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
    if pair.fair:
        metric, label = METRICS.index(PRIMARY), labels.index(LABEL_MEAN)
        differing = len(_nonzero(differences[metric, label]))
        tested = np.full((3, *differences.shape[:2]), math.nan)
        tested[:, metric, label] = differing, *signed_rank_test(differences[metric, label])
        columns |= zip(("differing_cases", "p", "direction"), tested, strict=True)
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
