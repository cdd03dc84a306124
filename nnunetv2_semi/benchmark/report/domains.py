"""Domains of test cases that dataset.json names: which cases they have, and the numbers of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import pandas as pd

from nnunetv2_semi.benchmark.report.measures import read_dataset_json
from nnunetv2_semi.benchmark.report.runs import PredictedRun
from nnunetv2_semi.benchmark.report.summary import REPEATS, summarise
from nnunetv2_semi.data.dataset_settings import is_of_domain, read_dataset_settings
from nnunetv2_semi.errors import UserError

# Name of each domain -> patterns of its case names.
Domains = Mapping[str, Sequence[str]]


def domains_of_groups(runs: Sequence[PredictedRun]) -> dict[str, Domains]:
    """The domains of each group that has any.

    Raises:
        UserError: data sets of one group name different domains.
    """
    found: dict[str, Domains] = {}
    files = {(run.group, run.dataset_json): run for run in runs}
    for group, file in files:
        domains = read_dataset_settings(read_dataset_json(file), str(file)).domains
        if domains and found.setdefault(group, domains) != domains:
            raise UserError(
                f'{file} names other "domains" than another data set of {group}. Their test cases are the same: name '
                "the same domains in all of them, or in one."
            )
    return found


def with_domain_column(measures: pd.DataFrame, domains: Mapping[str, Domains]) -> pd.DataFrame:
    """The table of ``measure_runs`` with ``domain`` after ``case``: empty, or names with "; " between them.

    Args:
        measures: Table of ``measure_runs``.
        domains: Of ``domains_of_groups``; where it is empty, the table stays as it is.
    """
    if not domains:
        return measures
    cases = zip(measures["group"], measures["case"], strict=True)
    column = ["; ".join(_domains_of(case, domains.get(group, {}))) for group, case in cases]
    table = measures.copy()
    table.insert(table.columns.get_loc("case") + 1, "domain", column)
    return table


def with_domain_rows(
    summary: pd.DataFrame,
    measures: pd.DataFrame,
    domains: Mapping[str, Domains],
    repeats: int = REPEATS,
    seed: int = 0,
) -> pd.DataFrame:
    """The summary with ``domain`` after ``label`` and, below, the rows of each domain's cases.

    ``domain`` is a missing value in the rows over all cases. Domains are not tested: their rows have no ``p``, which
    Holm's correction would count, and no ``verdict``. Domains without a case have no rows.

    Args:
        summary: Table of ``summarise``.
        measures: Table of ``measure_runs``.
        domains: Of ``domains_of_groups``; where it is empty, the summary stays as it is.
        repeats: Of the bootstrap.
        seed: Of the bootstrap's random numbers.
    """
    if not domains:
        return summary
    tables = [summary.assign(domain=None)]
    for group, of_group in domains.items():
        rows = measures[measures["group"] == group]
        for name, patterns in of_group.items():
            own = rows[[is_of_domain(case, patterns) for case in rows["case"]]]
            if len(own):
                tables.append(summarise(own, repeats, seed, tested=False).assign(domain=name))
    table = pd.concat(tables, ignore_index=True)
    table.insert(table.columns.get_loc("label") + 1, "domain", table.pop("domain"))
    return table


def membership_note(cases: Collection[str], domains: Domains) -> str:
    """How many of the test cases are of no domain and of several, and which domains have none."""
    of_cases = [_domains_of(case, domains) for case in cases]
    notes = [f"Of no domain: {sum(not names for names in of_cases)} of {len(of_cases)} test cases"]
    if several := sum(len(names) > 1 for names in of_cases):
        notes.append(f"Of several domains, and counted in each: {several}")
    if absent := [name for name in domains if not any(name in names for names in of_cases)]:
        notes.append(f"Without a test case: {', '.join(absent)}")
    return ". ".join(notes) + "."


def _domains_of(case: str, domains: Domains) -> list[str]:
    return [name for name, patterns in domains.items() if is_of_domain(case, patterns)]
