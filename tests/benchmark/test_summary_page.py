"""The summary page of docs/results says what the committed measures say: every Dice, and who is ahead or behind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from nnunetv2_semi.benchmark.report.summary import rows_of_metric, summarise
from nnunetv2_semi.benchmark.report.uncertainty import AHEAD, BEHIND

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
COLUMNS = {"second control": "labelled mixing", "Mix": "Mix", "Mean Teacher": "MeanTeacher", "FixMatch": "FixMatch",
           "RCPS": "RCPS", "stock nnU-Net": "Stock"}
MARKS = {AHEAD: "**", BEHIND: "*"}  # none: not distinguishable


class Row(NamedTuple):
    cells: dict[str, str]
    studies: list[Path]


def table() -> list[Row]:
    """Rows whose cell of seeds links to measures; the first study has the row's own numbers, the others remarks'."""
    lines = [line for line in (RESULTS / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    head, _, *rest = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rest = rest[: next(i for i, cells in enumerate(rest) if len(cells) != len(head))]  # another table follows
    rows = [dict(zip(head, cells, strict=True)) for cells in rest]
    linked = [(cells, re.findall(r"\((studies/\w+_measures\.csv)\)", cells["seeds"])) for cells in rows]
    return [Row(cells, [RESULTS / path for path in paths]) for cells, paths in linked if paths]


def domain_of(row: Row) -> str | None:
    return next((word for word in ("cine", "LGE") if row.cells["data"].endswith(f", {word}")), None)


def measures_of(row: Row, study: Path) -> pd.DataFrame:
    measures = pd.read_csv(study)
    domain = domain_of(row)
    return measures if domain is None else measures[measures.domain == domain]


def dice(measures: pd.DataFrame, *more: str) -> pd.Series:
    """Mean of each method, labelled count and role, and of each value of ``more`` columns, in three digits."""
    return measures.groupby(["method", "labelled", "role", *more])["dice"].mean().map("{:.3f}".format)


def labelled(row: Row) -> int:
    numbers = [int(number) for number in re.findall(r"\d+", row.cells["labelled"].split(" of ")[0])]
    return sum(numbers)  # "5 + 5 of 100"


ROWS = table()


def test_table_is_found():
    assert len(ROWS) > 15


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.studies[0].name.removesuffix("_measures.csv"))
def test_row_says_what_the_measures_say(row):
    measures = measures_of(row, row.studies[0])
    means = dice(measures)
    own = means.xs(labelled(row), level="labelled")
    assert row.cells["first control"].split(";")[0] == own.xs("control", level="role").item()
    summary = rows_of_metric(summarise(measures))
    summary = summary[(summary.role == "method") & (summary.labelled == labelled(row))]
    verdicts = summary.set_index("method")["verdict"]
    for column, method in COLUMNS.items():
        cell = row.cells[column]
        assert bool(cell) == (method in own.index), f"{column}: in the table or in the measures, not in both"
        if cell:
            mark, number = re.match(r"(\**)([\d.]+)", cell).groups()
            assert number == own[method].item(), column
            if not domain_of(row):  # the report does not test domains
                assert mark == MARKS.get(verdicts[method], ""), column
    remarks = pd.concat([dice(measures_of(row, study), *folds) for study in row.studies for folds in ((), ("fold",))])
    assert row.cells["upper bound"] in {"", *remarks[remarks.index.get_level_values("role") == "upper bound"]}
    written = re.findall(r"0\.\d{3}", " ".join(row.cells.values()))
    assert [number for number in written if number not in set(remarks)] == []


def test_seeds_are_those_of_the_measures():
    for row in ROWS:
        measures = measures_of(row, row.studies[0])
        seeds = measures[measures.labelled == labelled(row)].groupby("method")["seed"].nunique()
        assert {int(re.match(r"\[(\d)", row.cells["seeds"])[1])} == set(seeds), row.cells["data"]
