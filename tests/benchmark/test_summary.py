"""Means, intervals and comparisons from tables of measures."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from nnunetv2_semi.benchmark.report.measures import LABEL_MEAN, METRICS
from nnunetv2_semi.benchmark.report.summary import summarise
from nnunetv2_semi.benchmark.report.uncertainty import AHEAD, LEVEL, holm


def test_mean_and_standard_deviations_are_of_case_means_and_training_means(tools: SimpleNamespace) -> None:
    values = np.array([[0.5, 0.7, 0.9], [0.7, 0.7, 0.7]])
    row = tools.row(tools.summary(tools.measures(values)))
    assert row["mean"] == pytest.approx(0.7)
    assert row["sd_cases"] == pytest.approx(np.std([0.6, 0.7, 0.8], ddof=1))
    assert row["sd_trainings"] == pytest.approx(0)
    assert (row["cases"], row["trainings"]) == (3, 2)
    assert row["low"] < 0.7 < row["high"]


def test_labels_and_folds_are_averaged_within_a_case(tools: SimpleNamespace) -> None:
    liver = tools.measures(np.array([[0.2, 0.6]]), labels=("liver",))
    kidney = tools.measures(np.array([[0.8, 0.6]]), labels=("kidney",))
    other_fold = [table.assign(fold="1", dice=table["dice"] + 0.1) for table in (liver, kidney)]
    summary = tools.summary(liver, kidney, *other_fold)
    assert tools.row(summary)["mean"] == pytest.approx(((0.2 + 0.8) / 2 + 0.6) / 2 + 0.05)
    assert tools.row(summary, label="liver")["mean"] == pytest.approx(0.4 + 0.05)
    assert tools.row(summary)["cases"] == 2


def test_equal_cases_are_compared_but_do_not_differ(tools: SimpleNamespace) -> None:
    control = tools.dice(0, (1, 20))
    ours = control.copy()
    ours[0, :5] += [0.1, 0.2, 0.3, 0.4, 0.5]
    row = tools.row(tools.summary(tools.measures(control, "Control", "control"), tools.measures(ours)))
    assert row["verdict"] == LEVEL and (row["differing_cases"], row["paired_cases"]) == (5, 20)
    assert "Dice differs in 5 of 20 cases: the test cannot reach p < 0.05" in row["note"]


def test_difference_is_paired_by_case(tools: SimpleNamespace) -> None:
    control = tools.dice(0, (3, 12))
    gain = np.linspace(0.01, 0.03, 12)
    row = tools.row(tools.summary(tools.measures(control, "Control", "control"), tools.measures(control + gain)))
    assert row["difference"] == pytest.approx(0.02)
    assert row["difference_low"] < 0.02 < row["difference_high"]
    assert row["p"] == row["p_corrected"] == pytest.approx(2 / 2**12)
    assert row["verdict"] == AHEAD
    tables = tools.measures(control[:1], "Control", "control"), tools.measures(control[:1] + gain)
    one_seed = tools.row(tools.summary(*tables))
    # The spread between cases is in both, and cancels out.
    assert one_seed["difference_high"] - one_seed["difference_low"] < 0.3 * (one_seed["high"] - one_seed["low"])
    assert "1 training: interval over cases only" in one_seed["note"]


def test_holm_counts_all_methods_and_numbers_of_labelled_cases_but_no_control_or_upper_bound(
    tools: SimpleNamespace,
) -> None:
    tables = []
    for labelled in (4, 8):
        control = tools.dice(labelled, (1, 10))
        tables += [tools.measures(control, "Control", "control", labelled)]
        tables += [tools.measures(control + tools.dice(i, (1, 10), 0.02), f"M{i}", labelled=labelled) for i in range(2)]
    summary = tools.summary(*tables, tools.measures(tools.dice(9, (1, 10)), "Bound", "upper bound", 50))
    tested = summary[summary["p"].notna()]
    pairs = sorted(zip(tested["labelled"], tested["method"], strict=True))
    assert pairs == [(4, "M0"), (4, "M1"), (8, "M0"), (8, "M1")]
    assert set(tested["metric"]) == {"dice"} and set(tested["label"]) == {LABEL_MEAN}
    assert tested["p_corrected"].tolist() == pytest.approx(holm(tested["p"].to_numpy()).tolist())
    assert summary["p"].notna().sum() == 4


def test_gap_closed_is_the_share_of_the_way_to_the_upper_bound_for_every_metric(tools: SimpleNamespace) -> None:
    control = tools.dice(0, (2, 15), 0.6)
    tables = [tools.measures(control, "Control", "control"), tools.measures(control + 0.05),
              tools.measures(control + 0.2, "Bound", "upper bound", 100)]  # fmt: skip
    summary = tools.summary(*tables)
    for metric in METRICS:
        row = tools.row(summary, metric=metric)
        assert row["gap_closed"] == pytest.approx(0.25)
        assert row["gap_low"] < 0.25 < row["gap_high"]
    for name in ("Control", "Bound"):
        assert math.isnan(tools.row(summary, name)["gap_closed"])


def test_gap_is_undefined_where_the_upper_bound_is_not_ahead(tools: SimpleNamespace) -> None:
    control = tools.dice(0, (2, 15), 0.6)
    ours = tools.measures(control + 0.05)
    no_gap = tools.measures(tools.dice(1, (2, 15), 0.6), "Bound", "upper bound", 100)
    row = tools.row(tools.summary(tools.measures(control, "Control", "control"), ours, no_gap))
    assert math.isnan(row["gap_closed"]) and "upper bound - control includes 0" in row["note"]
    behind = tools.measures(control - 0.2, "Bound", "upper bound", 100)
    for metric in METRICS:
        row = tools.row(tools.summary(tools.measures(control, "Control", "control"), ours, behind), metric=metric)
        assert math.isnan(row["gap_closed"]) and "upper bound is behind" in row["note"]


def test_data_sets_with_one_number_of_labelled_cases_are_trainings_of_their_own(tools: SimpleNamespace) -> None:
    values = tools.dice(0, (2, 12))
    gain = np.linspace(0.01, 0.03, 12)
    tables = []
    for index, dataset in enumerate(("Dataset001_A", "Dataset002_B")):
        # The labelled cases of B are much better chosen.
        tables += [tools.measures(values + 0.2 * index, "Control", "control", dataset=dataset),
                   tools.measures(values + 0.2 * index + gain, dataset=dataset)]  # fmt: skip
    row = tools.row(tools.summary(*tables))
    assert row["trainings"] == 4 and row["note"] == ""
    assert row["sd_trainings"] == pytest.approx(np.concatenate([values.mean(1), values.mean(1) + 0.2]).std(ddof=1))
    assert row["high"] - row["low"] > 0.1
    # What a draw of labelled cases does to both cancels out.
    assert row["difference"] == pytest.approx(0.02)
    assert row["difference_high"] - row["difference_low"] < 0.02
    only_a = tools.row(tools.summary(*tables[:3]))
    assert only_a["difference"] == pytest.approx(0.02)
    left_out = "data set Dataset002_B seed 0, data set Dataset002_B seed 1"
    assert f"compared without {left_out} of the control" in only_a["note"]


def test_a_study_of_ten_methods_is_summarised_in_seconds(tools: SimpleNamespace) -> None:
    labels = ("liver", "kidney", "spleen")
    control = tools.dice(0, (3, 60), 0.6)
    tables = [tools.measures(control, "Control", "control", labels=labels),
              tools.measures(control + 0.2, "Bound", "upper bound", 100, labels=labels)]  # fmt: skip
    tables += [tools.measures(control + tools.dice(i, (3, 60), 0.05), f"M{i}", labels=labels) for i in range(10)]
    table = pd.concat(tables, ignore_index=True)
    before = time.process_time()
    summarise(table)
    assert time.process_time() - before < 20


def test_comparison_uses_the_cases_that_both_have(tools: SimpleNamespace) -> None:
    control = tools.dice(0, (1, 10))
    ours = control[:, 2:] + 0.1
    cases = [f"case_{index:02d}" for index in range(2, 10)]
    row = tools.row(tools.summary(tools.measures(control, "Control", "control"), tools.measures(ours, cases=cases)))
    assert row["paired_cases"] == 8 and row["difference"] == pytest.approx(0.1)
    assert "compared on the 8 cases that both have" in row["note"]
    others = tools.measures(ours, cases=[case + "x" for case in cases])
    apart = tools.row(tools.summary(tools.measures(control, "Control", "control"), others))
    assert apart["paired_cases"] == 0 and math.isnan(apart["p"]) and apart["verdict"] == ""


@pytest.mark.parametrize("cases", [1, 5])
def test_few_cases_are_said_to_be_too_few(tools: SimpleNamespace, cases: int) -> None:
    control = tools.dice(0, (2, cases))
    row = tools.row(tools.summary(tools.measures(control, "Control", "control"), tools.measures(control + 0.1)))
    assert f"Dice differs in {cases} of {cases} cases: the test cannot reach p < 0.05" in row["note"]
    assert row["verdict"] == LEVEL
    assert math.isnan(row["low"]) == (cases == 1)


def test_missing_control_leaves_the_means(tools: SimpleNamespace) -> None:
    control_of_other_count = tools.measures(tools.dice(0, (2, 8)), "Control", "control", 8)
    row = tools.row(tools.summary(tools.measures(tools.dice(0, (2, 8))), control_of_other_count))
    assert math.isnan(row["p"]) and row["verdict"] == "" and row["note"] == "no control"
    assert not math.isnan(row["mean"])


def test_a_difference_that_another_training_could_turn_round_is_no_verdict(tools: SimpleNamespace) -> None:
    """All cases are lower in the mean over three trainings, because of one of them."""
    control = tools.dice(0, (3, 20))
    ours = control + np.array([0.02, 0.02, -0.2])[:, None] + tools.dice(1, (3, 20)) * 0.001
    row = tools.row(tools.summary(tools.measures(control, "Control", "control"), tools.measures(ours)))
    assert row["p_corrected"] < 0.001 and row["difference_low"] < 0 < row["difference_high"]
    assert row["verdict"] == LEVEL
