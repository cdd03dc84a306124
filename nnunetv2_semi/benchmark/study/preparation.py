"""What happens before a study's first training: checks, plans, preprocessing, splits."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_semi.benchmark.study.comparability import (
    check_comparable,
    check_data_sets,
    check_unchanged,
    facts_of_jobs,
)
from nnunetv2_semi.benchmark.study.jobs import Folders, Job, jobs_of
from nnunetv2_semi.benchmark.study.planned_data import (
    check_data_unchanged,
    check_test_cases,
    note_data,
    plan_and_preprocess,
    prepare_unlabelled_cases,
    write_split,
)
from nnunetv2_semi.benchmark.study.study import Entry, Study
from nnunetv2_semi.data.atomic_files import write_json_whole
from nnunetv2_semi.data.raw_cases import UNLABELLED_FOLDER
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.trainer_classes import method_class


@dataclass(frozen=True)
class PreparedStudy:
    """The trainings of a study, and how many epochs each takes (by job name)."""

    study: Study
    jobs: list[Job]
    num_epochs: Mapping[str, int]


def list_jobs(study: Study) -> list[Job]:
    """All trainings of a study. Raises UserError where a data set cannot be used."""
    folders = Folders.from_environment()
    asked = [*study.datasets, *([] if study.upper_bound is None else [study.upper_bound])]
    datasets = {dataset: full_name(dataset, folders.raw) for dataset in asked}
    if len(set(datasets.values())) < len(datasets):
        raise UserError("The study names a data set twice (the upper bound is a data set of its own, with all labels).")
    return list(jobs_of(study, datasets, study.plans or _plans_of_planner(study.planner), folders))


def prepare(study: Study) -> PreparedStudy:
    """Check a study, plan and preprocess its data sets where that is not done.

    Raises:
        UserError: Something stands in the way of a training, trainings that are compared differ in what they should
            not, or a finished one was made with other settings or other data.
        CommandFailed: nnU-Net's planning or preprocessing failed.
    """
    jobs = list_jobs(study)
    by_dataset: dict[str, list[Job]] = {}
    for job in jobs:
        by_dataset.setdefault(job.dataset, []).append(job)
    # what can be known without plans comes first: planning may take hours
    check_data_sets(jobs)
    unlabelled = {name for name, its in by_dataset.items() if _check_trainers(its)}
    study.folder.mkdir(parents=True, exist_ok=True)
    source = None if study.plans_from is None else full_name(study.plans_from, jobs[0].folders.raw)
    for its in by_dataset.values():
        check_data_unchanged(its)
    for dataset in sorted(by_dataset, key=lambda name: name != source):
        plan_and_preprocess(study, dataset, jobs[0].plans, jobs[0].folders, source)
    check_unchanged(jobs)
    for job in jobs:
        write_json_whole(str(job.plans_file), job.own_plans())
    facts = facts_of_jobs(jobs)
    check_comparable(study, jobs, facts)
    for dataset, its in by_dataset.items():
        write_split(study, its[0])
        check_test_cases(its[0])
        if dataset in unlabelled:
            prepare_unlabelled_cases(next(job for job in its if job.role != "upper bound"))
        note_data(its[0])
    return PreparedStudy(study, jobs, {name: int(str(single["num_epochs"])) for name, single in facts.items()})


def full_name(dataset: int | str, raw: Path) -> str:
    """Of a data set given by id or name. Raises UserError where there is none, or several."""
    found = [folder.name for folder in raw.glob("Dataset*_*") if folder.name == dataset or
             (isinstance(dataset, int) and folder.name.startswith(f"Dataset{dataset:03d}_"))]
    if len(found) != 1:
        raise UserError(f"Data set {dataset} is {'several' if found else 'not'} in {raw}"
                        f"{': ' + ', '.join(found) if found else ''}.")
    return found[0]


def _plans_of_planner(planner: str) -> str:
    """Name of the plans that a planner writes."""
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = os.path.join(nnunetv2.__path__[0], "experiment_planning")
    cls = recursive_find_python_class(folder, planner, current_module="nnunetv2.experiment_planning")
    if cls is None:
        raise UserError(f"nnU-Net finds no planner {planner}. nnunetv2_semi doctor says whether ours are visible.")
    return str(inspect.signature(cls.__init__).parameters["plans_name"].default)


def _check_trainers(jobs: Sequence[Job]) -> bool:
    """Refuse unknown trainers and settings of one data set's jobs; whether any of them needs unlabelled cases."""
    uses_unlabelled = False
    for entry in {job.entry.name: job.entry for job in jobs}.values():
        needs = _needs_unlabelled(entry, jobs[0].study)
        if needs and not (jobs[0].raw / UNLABELLED_FOLDER).is_dir():
            advice = "The control must not need them where there is an upper bound." if jobs[0].role == "upper bound" \
                else "For a data set with all labels use upper_bound:."
            raise UserError(f"{jobs[0].raw / UNLABELLED_FOLDER} is not there, but {entry.name} needs unlabelled cases. "
                            f"{advice}")
        uses_unlabelled |= needs
    return uses_unlabelled


def _needs_unlabelled(entry: Entry, study: Study) -> bool:
    from nnunetv2_semi.methods.settings import merged_settings, settings_from_plan

    method = method_class(entry.trainer)
    if method is not None:
        settings_from_plan(method.Settings, merged_settings(study.settings, entry.settings), method.name)
    return entry.selftrain is not None or (method is not None and method.uses_unlabelled)
