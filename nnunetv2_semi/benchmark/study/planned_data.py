"""Plans, preprocessed cases and splits of a study's data sets, made where they are not there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from nnunetv2_semi.benchmark.study.jobs import Folders, Job, read_object
from nnunetv2_semi.benchmark.study.study import Study
from nnunetv2_semi.benchmark.training_data import TrainingData
from nnunetv2_semi.data.atomic_files import write_json_whole
from nnunetv2_semi.data.dataset_json import read_dataset_json
from nnunetv2_semi.data.splits_file import read_splits, splits_path
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.processes.commands import CommandFailed, Progress, command_path, run_logged
from nnunetv2_semi.processes.pool import default_processes
from nnunetv2_semi.training.splits import write_new_split

EXTRACTOR = "nnUNetFingerprintExtractorSemi"  # cases may lack channels; else it does what nnU-Net's does


def plan_and_preprocess(study: Study, dataset: str, plans: str, folders: Folders, source: str | None) -> None:
    """With nnU-Net's commands, what is not done. source: data set whose plans it gets; None for plans of its own.

    Raises:
        UserError: The plans lack the study's configuration.
        CommandFailed: A command failed.
    """
    folder = folders.preprocessed / dataset
    folder.mkdir(parents=True, exist_ok=True)
    file, begun = folder / f"{plans}.json", study.folder / f"preprocessing_{dataset}.begun"
    with FileLock(folder / ".planning.lock"):  # another study may be at it
        number, processes = dataset.removeprefix("Dataset")[:3], str(default_processes())
        if not file.is_file() and source in (None, dataset):
            _run(study, dataset, "nnUNetv2_plan_and_preprocess", ["-d", number, "-fpe", EXTRACTOR, "-pl",
                                                                  study.planner, "--no_pp", "-npfp", processes])
        elif not file.is_file():
            _run(study, dataset, "nnUNetv2_extract_fingerprint", ["-d", number, "-fpe", EXTRACTOR, "-np",
                                                                 processes])
            _run(study, dataset, "nnUNetv2_move_plans_between_datasets", ["-s", str(source), "-t", dataset,
                                                                          "-sp", plans, "-tp", plans])
            # nnU-Net's planner copies it, its mover of plans does not
            write_json_whole(str(folder / "dataset.json"),
                             read_object(folders.raw / dataset / "dataset.json"))
        if not file.is_file():
            raise CommandFailed(f"Planning wrote no {file}: {study.planner} does not make plans {plans}.")
        # what was begun and killed may have left a case half written
        if begun.is_file() or not _is_preprocessed(study, file, folders.raw / dataset):
            begun.touch()
            _run(study, dataset, "nnUNetv2_preprocess", ["-d", number, "-plans_name", plans, "-c", study.configuration,
                                                         "-np", processes])
            begun.unlink()


def _run(study: Study, dataset: str, name: str, arguments: list[str]) -> None:
    print(f"{name} for {dataset} ...", flush=True)
    run_logged([command_path(name), *arguments], study.folder / f"{name}_{dataset}.log", os.environ, Progress())


def _is_preprocessed(study: Study, plans_file: Path, raw: Path) -> bool:
    """Whether all labelled cases are there as the raw data set has them, and none that is not labelled any more."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunetv2_semi.data.labelled_comparison import compare_with_raw, read_labelled

    dataset_json = read_dataset_json(str(raw / "dataset.json"))
    plans = PlansManager(read_object(plans_file))
    if study.configuration not in plans.available_configurations:
        raise UserError(f"{plans_file} has no configuration {study.configuration}; it has "
                        f"{', '.join(plans.available_configurations)}.")
    images, labels = read_labelled(plans, dataset_json, num_processes=default_processes())
    return compare_with_raw(plans, plans.get_configuration(study.configuration), dataset_json, images=images,
                            labels=labels, num_processes=default_processes()).agrees


def write_split(study: Study, job: Job) -> None:
    """nnU-Net's own split, before trainings that would all begin with writing it.

    Raises:
        UserError: There is no such fold.
    """
    folds = [fold for fold in study.folds if isinstance(fold, int)]
    file = splits_path(job.plans_file.parent)
    if folds and not os.path.isfile(file):
        cases = job.labelled_cases()
        if len(cases) < 2:
            raise UserError(f"{job.dataset} has {len(cases)} labelled case: use folds: [all].")
        write_new_split(file, cases)
    count = len(read_splits(file)) if folds else 0
    if any(fold >= count for fold in folds):
        raise UserError(f"{file} has {count} folds, from 0 to {count - 1}; the study asks for {max(folds)}.")


def prepare_unlabelled_cases(job: Job) -> None:
    """Preprocess unlabelled cases once, before trainings that would all begin with it."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunetv2_semi.data.preprocessing import prepare_unlabelled

    content = job.own_plans()
    plans = PlansManager(content)
    semi = content["configurations"][job.study.configuration]["semi"]
    dataset_json = read_dataset_json(str(job.plans_file.parent / "dataset.json"))
    prepare_unlabelled(plans, plans.get_configuration(job.study.configuration), dataset_json,
                       num_processes=default_processes(), skip_unreadable=bool(semi.get("skip_unreadable", False)))


def check_test_cases(job: Job) -> None:
    """Print which test cases are training cases under another name, or seem to be: their results mean nothing.

    Raises:
        UserError: Images of test cases cannot be read, at which prediction would end after the trainings.
    """
    from nnunetv2_semi.data.duplicates import LOOK_ALIKE, find_duplicates, find_look_alikes, shown_pairs
    from nnunetv2_semi.data.file_contents import refuse_unreadable
    from nnunetv2_semi.data.raw_cases import list_test_cases, refuse_resource_forks

    folder, dataset_json = str(job.raw / "imagesTs"), read_dataset_json(str(job.raw / "dataset.json"))
    refuse_resource_forks(folder, dataset_json["file_ending"])
    test = list_test_cases(folder, dataset_json)
    data = _training_data(job)
    training = data.images()
    contents, unreadable = data.contents([file for files in (*training.values(), *test.values()) for file in files])
    images = {file for files in test.values() for file in files}
    refuse_unreadable({file: reason for file, reason in unreadable.items() if file in images})
    same, alike = (find(test, contents, training) for find in (find_duplicates, find_look_alikes))
    for pairs, what in ((same, "are the same image"), (alike, LOOK_ALIKE)):
        if pairs:
            print(f"WARNING: {len(pairs)} pair(s) of a test case of {job.dataset} and a training case {what}: "
                  f"{shown_pairs(pairs)}. Results on these test cases mean nothing: take them out of imagesTs and "
                  "labelsTs, or out of training.")


def check_data_unchanged(jobs: Sequence[Job]) -> None:
    """Refuse to go on with a data set's trainings where its data are not those that the first of them had.

    Raises:
        UserError: They are not; with what changed.
    """
    begun = [job for job in jobs if job.begun_with() is not None]
    if begun and jobs[0].base_plans_file.is_file():
        names = "\n  ".join(f"{job.folder}, model {job.model}" for job in begun[:5])
        remedy = (f"These cannot be compared with new ones:\n  {names}\nGive the study file another name, or remove "
                  "these folders and models.")
        data = _training_data(jobs[0])
        data.check_same(jobs[0].data_record, any(job.fold != "all" for job in begun),
                        f"{len(begun)} trainings of the study", remedy)
        # The study's folder may have been removed, with that record, and its models not.
        if any(job.data_begun_with() not in (None, job.data_digest(data.digests)) for job in begun):
            raise UserError(f"{jobs[0].dataset} has other data than models of the study were trained with. {remedy}")


def note_data(job: Job) -> None:
    """Write down what `check_data_unchanged` compares."""
    _training_data(job).note(job.data_record)


def _training_data(job: Job) -> TrainingData:
    return TrainingData(job.raw, job.plans_file.parent, job.own_plans()["image_reader_writer"])
