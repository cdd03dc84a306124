"""The sections of a report: what its numbers say, in tables, pictures and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from nnunetv2_semi.benchmark.report.domains import Domains, domains_of_groups, membership_note
from nnunetv2_semi.benchmark.report.measures import dice_of_cases
from nnunetv2_semi.benchmark.report.page import Section, Table
from nnunetv2_semi.benchmark.report.pairing import UNFAIR, Arm, control_of, pair_of, upper_bound_of
from nnunetv2_semi.benchmark.report.plots import Style, curves_plot, efficiency_plot, paired_plot, styles_of
from nnunetv2_semi.benchmark.report.runs import PredictedRun
from nnunetv2_semi.benchmark.report.summary import rows_of_metric
from nnunetv2_semi.benchmark.report.tables import (
    Runs,
    counted,
    domain_tables,
    empties_table,
    labelled_of,
    main_table,
    metrics_table,
    name_of,
    number,
    p_value,
    rows_of,
    settings_table,
    summary_row,
    trainings_table,
    with_count,
    with_interval,
)
from nnunetv2_semi.benchmark.report.uncertainty import BEHIND, FEWEST_CASES, SIGNIFICANT, smallest_corrected_p
from nnunetv2_semi.benchmark.report.worst_cases import worst_cases_picture
from nnunetv2_semi.benchmark.study.trained import curves_of


def arms_of(runs: Sequence[PredictedRun]) -> dict[Arm, list[PredictedRun]]:
    """Runs that differ in nothing but data set, seed and fold, by number of labelled cases; the upper bound is last."""
    arms: dict[Arm, list[PredictedRun]] = {}
    for run in runs:
        arms.setdefault(Arm(run.group, run.labelled, run.method, run.role), []).append(run)
    groups = list(dict.fromkeys(arm.group for arm in arms))
    roles = ("control", "method", "upper bound")

    def place(arm: Arm) -> tuple[int, bool, int, int]:
        return groups.index(arm.group), arm.role == roles[2], arm.labelled or 0, roles.index(arm.role)

    return {arm: arms[arm] for arm in sorted(arms, key=place)}


def sections_of(
    runs: Sequence[PredictedRun], measures: pd.DataFrame, summary: pd.DataFrame, tolerance_mm: float, worst_cases: int
) -> list[Section]:
    """All sections of the page.

    Args:
        runs: What was measured.
        measures: Table of ``measure_runs``, with the rows of ``label_means``.
        summary: Table of ``summarise``, with the rows of ``with_domain_rows``.
        tolerance_mm: Of NSD.
        worst_cases: Cases shown for each method and number of labelled cases.
    """
    arms, domains = arms_of(runs), domains_of_groups(runs)
    of_domains = summary[summary["domain"].notna()] if domains else summary.iloc[:0]
    summary = summary[summary["domain"].isna()] if domains else summary
    primary = rows_of_metric(summary)
    sections = [_result(arms, primary)]
    groups = list(dict.fromkeys(arm.group for arm in arms))
    for group in groups:
        own = {arm: arm_runs for arm, arm_runs in arms.items() if arm.group == group}
        if len(groups) > 1:
            sections.append(Section(group))
        level = 3 if len(groups) > 1 else 2
        by_domain = of_domains[of_domains["group"] == group]
        sections.append(_dice(own, measures, summary, by_domain, domains.get(group, {}), level))
        sections += _group_sections(own, measures, summary, worst_cases, level)
    return [*sections, _definitions(tolerance_mm)]


def _result(arms: Runs, primary: pd.DataFrame) -> Section:
    points = []
    several = len({arm.group for arm in arms}) > 1
    for arm in (arm for arm in arms if arm.role == "method"):
        row = summary_row(primary, arm)
        control = control_of(arm, arms)
        name = with_count(f"{arm.method}, {arm.group}" if several else arm.method, arm)
        if control is None or row["paired_cases"] == 0:
            lacking = "no control" if control is None else "no case in common with the control"
            dice = with_interval(row["mean"], row["low"], row["high"])
            points.append(f"**{name}: not compared,** because there is {lacking}. Dice {dice}.")
            continue
        difference = with_interval(row["difference"], row["difference_low"], row["difference_high"], signed=True)
        found = f"{row['verdict']} the control.**" if row["verdict"] else f"no verdict,** because it was {UNFAIR}."
        corrected = f", corrected p {p_value(row['p_corrected'])}" if row["verdict"] else ""
        limits = [note[0].upper() + note[1:] for note in row["note"].split("; ") if note.startswith("compared ")]
        points.append(". ".join([
            f"**{name}: {found} Dice {number(row['mean'])} against {number(summary_row(primary, control)['mean'])}; "
            f"difference {difference}{corrected}, {counted(row['paired_cases'], 'case')}, "
            f"{counted(row['trainings'], 'training')}", *limits
        ]) + ".")  # fmt: skip
    paired = [int(count) for count in primary.loc[primary["p"].notna(), "differing_cases"]]
    paragraphs = [
        f"Ahead or behind: p below {SIGNIFICANT:g} in Wilcoxon's signed-rank test of the cases' Dice, after Holm's "
        f"correction for {counted(len(paired), 'comparison')}, and an interval of the difference without 0. Brackets: "
        "95 % intervals, over cases and trainings."
    ] if paired else ["Nothing was tested against a control."]  # fmt: skip
    if paired and (smallest := smallest_corrected_p(paired)) >= SIGNIFICANT:
        paragraphs.append(
            f"**No method can be ahead or behind here:** with {counted(max(paired), 'case')} that differ and "
            f"{counted(len(paired), 'comparison')} the test cannot give a corrected p below {p_value(smallest)}."
        )
    if paired and primary["trainings"].min() == 1:
        paragraphs.append(
            "**Some rows have one training.** Their interval and test say how such rows differ on other cases, not "
            "what another training would give."
        )
    return Section("Result", paragraphs=paragraphs, points=points)


def _dice(
    arms: Runs, measures: pd.DataFrame, summary: pd.DataFrame, of_domains: pd.DataFrame, domains: Domains, level: int
) -> Section:
    rows = {arm: summary_row(summary, arm) for arm in arms}
    bound = upper_bound_of(next(iter(arms)), arms)
    trained = pd.DataFrame([row for arm, row in rows.items() if arm.role != "upper bound"])
    group, styles = next(iter(arms)).group, styles_of(arms)
    efficiency = [efficiency_plot(trained, rows[bound] if bound else None, styles, group)] if len(trained) else []
    note = membership_note(measures.loc[measures["group"] == group, "case"].unique(), domains)
    by_domain = domain_tables(arms, of_domains, note) if domains else []
    paragraphs = [f"Domains of dataset.json. {note}"] if domains and not by_domain else []
    return Section("Dice", paragraphs, tables=[main_table(rows), *by_domain], pictures=efficiency, level=level)


def _group_sections(
    arms: Runs, measures: pd.DataFrame, summary: pd.DataFrame, worst_cases: int, level: int
) -> list[Section]:
    rows = {arm: summary_row(summary, arm) for arm in arms}
    labels = list(dict.fromkeys(label for arm in arms for label in rows_of(summary, arm)["label"]))
    # With one label, its table would repeat that of the mean.
    shown = labels if len(labels) > 2 else labels[:1]
    pairs = []
    for arm in arms:
        if arm.role == "method" and (control := control_of(arm, arms)) is not None:
            pair = pair_of(rows_of(measures, arm), rows_of(measures, control))
            dice = dice_of_cases(pair.control), dice_of_cases(pair.own)
            pairs.append(paired_plot(*dice, control.method, arm.method, with_count(arm.group, arm)))
    differing, empties = settings_table(arms), empties_table(arms, measures)
    sections = [
        Section(
            "Case by case",
            ["A dot is a test case, mean over trainings. Above the line the method is higher than the control."]
            if pairs
            else [],
            pictures=pairs,
            level=level,
        ),
        Section("All metrics", tables=[metrics_table(arms, summary, label) for label in shown], level=level),
        Section(
            "Empty structures",
            [] if empties.rows else ["Every structure is in all truths and all predictions."],
            tables=[empties] if empties.rows else [],
            level=level,
        ),
        _training(arms, styles_of(arms), level),
        Section(
            "What was compared",
            tables=[trainings_table(arms, rows), *([differing] if differing.rows else [])],
            level=level,
        ),
    ]
    if worst_cases:
        pictures = [
            worst_cases_picture(arm_runs, rows_of(measures, arm), worst_cases, with_count(name_of(arm), arm))
            for arm, arm_runs in arms.items()
        ]
        sections.append(Section("Cases with the lowest Dice", pictures=pictures, level=level))
    return [section for section in sections if section.pictures or section.tables or section.paragraphs]


def _training(arms: Runs, styles: Mapping[str, Style], level: int) -> Section:
    table, skipped = [], []
    curves: dict[str, dict[str, list]] = {}
    for arm, runs in arms.items():
        seconds = [run.training_seconds for run in runs if run.training_seconds is not None]
        if seconds:
            table.append((labelled_of(arm), name_of(arm), str(len(seconds)), _duration(sum(seconds) / len(seconds)),
                          _duration(sum(seconds))))  # fmt: skip
        drawn = [training for run in runs if run.model and (training := curves_of(run.model)) is not None]
        if drawn:
            curves.setdefault(with_count(arm.group, arm), {})[arm.method] = drawn
        if len(drawn) < len(runs):
            skipped.append(f"{with_count(name_of(arm), arm)}: {len(runs) - len(drawn)} of {len(runs)}")
    columns = ("Labelled", "Method", "Models", "Wall time of one", "Of all")
    paragraphs = [] if table else ["The wall time of the trainings is not known."]
    if skipped:
        paragraphs.append(f"Models without curves (no final checkpoint): {'; '.join(skipped)}.")
    times = [Table("Time of training", columns, table, headers=2)] if table else []
    pictures = [curves_plot(drawn, styles, where) for where, drawn in curves.items()]
    return Section("Training", paragraphs, tables=times, pictures=pictures, level=level)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 1 else f"{minutes:.1f} min" if minutes < 60 else f"{minutes / 60:.1f} h"


def _definitions(tolerance_mm: float) -> Section:
    return Section("What the numbers are", points=[
        "**Dice, Jaccard**: overlap of truth and prediction in voxels of the original image, 0 to 1.",
        "**HD95**: the 95th percentile of the distances from the surface voxels of one to those of the other, in each "
        "direction; the larger of the two. **ASD**: the mean of these distances, surface voxels of both pooled.",
        f"**NSD**: share of both surfaces, by area, that is within {tolerance_mm:g} mm of the other.",
        "**Images without spacing** (.png, .tif without .json): a pixel counts as 1 mm.",
        "**Empty structures** are counted, not left out. In neither truth nor prediction: Dice, Jaccard and NSD 1, "
        "HD95 and ASD 0. In one of them: Dice, Jaccard and NSD 0, HD95 and ASD the diagonal of the image.",
        "**Training**: one seed on one data set; its folds are averaged.",
        "**Mean**: over labels, then folds, then trainings of each case, then cases. **SD of cases**: of the cases' "
        "means. **SD of trainings**: of the trainings' means.",
        "**Intervals**: percentile bootstrap, trainings and cases drawn with replacement; cases alone where there is "
        "one training. With two or three trainings they are too narrow.",
        "**Compared** with the control of as many labelled cases are the models of the same data set, seed and fold; "
        "where they share no seed, those of the same data set and fold. Otherwise there is no verdict.",
        "**Test**: Wilcoxon's signed-rank test, two-sided, of the cases' means over labels, folds and trainings, where "
        f"these differ. Fewer than {FEWEST_CASES} cases that differ cannot give p below {SIGNIFICANT:g}. Dice "
        "alone is tested. Where mean and ranks point in different directions, or the interval of the difference, which "
        f"is over trainings too, includes 0, the method counts as neither ahead nor {BEHIND}.",
        "**Gap closed**: (method - control) / (upper bound - control), on the cases that all three have; undefined "
        "where the interval of upper bound - control includes 0.",
    ])  # fmt: skip
