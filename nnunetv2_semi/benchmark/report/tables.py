"""The tables of a report, and how its numbers are written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from nnunetv2_semi.benchmark.report.measures import LABEL_MEAN
from nnunetv2_semi.benchmark.report.page import Table
from nnunetv2_semi.benchmark.report.pairing import Arm, control_of
from nnunetv2_semi.benchmark.report.runs import PredictedRun
from nnunetv2_semi.benchmark.report.summary import PRIMARY, rows_of_metric
from nnunetv2_semi.benchmark.study.trained import settings_of

METRIC_NAMES = {"dice": "Dice", "jaccard": "Jaccard", "hd95_mm": "HD95 (mm)", "asd_mm": "ASD (mm)", "nsd": "NSD"}
ABSENT = "–"
Runs = Mapping[Arm, Sequence[PredictedRun]]


def name_of(arm: Arm) -> str:
    """Method, marked where it is the control or the upper bound."""
    return arm.method if arm.role == "method" else f"{arm.method} ({arm.role})"


def counted(count: int, noun: str) -> str:
    """1 case, 2 cases."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def number(value: float, metric: str = PRIMARY, signed: bool = False) -> str:
    """Two decimals for millimetres, three for shares, a dash for NaN."""
    if pd.isna(value):
        return ABSENT
    return f"{value:{'+' if signed else ''}.{2 if metric.endswith('_mm') else 3}f}"


def with_interval(value: float, low: float, high: float, metric: str = PRIMARY, signed: bool = False) -> str:
    """The value and, where there is one, its interval in brackets."""
    if pd.isna(value) or pd.isna(low):
        return number(value, metric, signed)
    return f"{number(value, metric, signed)} [{number(low, metric, signed)}, {number(high, metric, signed)}]"


def p_value(value: float) -> str:
    """Three decimals."""
    return ABSENT if pd.isna(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def labelled_of(arm: Arm) -> str:
    """Number of labelled cases."""
    return "unknown" if arm.labelled is None else str(arm.labelled)


def with_count(name: str, arm: Arm) -> str:
    """A name and, where it is known, the number of labelled cases."""
    return name if arm.labelled is None else f"{name}, {arm.labelled} labelled"


def rows_of(table: pd.DataFrame, arm: Arm) -> pd.DataFrame:
    """Those of one arm, of the measures or the summary."""
    labelled = table["labelled"].isna() if arm.labelled is None else (table["labelled"] == arm.labelled).fillna(False)
    return table[labelled & (table[["group", "method", "role"]] == [arm.group, arm.method, arm.role]).all(axis=1)]


def summary_row(summary: pd.DataFrame, arm: Arm, metric: str = PRIMARY, label: str = LABEL_MEAN) -> pd.Series:
    """The row of one arm, metric and label."""
    return rows_of_metric(rows_of(summary, arm), metric, label).iloc[0]


def main_table(rows: Mapping[Arm, pd.Series]) -> Table:
    """Dice with all that is said of it. ``rows``: of the summary."""
    columns = ("Labelled", "Method", "Dice", "SD of cases", "SD of trainings", "Difference to control", "Corrected p",
               "Gap closed")  # fmt: skip
    table = []
    for arm, row in rows.items():
        closed = ABSENT
        if not math.isnan(row["gap_closed"]):
            closed = f"{row['gap_closed']:.0%} [{row['gap_low']:.0%}, {row['gap_high']:.0%}]"
        table.append((
            labelled_of(arm), name_of(arm), with_interval(row["mean"], row["low"], row["high"]),
            number(row["sd_cases"]), number(row["sd_trainings"]),
            with_interval(row["difference"], row["difference_low"], row["difference_high"], signed=True),
            p_value(row["p_corrected"]), closed,
        ))  # fmt: skip
    noted: dict[str, list[str]] = {}
    for arm, row in rows.items():
        for note in filter(None, row["note"].split("; ")):
            noted.setdefault(note, []).append(f"{name_of(arm)} ({labelled_of(arm)})")
    notes = [f"{note}: {'all rows' if len(names) == len(rows) else ', '.join(names)}" for note, names in noted.items()]
    return Table("Dice of test cases, mean over labels", columns, table, ". ".join(notes), headers=2)


def domain_tables(arms: Runs, summary: pd.DataFrame, note: str) -> list[Table]:
    """Dice of each domain, and its differences to the control if there are any; no table without a domain.

    summary: Rows of the domains, of ``with_domain_rows``. note: on which cases are of which domain.
    """
    primary = rows_of_metric(summary)
    counts = {str(name): int(rows["cases"].max()) for name, rows in primary.groupby("domain", sort=False)}
    if not counts:
        return []
    means, differences = [], []
    for arm in arms:
        found = rows_of(primary, arm).set_index("domain").reindex(list(counts))
        names = (labelled_of(arm), name_of(arm))
        rows = [(row, counts[str(name)]) for name, row in found.iterrows()]
        means.append((*names, *(
            _of_cases(with_interval(row["mean"], row["low"], row["high"]), row["cases"], count) for row, count in rows
        )))  # fmt: skip
        if found["difference"].notna().any():
            differences.append((*names, *(
                _of_cases(with_interval(row["difference"], row["difference_low"], row["difference_high"], signed=True),
                          row["paired_cases"], count)
                for row, count in rows
            )))  # fmt: skip
    columns = ("Labelled", "Method", *(f"{name} ({counted(count, 'case')})" for name, count in counts.items()))
    tables = [Table("Dice of each domain, mean over labels", columns, means, note, headers=2)]
    if differences:
        untested = "Compared as above. Domains are not tested; the intervals are not corrected for their number."
        tables.append(Table("Difference to control in each domain", columns, differences, untested, headers=2))
    return tables


def _of_cases(cell: str, cases: float, expected: int) -> str:
    """With the number of cases where it is not that of the column."""
    return cell if pd.isna(cases) or cell == ABSENT or cases == expected else f"{cell}, {counted(int(cases), 'case')}"


def metrics_table(arms: Runs, summary: pd.DataFrame, label: str) -> Table:
    """All metrics of one label."""
    table = []
    for arm in arms:
        cells = []
        for metric in METRIC_NAMES:
            row = summary_row(summary, arm, metric, label)
            cells.append(with_interval(row["mean"], row["low"], row["high"], metric))
        table.append((labelled_of(arm), name_of(arm), *cells))
    return Table(label[0].upper() + label[1:], ("Labelled", "Method", *METRIC_NAMES.values()), table, headers=2)


def trainings_table(arms: Runs, rows: Mapping[Arm, pd.Series]) -> Table:
    """What was compared. ``rows``: of the summary."""

    def listed(values: Sequence[object]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value is not None)) or "unknown"

    table = [
        (labelled_of(arm), name_of(arm), str(rows[arm]["cases"]), listed([run.seed for run in runs]),
         listed([run.fold for run in runs]), listed([run.dataset for run in runs]),
         listed([run.model and run.model.parent.name for run in runs]))
        for arm, runs in arms.items()
    ]  # fmt: skip
    columns = ("Labelled", "Method", "Test cases", "Seeds", "Folds", "Data set", "Model")
    # Plain folders have no fold.
    parted = any(run.fold not in (None, "all") for runs in arms.values() for run in runs)
    note = (
        "Labelled: cases in labelsTr. A model of a fold other than all was trained on a part of them: the validation "
        "cases of its fold, by default one in five, are left out."
    )
    return Table("Trainings", columns, table, note if parted else "", headers=2)


def settings_table(arms: Runs) -> Table:
    """What differs in the configuration from the control of the same number of labelled cases."""
    labelled: dict[tuple[str, str, str, str], list[str]] = {}
    for arm, runs in arms.items():
        control = control_of(arm, arms) if arm.role == "method" else None
        # Plans depend on the data set.
        same_data = [run for run in arms[control] if run.dataset == runs[0].dataset] if control else []
        models = [runs[0].model, (same_data or arms[control])[0].model] if control else [None]
        own, other = (settings_of(model) for model in models if model) if all(models) else ({}, {})
        rows = [(arm.method, name, value, other[name]) for name, value in own.items()
                if name in other and value != other[name] and name != "semi.seed"]  # fmt: skip
        if only := ", ".join(f"{name.removeprefix('semi.')} {own[name]}" for name in own if name not in other):
            rows.append((arm.method, "only here", only, ABSENT))
        for row in rows:
            labelled.setdefault(row, []).append(labelled_of(arm))
    table = [
        (row[0], ", ".join(counts), *row[1:]) for row, counts in sorted(labelled.items(), key=lambda item: item[0][0])
    ]
    columns = ("Method", "Labelled", "Setting", "Value", "Of the control")
    return Table("Settings that differ from the control's", columns, table)


def empties_table(arms: Runs, measures: pd.DataFrame) -> Table:
    """How often a structure is in one of truth and prediction, or in neither."""
    table = []
    for arm in arms:
        rows = rows_of(measures, arm)
        for label, own in rows[rows["label"] != LABEL_MEAN].groupby("label", sort=False):
            truth, prediction = own["truth_empty"].astype(bool), own["prediction_empty"].astype(bool)
            if (truth | prediction).any():
                counts = ((truth & prediction).sum(), (~truth & prediction).sum(), (truth & ~prediction).sum())
                table.append((labelled_of(arm), name_of(arm), str(label), *map(str, counts), str(len(own))))
    columns = ("Labelled", "Method", "Label", "In neither", "Missed", "Only predicted", "Of")
    return Table("Predictions with an empty side", columns, table, headers=2)
