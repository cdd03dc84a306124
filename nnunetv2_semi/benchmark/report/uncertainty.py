"""How certain means and differences are: bootstrap intervals, tests over cases, and the verdict from both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.stats import rankdata, wilcoxon
from statsmodels.stats.multitest import multipletests

SIGNIFICANT = 0.05
# Two-sided, the smallest p of a signed-rank test of n cases that differ is 2 / 2^n.
FEWEST_CASES = 6

AHEAD, LEVEL, BEHIND = "ahead of", "not distinguishable from", "behind"


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
    tested = nonzero(differences)
    if not len(tested):
        return 1.0, 0.0
    return float(wilcoxon(tested).pvalue), float(np.sign(np.sum(np.sign(tested) * rankdata(np.abs(tested)))))


def nonzero(differences: np.ndarray) -> np.ndarray:
    """The differences other than 0, rounded to 12 decimals."""
    # Means over trainings of equal values differ in the last digit, which would be a rank.
    differences = np.round(differences, 12)
    return differences[differences != 0]


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
