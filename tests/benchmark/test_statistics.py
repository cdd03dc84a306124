"""Means, intervals and comparisons from tables of measures."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from nnunetv2_semi.benchmark.report.measures import COLUMNS, LABEL_MEAN, METRICS
from nnunetv2_semi.benchmark.report.statistics import (
    AHEAD,
    BEHIND,
    LEVEL,
    bootstrap_means,
    holm,
    interval_of,
    signed_rank_test,
    smallest_corrected_p,
    summarise,
    verdict,
)
from nnunetv2_semi.errors import UserError


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
    found = summary[(summary["method"] == method) & (summary["metric"] == metric) & (summary["label"] == label)]
    assert len(found) == 1
    return found.iloc[0]


def random_dice(seed: int, shape: tuple[int, int], mean: float = 0.7) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 0.05, shape)


def test_mean_and_standard_deviations_are_of_case_means_and_training_means() -> None:
    values = np.array([[0.5, 0.7, 0.9], [0.7, 0.7, 0.7]])
    row = row_of(summary_of(measures_of(values)))
    assert row["mean"] == pytest.approx(0.7)
    assert row["sd_cases"] == pytest.approx(np.std([0.6, 0.7, 0.8], ddof=1))
    assert row["sd_trainings"] == pytest.approx(0)
    assert (row["cases"], row["trainings"]) == (3, 2)
    assert row["low"] < 0.7 < row["high"]


def test_labels_and_folds_are_averaged_within_a_case() -> None:
    liver = measures_of(np.array([[0.2, 0.6]]), labels=("liver",))
    kidney = measures_of(np.array([[0.8, 0.6]]), labels=("kidney",))
    other_fold = [table.assign(fold="1", dice=table["dice"] + 0.1) for table in (liver, kidney)]
    summary = summary_of(liver, kidney, *other_fold)
    assert row_of(summary)["mean"] == pytest.approx(((0.2 + 0.8) / 2 + 0.6) / 2 + 0.05)
    assert row_of(summary, label="liver")["mean"] == pytest.approx(0.4 + 0.05)
    assert row_of(summary)["cases"] == 2


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


def test_bootstrap_of_one_seed_has_the_spread_of_the_mean_over_cases() -> None:
    values = random_dice(0, (1, 200))
    low, high = interval_of(bootstrap_means([values], 4000, 0)[0])
    reach = norm.ppf(0.975) * values.std(ddof=1) / math.sqrt(200)
    assert (high - low) / 2 == pytest.approx(reach, rel=0.06)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.1 * reach)


@pytest.mark.parametrize("missing", [0, 1])
def test_bootstrap_equals_a_loop_over_drawn_rows_and_columns(missing: int) -> None:
    values = random_dice(1, (6, 4)).reshape(2, 3, 4)
    values[1, 1, 2:][:missing] = math.nan
    drawn = bootstrap_means([values], 50, 7)[0]
    case_draws = np.random.default_rng([7, 0]).multinomial(4, [0.25] * 4, size=50)
    training_draws = np.random.default_rng([7, 1]).multinomial(3, [1 / 3] * 3, size=50)
    for matrix, means in zip(values, drawn, strict=True):
        for mean, cases, trainings in zip(means, case_draws, training_draws, strict=True):
            resampled = np.repeat(np.repeat(matrix, trainings, axis=0), cases, axis=1)
            present = ~np.isnan(resampled).all(axis=0)
            assert mean == pytest.approx(np.nanmean(resampled[:, present], axis=0).mean())


def test_bootstrap_is_repeatable_and_draws_the_same_cases_for_all() -> None:
    values = random_dice(0, (3, 10))
    one, same = bootstrap_means([values[:1], values[:1]], 100, 5)
    assert np.array_equal(one, same)
    assert np.array_equal(one, bootstrap_means([values[:1]], 100, 5)[0])
    assert not np.array_equal(one, bootstrap_means([values[:1]], 100, 6)[0])


def test_bootstrap_draws_the_same_trainings_for_the_first_two_if_these_are_matched() -> None:
    values = random_dice(0, (3, 10))
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
    gains = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert signed_rank_test(np.array(gains + [0.0] * 15)) == (pytest.approx(2 / 32), 1.0)
    control = random_dice(0, (1, 20))
    ours = control.copy()
    ours[0, :5] += gains
    row = row_of(summary_of(measures_of(control, "Control", "control"), measures_of(ours)))
    assert row["verdict"] == LEVEL and (row["differing_cases"], row["paired_cases"]) == (5, 20)
    assert "Dice differs in 5 of 20 cases: the test cannot reach p < 0.05" in row["note"]


def test_difference_is_paired_by_case() -> None:
    control = random_dice(0, (3, 12))
    gain = np.linspace(0.01, 0.03, 12)
    row = row_of(summary_of(measures_of(control, "Control", "control"), measures_of(control + gain)))
    assert row["difference"] == pytest.approx(0.02)
    assert row["difference_low"] < 0.02 < row["difference_high"]
    assert row["p"] == row["p_corrected"] == pytest.approx(2 / 2**12)
    assert row["verdict"] == AHEAD
    one_seed = row_of(summary_of(measures_of(control[:1], "Control", "control"), measures_of(control[:1] + gain)))
    # The spread between cases is in both, and cancels out.
    assert one_seed["difference_high"] - one_seed["difference_low"] < 0.3 * (one_seed["high"] - one_seed["low"])
    assert "1 training: interval over cases only" in one_seed["note"]


def test_holm_counts_all_methods_and_numbers_of_labelled_cases_but_no_control_or_upper_bound() -> None:
    tables = []
    for labelled in (4, 8):
        control = random_dice(labelled, (1, 10))
        tables += [measures_of(control, "Control", "control", labelled)]
        tables += [measures_of(control + random_dice(i, (1, 10), 0.02), f"M{i}", labelled=labelled) for i in range(2)]
    summary = summary_of(*tables, measures_of(random_dice(9, (1, 10)), "Bound", "upper bound", 50))
    tested = summary[summary["p"].notna()]
    pairs = sorted(zip(tested["labelled"], tested["method"], strict=True))
    assert pairs == [(4, "M0"), (4, "M1"), (8, "M0"), (8, "M1")]
    assert set(tested["metric"]) == {"dice"} and set(tested["label"]) == {LABEL_MEAN}
    assert tested["p_corrected"].tolist() == pytest.approx(holm(tested["p"].to_numpy()).tolist())
    assert summary["p"].notna().sum() == 4


def test_gap_closed_is_the_share_of_the_way_to_the_upper_bound_for_every_metric() -> None:
    control = random_dice(0, (2, 15), 0.6)
    tables = [measures_of(control, "Control", "control"), measures_of(control + 0.05),
              measures_of(control + 0.2, "Bound", "upper bound", 100)]  # fmt: skip
    summary = summary_of(*tables)
    for metric in METRICS:
        row = row_of(summary, metric=metric)
        assert row["gap_closed"] == pytest.approx(0.25)
        assert row["gap_low"] < 0.25 < row["gap_high"]
    assert math.isnan(row_of(summary, "Control")["gap_closed"]) and math.isnan(row_of(summary, "Bound")["gap_closed"])


def test_gap_is_undefined_where_the_upper_bound_is_not_ahead() -> None:
    control = random_dice(0, (2, 15), 0.6)
    ours = measures_of(control + 0.05)
    no_gap = measures_of(random_dice(1, (2, 15), 0.6), "Bound", "upper bound", 100)
    row = row_of(summary_of(measures_of(control, "Control", "control"), ours, no_gap))
    assert math.isnan(row["gap_closed"]) and "upper bound - control includes 0" in row["note"]
    behind = measures_of(control - 0.2, "Bound", "upper bound", 100)
    for metric in METRICS:
        row = row_of(summary_of(measures_of(control, "Control", "control"), ours, behind), metric=metric)
        assert math.isnan(row["gap_closed"]) and "upper bound is behind" in row["note"]


def test_comparison_uses_the_seeds_that_both_have() -> None:
    values = random_dice(0, (3, 10))
    control, two = measures_of(values, "Control", "control"), measures_of(values[:2] + 0.05)
    row = row_of(summary_of(control, two))
    assert row["difference"] == pytest.approx(0.05) and row["verdict"] == AHEAD
    assert row["note"] == "compared without seed 2 of the control"
    row = row_of(summary_of(measures_of(values[1:], "Control", "control", seeds=[1, 2]), two))
    assert row["difference"] == pytest.approx(0.05) and row["mean"] == pytest.approx(values[:2].mean() + 0.05)
    assert "compared without seed 0, which the control lacks; compared without seed 2 of the control" in row["note"]


def test_method_with_other_seeds_than_the_control_is_compared_with_all_of_them() -> None:
    control = random_dice(0, (3, 10))
    tables = measures_of(control, "Control", "control"), measures_of(control[:2] + 0.05, seeds=[5, 6])
    row = row_of(summary_of(*tables))
    assert row["difference"] == pytest.approx((control[:2].mean(0) + 0.05 - control.mean(0)).mean())
    assert row["note"] == "compared with other seeds of the control" and row["verdict"] != ""


def test_comparison_uses_the_folds_that_both_have() -> None:
    # Fold 1 is better than fold 0 for whatever method.
    values = random_dice(0, (2, 20))
    control = [measures_of(values + 0.1 * fold, "Control", "control", fold=str(fold)) for fold in (0, 1)]
    row = row_of(summary_of(*control, measures_of(values + 0.1, fold="1")))
    assert row["difference"] == 0 and row["p"] == 1 and row["verdict"] == LEVEL
    assert "compared without seed 0 fold 0, seed 1 fold 0 of the control" in row["note"]
    row = row_of(summary_of(*control, measures_of(values + 0.1, fold="1", seeds=[5, 6])))
    assert row["difference"] == pytest.approx(0) and "compared with other seeds of the control" in row["note"]


def test_method_with_other_folds_than_the_control_has_no_verdict() -> None:
    values = random_dice(0, (2, 20))
    control = [measures_of(values, "Control", "control", fold=fold) for fold in "01"]
    bound = measures_of(values + 0.2, "Bound", "upper bound", 100)
    row = row_of(summary_of(*control, measures_of(values + 0.1, fold="2"), bound))
    assert row["difference"] == pytest.approx(0.1) and row["difference_low"] < 0.1 < row["difference_high"]
    assert row["verdict"] == "" and math.isnan(row["p_corrected"]) and math.isnan(row["gap_closed"])
    assert "no verdict: trained on other data sets or folds than the control" in row["note"]


def test_other_seeds_with_other_shares_of_folds_have_no_verdict() -> None:
    values = random_dice(0, (2, 20))
    control = [measures_of(values, "Control", "control", fold=fold) for fold in "01"]
    ours = measures_of(values, fold="0", seeds=[5, 6]), measures_of(values[:1] + 0.1, fold="1", seeds=[5])
    assert row_of(summary_of(*control, *ours))["verdict"] == ""
    ours = measures_of(values, fold="0", seeds=[5, 6]), measures_of(values + 0.1, fold="1", seeds=[5, 6])
    assert row_of(summary_of(*control, *ours))["verdict"] == AHEAD


def test_data_sets_with_one_number_of_labelled_cases_are_trainings_of_their_own() -> None:
    values = random_dice(0, (2, 12))
    gain = np.linspace(0.01, 0.03, 12)
    tables = []
    for index, dataset in enumerate(("Dataset001_A", "Dataset002_B")):
        # The labelled cases of B are much better chosen.
        tables += [measures_of(values + 0.2 * index, "Control", "control", dataset=dataset),
                   measures_of(values + 0.2 * index + gain, dataset=dataset)]  # fmt: skip
    row = row_of(summary_of(*tables))
    assert row["trainings"] == 4 and row["note"] == ""
    assert row["sd_trainings"] == pytest.approx(np.concatenate([values.mean(1), values.mean(1) + 0.2]).std(ddof=1))
    assert row["high"] - row["low"] > 0.1
    # What a draw of labelled cases does to both cancels out.
    assert row["difference"] == pytest.approx(0.02)
    assert row["difference_high"] - row["difference_low"] < 0.02
    only_a = row_of(summary_of(*tables[:3]))
    assert only_a["difference"] == pytest.approx(0.02)
    left_out = "data set Dataset002_B seed 0, data set Dataset002_B seed 1"
    assert f"compared without {left_out} of the control" in only_a["note"]


def test_a_study_of_ten_methods_is_summarised_in_seconds() -> None:
    labels = ("liver", "kidney", "spleen")
    control = random_dice(0, (3, 60), 0.6)
    tables = [measures_of(control, "Control", "control", labels=labels),
              measures_of(control + 0.2, "Bound", "upper bound", 100, labels=labels)]  # fmt: skip
    tables += [measures_of(control + random_dice(i, (3, 60), 0.05), f"M{i}", labels=labels) for i in range(10)]
    table = pd.concat(tables, ignore_index=True)
    before = time.process_time()
    summarise(table)
    assert time.process_time() - before < 20


def test_seeds_of_unknown_number_are_one_seed() -> None:
    control = random_dice(0, (1, 8))
    other = measures_of(control, "Control", "control", None, seeds=[None])
    row = row_of(summary_of(other, measures_of(control + 0.1, labelled=None, seeds=[None])))
    assert row["trainings"] == 1 and row["difference"] == pytest.approx(0.1) and pd.isna(row["labelled"])


def test_comparison_uses_the_cases_that_both_have() -> None:
    control = random_dice(0, (1, 10))
    ours = control[:, 2:] + 0.1
    cases = [f"case_{index:02d}" for index in range(2, 10)]
    row = row_of(summary_of(measures_of(control, "Control", "control"), measures_of(ours, cases=cases)))
    assert row["paired_cases"] == 8 and row["difference"] == pytest.approx(0.1)
    assert "compared on the 8 cases that both have" in row["note"]
    others = measures_of(ours, cases=[case + "x" for case in cases])
    apart = row_of(summary_of(measures_of(control, "Control", "control"), others))
    assert apart["paired_cases"] == 0 and math.isnan(apart["p"]) and apart["verdict"] == ""


@pytest.mark.parametrize("cases", [1, 5])
def test_few_cases_are_said_to_be_too_few(cases: int) -> None:
    control = random_dice(0, (2, cases))
    row = row_of(summary_of(measures_of(control, "Control", "control"), measures_of(control + 0.1)))
    assert f"Dice differs in {cases} of {cases} cases: the test cannot reach p < 0.05" in row["note"]
    assert row["verdict"] == LEVEL
    assert math.isnan(row["low"]) == (cases == 1)


def test_missing_control_leaves_the_means() -> None:
    control_of_other_count = measures_of(random_dice(0, (2, 8)), "Control", "control", 8)
    row = row_of(summary_of(measures_of(random_dice(0, (2, 8))), control_of_other_count))
    assert math.isnan(row["p"]) and row["verdict"] == "" and row["note"] == "no control"
    assert not math.isnan(row["mean"])


def test_two_controls_are_refused() -> None:
    values = random_dice(0, (1, 8))
    with pytest.raises(UserError, match="two controls for one number of labelled cases: A and B"):
        summary_of(measures_of(values, "A", "control"), measures_of(values, "B", "control"), measures_of(values))


@pytest.mark.parametrize("p, direction, interval, expected", [
    (0.01, 1, (0.1, 0.2), AHEAD), (0.01, -1, (-0.2, -0.1), BEHIND), (0.05, 1, (0.1, 0.2), LEVEL),
    (0.01, 1, (-0.2, -0.1), LEVEL), (0.01, 1, (-0.1, 0.2), LEVEL), (math.nan, 1, (0.1, 0.2), ""),
])  # fmt: skip
def test_verdict_follows_from_corrected_test_and_interval(
    p: float, direction: int, interval: tuple[float, float], expected: str
) -> None:
    assert verdict(p, direction, *interval) == expected


def test_a_difference_that_another_training_could_turn_round_is_no_verdict() -> None:
    """All cases are lower in the mean over three trainings, because of one of them."""
    control = random_dice(0, (3, 20))
    ours = control + np.array([0.02, 0.02, -0.2])[:, None] + random_dice(1, (3, 20)) * 0.001
    row = row_of(summary_of(measures_of(control, "Control", "control"), measures_of(ours)))
    assert row["p_corrected"] < 0.001 and row["difference_low"] < 0 < row["difference_high"]
    assert row["verdict"] == LEVEL


def test_smallest_corrected_p_grows_with_comparisons() -> None:
    assert smallest_corrected_p([6]) == pytest.approx(2 / 64)
    assert smallest_corrected_p([6, 6]) == pytest.approx(4 / 64)
    assert smallest_corrected_p([]) == 1
    # All comparisons at the smallest p their cases allow.
    assert holm(np.full(5, 2 / 2**8)) == pytest.approx([smallest_corrected_p([8] * 5)] * 5)
