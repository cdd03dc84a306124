"""What happens before a study's first training: checks, plans and preprocessing."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_semi.benchmark.jobs import Folders, Job, jobs_of
from nnunetv2_semi.benchmark.study import Study
from nnunetv2_semi.benchmark.trainer_facts import Facts, Question, differences, trainer_facts
from nnunetv2_semi.commands import CommandFailed, Progress, command_path, run_logged
from nnunetv2_semi.data.raw_cases import UNLABELLED_FOLDER
from nnunetv2_semi.data.whole_files import write_json_whole
from nnunetv2_semi.errors import UserError


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
    datasets = {dataset: _full_name(dataset, folders.raw) for dataset in asked}
    if len(set(datasets.values())) < len(datasets):
        raise UserError("The study names a data set twice (the upper bound is a data set of its own, with all labels).")
    return list(jobs_of(study, datasets, study.plans or _plans_of_planner(study.planner), folders))


def prepare(study: Study) -> PreparedStudy:
    """Check a study, plan and preprocess its data sets where that is not done.

    Raises:
        UserError: Something stands in the way of a training, trainings that are compared differ in what they should
            not, or a finished one was made with other settings.
        CommandFailed: nnU-Net's planning or preprocessing failed.
    """
    jobs = list_jobs(study)
    folders = jobs[0].folders
    datasets = list(dict.fromkeys(job.dataset for job in jobs))
    for dataset in datasets:
        _check_test_cases(folders.raw / dataset)
    study.folder.mkdir(parents=True, exist_ok=True)
    for dataset in datasets:
        _plan_and_preprocess(study, dataset, jobs[0].plans, folders)
    _check_unchanged(jobs)
    for job in jobs:
        write_json_whole(str(job.plans_file), job.own_plans())
    facts = _facts(jobs)
    _check_comparable(study, jobs, facts)
    for dataset in datasets:
        if any(facts[job.name]["uses_unlabelled"] for job in jobs if job.dataset == dataset):
            _prepare_unlabelled(dataset, next(job for job in jobs if job.dataset == dataset))
    return PreparedStudy(study, jobs, {name: int(str(single["num_epochs"])) for name, single in facts.items()})


def _full_name(dataset: int | str, raw: Path) -> str:
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


def _check_test_cases(raw: Path) -> None:
    how = "'nnunetv2_semi subset --test' makes data sets with test cases."
    for folder in ("imagesTs", "labelsTs"):
        if not (raw / folder).is_dir() or not any((raw / folder).iterdir()):
            raise UserError(f"{raw / folder} is not there or empty: a study is judged on test cases. {how}")


def _plan_and_preprocess(study: Study, dataset: str, plans: str, folders: Folders) -> None:
    file = folders.preprocessed / dataset / f"{plans}.json"
    begun, processes = study.folder / f"preprocessing_{dataset}.log", os.environ.get("nnUNet_def_n_proc", "4")
    done = begun.with_suffix(".done")
    if not file.is_file():
        name, arguments = "nnUNetv2_plan_and_preprocess", ["-pl", study.planner, "-npfp", processes]
    elif (begun.is_file() and not done.is_file()) or not _is_preprocessed(study, file):
        name, arguments = "nnUNetv2_preprocess", ["-plans_name", plans]
    else:
        return
    print(f"{name} for {dataset} ...", flush=True)
    done.unlink(missing_ok=True)
    arguments = ["-d", dataset.removeprefix("Dataset")[:3], *arguments, "-c", study.configuration, "-np", processes]
    run_logged([command_path(name), *arguments], begun, os.environ, Progress())
    if not file.is_file():
        raise CommandFailed(f"{name} wrote no {file}: planner {study.planner} does not make plans {plans}.")
    done.touch()


def _is_preprocessed(study: Study, plans_file: Path) -> bool:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(json.loads(plans_file.read_text(encoding="utf-8")))
    if study.configuration not in plans.available_configurations:
        raise UserError(f"{plans_file} has no configuration {study.configuration}; it has "
                        f"{', '.join(plans.available_configurations)}.")
    folder = plans_file.parent / plans.get_configuration(study.configuration).data_identifier
    dataset_json = json.loads((plans_file.parent / "dataset.json").read_text(encoding="utf-8"))
    return folder.is_dir() and len(list(folder.glob("*.pkl"))) >= int(dataset_json["numTraining"])


def _facts(jobs: Sequence[Job]) -> dict[str, Facts]:
    """Of every job, by its name; trainers are asked once for a data set and entry, since seeds change nothing."""
    questions: dict[tuple, Question] = {}
    for job in jobs:
        questions.setdefault((job.dataset, job.entry.name), Question(
            job.entry.trainer, str(job.plans_file), job.study.configuration, job.fold))
    answers = dict(zip(questions, trainer_facts(list(questions.values()), os.environ), strict=True))
    return {job.name: answers[job.dataset, job.entry.name] for job in jobs}


def _check_comparable(study: Study, jobs: Sequence[Job], facts: Mapping[str, Facts]) -> None:
    lines = []
    for dataset in dict.fromkeys(job.dataset for job in jobs):
        compared = {job.entry.name: facts[job.name] for job in jobs if job.dataset == dataset}
        lines += [f"{dataset}: {line}" for line in differences(compared, study.meant_differences)]
    control = {job.dataset: {"iterations": facts[job.name]["iterations"]} for job in jobs
               if job.entry == study.control_entry}
    lines += differences(control, study.meant_differences)
    if lines:
        raise UserError("The trainings of the study would not be comparable:\n  " + "\n  ".join(lines) +
                        "\nMake them alike with settings:, or, where it is meant, name what differs in "
                        "meant_differences:.")


def _check_unchanged(jobs: Sequence[Job]) -> None:
    changed = [job for job in jobs if job.record.get("made_with", job.made_with()) != job.made_with()]
    if changed:
        names = "\n  ".join(str(job.folder) for job in changed[:5])
        raise UserError(f"{len(changed)} trainings of the study were begun with other settings or plans than the study "
                        f"file has now:\n  {names}\nGive the study file another name, or remove these folders and the "
                        "models that their run.json names.")


def _prepare_unlabelled(dataset: str, job: Job) -> None:
    """Preprocess unlabelled cases once, before trainings that would all begin with it."""
    from nnunetv2.configuration import default_num_processes
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunetv2_semi.data.preprocessing import prepare_unlabelled

    if not (job.raw / UNLABELLED_FOLDER).is_dir():
        raise UserError(f"{job.raw / UNLABELLED_FOLDER} is not there, but the study has trainers that need unlabelled "
                        "cases. For a data set with all labels use upper_bound:.")
    plans = PlansManager(job.own_plans())
    dataset_json = json.loads((job.plans_file.parent / "dataset.json").read_text(encoding="utf-8"))
    prepare_unlabelled(plans, plans.get_configuration(job.study.configuration), dataset_json,
                       num_processes=default_num_processes, report=lambda line: None)
