"""Whether the trainings of a study can be compared, and still are what the study file says."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from nnunetv2_semi.benchmark.study.jobs import Job
from nnunetv2_semi.benchmark.study.study import Study
from nnunetv2_semi.benchmark.study.trainer_facts import Facts, Question, differences, trainer_facts
from nnunetv2_semi.data.raw_cases import cases_in
from nnunetv2_semi.errors import UserError, shown


def check_data_sets(jobs: Sequence[Job]) -> None:
    """Refuse data sets without test cases, an upper bound with other test cases, and one arm that is two data sets.

    Raises:
        UserError: One of these.
    """
    labelled: dict[tuple[str, int], str] = {}
    groups: dict[str, set[str]] = {}
    for job in {job.dataset: job for job in jobs}.values():
        _check_test_cases(job)
        groups.setdefault(job.role if job.role == "upper bound" else "compared", set()).add(job.group)
        other = labelled.setdefault((job.group, len(job.labelled_cases())), job.dataset)
        if other != job.dataset:
            raise UserError(f"{other} and {job.dataset} have the same test cases and as many labelled ones: the report "
                            "could not tell them apart. Make a study of each.")
    if not groups.get("upper bound", set()) <= groups["compared"]:
        raise UserError("The upper bound has other test cases than the data sets. 'nnunetv2_semi subset --labeled 5% "
                        "100% --test 20' makes data sets with the same ones.")


def _check_test_cases(job: Job) -> None:
    how = "'nnunetv2_semi subset --test' makes data sets with test cases."
    for folder in ("imagesTs", "labelsTs"):
        if not (job.raw / folder).is_dir() or not any((job.raw / folder).iterdir()):
            raise UserError(f"{job.raw / folder} is not there or empty: a study is judged on test cases. {how}")
    ending = job.dataset_json["file_ending"]
    images = cases_in(str(job.raw / "imagesTs"), ending)
    lacking = [case for case in job.test_cases() if case.removesuffix(ending) not in images]
    if lacking or not job.test_cases():
        raise UserError(f"{job.raw / 'labelsTs'}: {len(lacking)} labels have no image in imagesTs: "
                        f"{shown(lacking) or 'there are no labels with the ending of dataset.json'}.")


def check_unchanged(jobs: Sequence[Job]) -> None:
    """Refuse trainings begun with other settings or plans than the study has now, wherever they were begun.

    Raises:
        UserError: There are some; with the remedy.
    """
    changed = [job for job in jobs if job.begun_with() not in (None, job.made_with())]
    if changed:
        names = "\n  ".join(f"{job.folder}, model {job.model}" for job in changed[:5])
        raise UserError(f"{len(changed)} trainings of the study were begun with other settings or plans than the study "
                        f"file has now, or by another study of this name:\n  {names}\nGive the study file another "
                        "name, or remove these folders and models.")


def check_predicted_images(jobs: Sequence[Job]) -> None:
    """Refuse predictions of other images than the test cases have now.

    Raises:
        UserError: There are some; with the remedy.
    """
    changed = [job.name for job in jobs if not job.has_predicted_these_images()]
    if changed:
        raise UserError(f"Images of test cases changed, or are another copy, since {len(changed)} trainings predicted "
                        f"them: {shown(changed)}. nnunetv2_semi benchmark run predicts them anew, and trains none "
                        "again.")


def facts_of_jobs(jobs: Sequence[Job]) -> dict[str, Facts]:
    """Of every job, by its name; trainers are asked once for a data set and entry, since seeds change nothing."""
    questions: dict[tuple, Question] = {}
    for job in jobs:
        questions.setdefault((job.dataset, job.entry.name), Question(
            job.entry.trainer, str(job.plans_file), job.study.configuration, job.fold))
    answers = dict(zip(questions, trainer_facts(list(questions.values()), os.environ), strict=True))
    return {job.name: answers[job.dataset, job.entry.name] for job in jobs}


def check_comparable(study: Study, jobs: Sequence[Job], facts: Mapping[str, Facts]) -> None:
    """Refuse differences between the trainers on a data set, and between data sets for the control.

    Raises:
        UserError: There are some that the study does not call meant.
    """
    lines = []
    for dataset in dict.fromkeys(job.dataset for job in jobs):
        compared = {job.entry.name: facts[job.name] for job in jobs if job.dataset == dataset}
        lines += [f"{dataset}: {line}" for line in differences(compared, study.meant_differences)]
    control = {job.dataset: facts[job.name] for job in jobs if job.entry == study.control_entry}
    between = differences(control, study.meant_differences)
    if lines or between:
        advice = "" if not between else (
            f"Data sets can share one plan: plans_from: {jobs[0].dataset} (for data sets that are not planned yet).\n")
        raise UserError("The trainings of the study would not be comparable:\n  " + "\n  ".join(lines + between) +
                        f"\n{advice}Make them alike with settings:, or, where it is meant, name what differs in "
                        "meant_differences:.")
