"""Bootstrap intervals, tests and verdicts."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import norm

from nnunetv2_semi.benchmark.report.uncertainty import (
    AHEAD,
    BEHIND,
    LEVEL,
    bootstrap_means,
    holm,
    interval_of,
    signed_rank_test,
    smallest_corrected_p,
    verdict,
)


@pytest.mark.parametrize("seeds, cases", [(1, 40), (8, 20)])
def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says(seeds: int, cases: int) -> None:
    generator = np.random.default_rng(0)
    covered = []
    for repetition in range(300):
        values = (generator.normal(0, 1, (1, cases)) + (seeds > 1) * generator.normal(0, 1, (seeds, 1))
                  + generator.normal(0, 0.5, (seeds, cases)))  # fmt: skip
        low, high = interval_of(bootstrap_means([values], 400, repetition)[0])
        covered.append(low <= 0 <= high)
    assert 0.86 < np.mean(covered) < 0.985


def test_bootstrap_of_one_seed_has_the_spread_of_the_mean_over_cases(tools: SimpleNamespace) -> None:
    values = tools.dice(0, (1, 200))
    low, high = interval_of(bootstrap_means([values], 4000, 0)[0])
    reach = norm.ppf(0.975) * values.std(ddof=1) / math.sqrt(200)
    assert (high - low) / 2 == pytest.approx(reach, rel=0.06)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.1 * reach)


@pytest.mark.parametrize("missing", [0, 1])
def test_bootstrap_equals_a_loop_over_drawn_rows_and_columns(tools: SimpleNamespace, missing: int) -> None:
    values = tools.dice(1, (6, 4)).reshape(2, 3, 4)
    values[1, 1, 2:][:missing] = math.nan
    drawn = bootstrap_means([values], 50, 7)[0]
    case_draws = np.random.default_rng([7, 0]).multinomial(4, [0.25] * 4, size=50)
    training_draws = np.random.default_rng([7, 1]).multinomial(3, [1 / 3] * 3, size=50)
    for matrix, means in zip(values, drawn, strict=True):
        for mean, cases, trainings in zip(means, case_draws, training_draws, strict=True):
            resampled = np.repeat(np.repeat(matrix, trainings, axis=0), cases, axis=1)
            present = ~np.isnan(resampled).all(axis=0)
            assert mean == pytest.approx(np.nanmean(resampled[:, present], axis=0).mean())


def test_bootstrap_is_repeatable_and_draws_the_same_cases_for_all(tools: SimpleNamespace) -> None:
    values = tools.dice(0, (3, 10))
    one, same = bootstrap_means([values[:1], values[:1]], 100, 5)
    assert np.array_equal(one, same)
    assert np.array_equal(one, bootstrap_means([values[:1]], 100, 5)[0])
    assert not np.array_equal(one, bootstrap_means([values[:1]], 100, 6)[0])


def test_bootstrap_draws_the_same_trainings_for_the_first_two_if_these_are_matched(tools: SimpleNamespace) -> None:
    values = tools.dice(0, (3, 10))
    first, second, third = bootstrap_means([values] * 3, 100, 5, matched=True)
    assert np.array_equal(first, second) and not np.array_equal(first, third)
    first, second = bootstrap_means([values] * 2, 100, 5)
    assert not np.array_equal(first, second)


def test_holm_equals_the_values_worked_out_by_hand() -> None:
    # Sorted: 0.01, 0.02, 0.03, 0.04, times 4, 3, 2, 1 is 0.04, 0.06, 0.06, 0.04; never below the one before: 0.06.
    corrected = holm(np.array([0.03, math.nan, 0.01, 0.04, 0.02]))
    assert corrected[[0, 2, 3, 4]] == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert math.isnan(corrected[1])


def test_signed_rank_test_equals_the_value_worked_out_by_hand() -> None:
    # Six gains: the rank sum of the losses is 0, reached by 1 of 2^6 sign patterns in either direction.
    assert signed_rank_test(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])) == (pytest.approx(2 / 64), 1.0)
    # Ranks 1 to 5 with the smallest a loss: 2 patterns have a rank sum of 1 or less, in either direction.
    assert signed_rank_test(np.array([-0.1, 0.2, 0.3, 0.4, 0.5])) == (pytest.approx(4 / 32), 1.0)
    assert signed_rank_test(np.zeros(8)) == (1.0, 0.0)
    assert signed_rank_test(np.full(8, 1e-15)) == (1.0, 0.0)


def test_equal_cases_do_not_take_part_in_the_signed_rank_test() -> None:
    # Five gains: 2 of 2^5 sign patterns, however many cases are equal.
    assert signed_rank_test(np.array([0.1, 0.2, 0.3, 0.4, 0.5] + [0.0] * 15)) == (pytest.approx(2 / 32), 1.0)


@pytest.mark.parametrize("p, direction, interval, expected", [
    (0.01, 1, (0.1, 0.2), AHEAD), (0.01, -1, (-0.2, -0.1), BEHIND), (0.05, 1, (0.1, 0.2), LEVEL),
    (0.01, 1, (-0.2, -0.1), LEVEL), (0.01, 1, (-0.1, 0.2), LEVEL), (math.nan, 1, (0.1, 0.2), ""),
])  # fmt: skip
def test_verdict_follows_from_corrected_test_and_interval(
    p: float, direction: int, interval: tuple[float, float], expected: str
) -> None:
    assert verdict(p, direction, *interval) == expected


def test_smallest_corrected_p_grows_with_comparisons() -> None:
    assert smallest_corrected_p([6]) == pytest.approx(2 / 64)
    assert smallest_corrected_p([6, 6]) == pytest.approx(4 / 64)
    assert smallest_corrected_p([]) == 1
    # All comparisons at the smallest p their cases allow.
    assert holm(np.full(5, 2 / 2**8)) == pytest.approx([smallest_corrected_p([8] * 5)] * 5)
