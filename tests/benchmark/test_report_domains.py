"""What a report says of the domains that dataset.json names, and that it says nothing where there are none."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from skimage import io

from nnunetv2_semi.benchmark.report.domains import membership_note, with_domain_column, with_domain_rows
from nnunetv2_semi.benchmark.report.measures import COLUMNS
from nnunetv2_semi.benchmark.report.page import Table
from nnunetv2_semi.benchmark.report.pairing import Arm
from nnunetv2_semi.benchmark.report.report import predictions_of, write_report
from nnunetv2_semi.benchmark.report.runs import PredictedRun
from nnunetv2_semi.benchmark.report.summary import rows_of_metric, summarise
from nnunetv2_semi.benchmark.report.tables import ABSENT, domain_tables
from nnunetv2_semi.errors import UserError

CASES = [*(f"A_{index}" for index in range(7)), *(f"B_{index}" for index in range(5)), "other"]
DOMAINS = {"a": ("A_*",), "b": ("B_?",)}
REPEATS = 100


@pytest.fixture
def measures(tools: SimpleNamespace) -> pd.DataFrame:
    """A control, a method that gains in one domain and loses in the other, and an upper bound; two trainings each."""
    control = tools.dice(0, (2, len(CASES)))
    gain = np.array([0.1 if case.startswith("A") else -0.05 for case in CASES])
    bound = tools.measures(control + 0.2, "Bound", "upper bound", 50, cases=CASES)
    ours = tools.measures(control + gain, cases=CASES)
    return pd.concat([tools.measures(control, "Control", "control", cases=CASES), ours, bound], ignore_index=True)


def with_domains(measures: pd.DataFrame, domains: dict[str, tuple[str, ...]] = DOMAINS) -> pd.DataFrame:
    return with_domain_rows(summarise(measures, REPEATS), measures, {"Test": domains}, REPEATS)


def tables_of(summary: pd.DataFrame) -> list[Table]:
    keys = summary[["group", "labelled", "method", "role"]].drop_duplicates().itertuples(index=False, name=None)
    return domain_tables({Arm(*key): [] for key in keys}, summary[summary["domain"].notna()], "A note.")


def test_rows_of_a_domain_are_those_of_a_study_with_its_cases_alone_without_the_test(measures: pd.DataFrame) -> None:
    summary = with_domains(measures)
    for domain, prefix in (("a", "A"), ("b", "B")):
        alone = summarise(measures[measures["case"].str.startswith(prefix)], REPEATS)
        rows = summary[summary["domain"] == domain].reset_index(drop=True)
        columns = [name for name in alone if name not in ("p", "p_corrected", "differing_cases", "verdict", "note")]
        pd.testing.assert_frame_equal(rows[columns], alone[columns])
        assert rows[["p", "p_corrected", "differing_cases"]].isna().all(axis=None) and set(rows["verdict"]) == {""}
        assert not rows["note"].str.contains("test").any()
    row = rows_of_metric(summary[(summary["domain"] == "b") & (summary["method"] == "Ours")]).iloc[0]
    assert row["difference"] == pytest.approx(-0.05) and row["gap_closed"] == pytest.approx(-0.25)
    assert (row["cases"], row["paired_cases"], row["trainings"]) == (5, 5, 2)


def test_rows_over_all_cases_do_not_change(measures: pd.DataFrame) -> None:
    plain = summarise(measures, REPEATS)
    summary = with_domain_rows(plain, measures, {"Test": DOMAINS}, REPEATS)
    over_all = summary[summary["domain"].isna()].drop(columns="domain")
    pd.testing.assert_frame_equal(over_all, plain)
    assert list(summary)[list(summary).index("label") + 1] == "domain"


def test_without_domains_the_tables_stay_as_they_are(measures: pd.DataFrame) -> None:
    summary = pd.DataFrame({"label": ["liver"]})
    assert with_domain_rows(summary, measures, {}) is summary
    assert with_domain_column(measures, {}) is measures


def test_measures_name_the_domains_of_each_case(measures: pd.DataFrame) -> None:
    table = with_domain_column(measures, {"Test": {**DOMAINS, "first": ("*_0",)}})
    named = dict(zip(table["case"], table["domain"], strict=True))
    assert (named["A_0"], named["A_1"], named["B_0"], named["other"]) == ("a; first", "a", "b; first", "")
    pd.testing.assert_frame_equal(table.drop(columns="domain"), measures)
    other_group = with_domain_column(measures.assign(group="Thorax"), {"Test": DOMAINS})
    assert set(other_group["domain"]) == {""}


def test_tables_have_a_row_per_method_and_a_column_per_domain(measures: pd.DataFrame) -> None:
    rows = with_domains(measures)
    dice, differences = tables_of(rows)
    assert dice.columns == differences.columns == ("Labelled", "Method", "a (7 cases)", "b (5 cases)")
    names = [("4", "Control (control)"), ("4", "Ours"), ("50", "Bound (upper bound)")]
    assert [row[:2] for row in dice.rows] == names and [row[:2] for row in differences.rows] == names[1:2]
    rows = rows_of_metric(rows[rows["method"] == "Ours"])
    for column, domain in enumerate("ab", start=2):
        row = rows[rows["domain"] == domain].iloc[0]
        assert dice.rows[1][column] == f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        assert differences.rows[0][column] == (
            f"{row['difference']:+.3f} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"
        )
    assert dice.note == "A note."


def test_other_numbers_of_cases_are_told_in_the_cell(measures: pd.DataFrame) -> None:
    # The method lacks two cases of one domain and all of the other.
    ours = measures["method"] == "Ours"
    lacking = measures["case"].isin(["A_0", "A_1"]) | measures["case"].str.startswith("B")
    dice, differences = tables_of(with_domains(measures[~(ours & lacking)]))
    assert [cell.split("], ")[1] for cell in (dice.rows[1][2], differences.rows[0][2])] == ["5 cases"] * 2
    assert dice.rows[1][3] == differences.rows[0][3] == ABSENT
    assert dice.columns[2] == "a (7 cases)" and dice.rows[0][2].endswith("]")


def test_domain_of_one_case_has_a_mean_without_interval_and_one_of_none_no_column(measures: pd.DataFrame) -> None:
    dice, differences = tables_of(with_domains(measures, {"one": ("other",), "none": ("C_*",)}))
    assert dice.columns == ("Labelled", "Method", "one (1 case)")
    assert re.fullmatch(r"0\.\d{3}", dice.rows[1][2]) and differences.rows[0][2] == "-0.050"


def test_without_a_control_there_are_no_differences(measures: pd.DataFrame) -> None:
    assert len(tables_of(with_domains(measures[measures["role"] == "method"]))) == 1


@pytest.mark.parametrize("domains, note", [
    (DOMAINS, "Of no domain: 1 of 13 test cases."),
    ({"all": ("*",)}, "Of no domain: 0 of 13 test cases."),
    ({"all": ("*",), "b": ("B_*",), "c": ("C_*",)},
     "Of no domain: 0 of 13 test cases. Of several domains, and counted in each: 5. Without a test case: c."),
])  # fmt: skip
def test_note_tells_cases_of_no_and_of_several_domains(domains: dict[str, tuple[str, ...]], note: str) -> None:
    assert membership_note(CASES, domains) == note


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[PredictedRun]:
    """A control and a method with predictions for six pictures of two domains and one of none."""
    folder = tmp_path_factory.mktemp("runs")
    for shift, name in enumerate(("labelsTs", "Ours", "Baseline")):
        (folder / name).mkdir()
        for index, case in enumerate(["A_0", "A_1", "A_2", "B_0", "B_1", "B_2", "other"]):
            picture = np.zeros((16, 20), np.uint8)
            picture[3:10, 4 + shift : 10 + index % 3] = 1
            io.imsave(folder / name / f"{case}.png", picture, check_contrast=False)
    write_dataset_json(folder / "dataset.json", None)
    named = [(name, folder / name) for name in ("Baseline", "Ours")]
    return predictions_of(named, folder / "labelsTs", folder / "dataset.json", control="Baseline")


def write_dataset_json(file: Path, domains: dict[str, str] | None) -> Path:
    content = {"labels": {"background": 0, "tumour": 1}, "file_ending": ".png", "channel_names": {"0": "R"},
               "name": "Test"}  # fmt: skip
    file.write_text(json.dumps(content if domains is None else {**content, "semi": {"domains": domains}}))
    return file


def report_of(runs: list[PredictedRun], folder: Path) -> dict[str, str]:
    """Content of the written files, by name."""
    write_report(runs, folder, "Two sites", worst_cases=0, num_processes=1)
    return {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}


@pytest.fixture(scope="module")
def plain(runs: list[PredictedRun], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return report_of(runs, tmp_path_factory.mktemp("report") / "plain")


def test_report_without_domains_says_nothing_of_them(plain: dict[str, str]) -> None:
    assert not any("domain" in content.lower() for content in plain.values())
    assert plain["measures.csv"].splitlines()[0] == ",".join(COLUMNS)


def test_report_gains_tables_after_the_main_one_and_is_else_the_same(
    runs: list[PredictedRun], plain: dict[str, str], tmp_path: Path
) -> None:
    file = write_dataset_json(tmp_path / "dataset.json", {"site a": "A_*", "site b": "B_*"})
    written = report_of([replace(run, dataset_json=file) for run in runs], tmp_path / "report")
    markdown = written["report.md"]
    main, first, second, rest = (markdown.index(title) for title in (
        "Dice of test cases, mean over labels:", "Dice of each domain, mean over labels:",
        "Difference to control in each domain:", "## All metrics"))  # fmt: skip
    assert main < first < second < rest
    assert "| Labelled | Method | site a (3 cases) | site b (3 cases) |" in markdown[first:second]
    assert "Of no domain: 1 of 7 test cases." in markdown[first:second]
    assert markdown[:first] + markdown[rest:] == plain["report.md"]
    assert all(title in written["report.html"] for title in ("Dice of each domain", "Difference to control in each"))
    measures, summary = (pd.read_csv(tmp_path / "report" / f"{name}.csv") for name in ("measures", "summary"))
    assert measures["domain"].fillna("").tolist() == ["site a"] * 3 + ["site b"] * 3 + [""] + (
        ["site a"] * 3 + ["site b"] * 3 + [""])  # fmt: skip
    assert measures.drop(columns="domain").to_csv(index=False) == plain["measures.csv"]
    over_all = summary[summary["domain"].isna()].drop(columns="domain")
    assert len(over_all) == len(plain["summary.csv"].splitlines()) - 1 and len(summary) == 3 * len(over_all)
    dice = measures[(measures["domain"] == "site b") & (measures["method"] == "Ours")]["dice"].mean()
    assert re.search(rf"\| Ours \| [^|]+ \| {dice:.3f} \[", markdown[first:second])


def test_only_the_group_with_domains_has_their_tables(runs: list[PredictedRun], tmp_path: Path) -> None:
    file = write_dataset_json(tmp_path / "dataset.json", {"site a": "A_*"})
    both = [*runs, *(replace(run, group="Other", dataset_json=file) for run in runs)]
    markdown = report_of(both, tmp_path / "report")["report.md"]
    assert markdown.count("Dice of each domain") == 1
    assert markdown.index("\n## Other") < markdown.index("Dice of each domain")


def test_domains_without_any_test_case_are_told(runs: list[PredictedRun], tmp_path: Path) -> None:
    file = write_dataset_json(tmp_path / "dataset.json", {"site c": "C_*"})
    markdown = report_of([replace(run, dataset_json=file) for run in runs], tmp_path / "report")["report.md"]
    assert "Domains of dataset.json. Of no domain: 7 of 7 test cases. Without a test case: site c." in markdown
    assert "Dice of each domain" not in markdown


def test_data_sets_of_a_group_must_not_name_other_domains(runs: list[PredictedRun], tmp_path: Path) -> None:
    files = [write_dataset_json(tmp_path / f"{name}.json", {name: "A_*"}) for name in ("a", "b")]
    mixed = [replace(run, dataset_json=file) for run, file in zip(runs, files, strict=True)]
    with pytest.raises(UserError, match=re.escape(f'{files[1]} names other "domains" than another data set of Test')):
        report_of(mixed, tmp_path / "report")
    one_named = [runs[0], mixed[1]]
    assert "b (3 cases)" in report_of(one_named, tmp_path / "report")["report.md"]
