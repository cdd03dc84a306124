"""Which measures of a method and its control are compared: seen in the summary of a study."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pandas as pd
import pytest

from nnunetv2_semi.benchmark.report.uncertainty import AHEAD, LEVEL
from nnunetv2_semi.errors import UserError


def test_comparison_uses_the_seeds_that_both_have(tools: SimpleNamespace) -> None:
    values = tools.dice(0, (3, 10))
    control, two = tools.measures(values, "Control", "control"), tools.measures(values[:2] + 0.05)
    row = tools.row(tools.summary(control, two))
    assert row["difference"] == pytest.approx(0.05) and row["verdict"] == AHEAD
    assert row["note"] == "compared without seed 2 of the control"
    row = tools.row(tools.summary(tools.measures(values[1:], "Control", "control", seeds=[1, 2]), two))
    assert row["difference"] == pytest.approx(0.05) and row["mean"] == pytest.approx(values[:2].mean() + 0.05)
    assert "compared without seed 0, which the control lacks; compared without seed 2 of the control" in row["note"]


def test_method_with_other_seeds_than_the_control_is_compared_with_all_of_them(tools: SimpleNamespace) -> None:
    control = tools.dice(0, (3, 10))
    tables = tools.measures(control, "Control", "control"), tools.measures(control[:2] + 0.05, seeds=[5, 6])
    row = tools.row(tools.summary(*tables))
    assert row["difference"] == pytest.approx((control[:2].mean(0) + 0.05 - control.mean(0)).mean())
    assert row["note"] == "compared with other seeds of the control" and row["verdict"] != ""


def test_comparison_uses_the_folds_that_both_have(tools: SimpleNamespace) -> None:
    # Fold 1 is better than fold 0 for whatever method.
    values = tools.dice(0, (2, 20))
    control = [tools.measures(values + 0.1 * fold, "Control", "control", fold=str(fold)) for fold in (0, 1)]
    row = tools.row(tools.summary(*control, tools.measures(values + 0.1, fold="1")))
    assert row["difference"] == 0 and row["p"] == 1 and row["verdict"] == LEVEL
    assert "compared without seed 0 fold 0, seed 1 fold 0 of the control" in row["note"]
    row = tools.row(tools.summary(*control, tools.measures(values + 0.1, fold="1", seeds=[5, 6])))
    assert row["difference"] == pytest.approx(0) and "compared with other seeds of the control" in row["note"]


def test_method_with_other_folds_than_the_control_has_no_verdict(tools: SimpleNamespace) -> None:
    values = tools.dice(0, (2, 20))
    control = [tools.measures(values, "Control", "control", fold=fold) for fold in "01"]
    bound = tools.measures(values + 0.2, "Bound", "upper bound", 100)
    row = tools.row(tools.summary(*control, tools.measures(values + 0.1, fold="2"), bound))
    assert row["difference"] == pytest.approx(0.1) and row["difference_low"] < 0.1 < row["difference_high"]
    assert row["verdict"] == "" and math.isnan(row["p_corrected"]) and math.isnan(row["gap_closed"])
    assert "no verdict: trained on other data sets or folds than the control" in row["note"]


def test_other_seeds_with_other_shares_of_folds_have_no_verdict(tools: SimpleNamespace) -> None:
    values = tools.dice(0, (2, 20))
    control = [tools.measures(values, "Control", "control", fold=fold) for fold in "01"]
    ours = tools.measures(values, fold="0", seeds=[5, 6]), tools.measures(values[:1] + 0.1, fold="1", seeds=[5])
    assert tools.row(tools.summary(*control, *ours))["verdict"] == ""
    ours = tools.measures(values, fold="0", seeds=[5, 6]), tools.measures(values + 0.1, fold="1", seeds=[5, 6])
    assert tools.row(tools.summary(*control, *ours))["verdict"] == AHEAD


def test_seeds_of_unknown_number_are_one_seed(tools: SimpleNamespace) -> None:
    control = tools.dice(0, (1, 8))
    other = tools.measures(control, "Control", "control", None, seeds=[None])
    row = tools.row(tools.summary(other, tools.measures(control + 0.1, labelled=None, seeds=[None])))
    assert row["trainings"] == 1 and row["difference"] == pytest.approx(0.1) and pd.isna(row["labelled"])


def test_two_controls_are_refused(tools: SimpleNamespace) -> None:
    values = tools.dice(0, (1, 8))
    controls = [tools.measures(values, name, "control") for name in "AB"]
    with pytest.raises(UserError, match="two controls for one number of labelled cases: A and B"):
        tools.summary(*controls, tools.measures(values))
