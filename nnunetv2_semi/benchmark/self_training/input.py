"""What a self-training starts from, checked before anything is trained."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunetv2_semi.benchmark.datasets.source_cases import Source
from nnunetv2_semi.benchmark.self_training.stability import number_kept
from nnunetv2_semi.benchmark.study.jobs import Folders
from nnunetv2_semi.benchmark.training_data import TrainingData
from nnunetv2_semi.data.atomic_files import read_json_object
from nnunetv2_semi.data.duplicates import find_duplicates, shown_pairs
from nnunetv2_semi.data.file_contents import refuse_unreadable
from nnunetv2_semi.data.raw_cases import UNLABELLED_FOLDER, naming_rule, refuse_resource_forks
from nnunetv2_semi.data.splits_file import folds_of_new_split, read_splits, splits_path
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods.settings import is_section, merged_settings
from nnunetv2_semi.schedules import snapshot_after
from nnunetv2_semi.trainer_classes import method_class

if TYPE_CHECKING:
    from nnunetv2_semi.methods.base import Method


# Between two teachers: seeds of a study's trainings lie closer together.
SEED_STEP = 1000


@dataclass(frozen=True)
class Options:
    """What decides the result of a round.

    keep: share of unlabelled cases. snapshots: checkpoints to compare. teachers: models of the first round, each with a
    seed of its own. teacher_folds: these are the models of all folds instead. ignore_unstable: voxels that are
    predicted differently get no label. finetune: share of the student's epochs on true labels alone.
    """

    dataset: str
    configuration: str
    fold: int | str
    plans: str
    trainer: str
    keep: float
    snapshots: int
    mirroring: bool
    teachers: int = 1
    ignore_unstable: bool = False
    finetune: float = 0.0
    teacher_folds: bool = False

    @property
    def plans_name(self) -> str:
        """Of the plans of the first teacher and of students."""
        return f"{self.plans}_selftrain"

    def teacher_plans_name(self, number: int) -> str:
        """Of the plans of a teacher, counted from 1."""
        return self.plans_name if number == 1 else f"{self.plans_name}_teacher{number}"

    def fine_tuning_plans_name(self, dataset: str) -> str:
        """Of the plans that fine-tune the student of a pseudo-labelled data set."""
        return f"{self.plans_name}_finetuned{dataset[7:10]}"

    @property
    def model_name(self) -> str:
        """nnU-Net's name of the folder of the first teacher, and of students."""
        return self.model_name_of(self.plans_name)

    def model_name_of(self, plans_name: str) -> str:
        """nnU-Net's name of a model's folder."""
        return f"{self.trainer}__{plans_name}__{self.configuration}"


# Records of earlier versions lack newer options.
OPTION_DEFAULTS: Mapping[str, object] = {
    single.name: single.default for single in dataclasses.fields(Options) if single.default is not dataclasses.MISSING}


@dataclass(frozen=True)
class Start:
    """What is known before the first step.

    plans: of the name ``options.plans_name``. num_epochs: of a teacher, and of a student with its fine-tuning. folds:
    how many the data set has. structures: label values of each structure, without background. reader: nnU-Net's of the
    images.
    """

    options: Options
    source: Source
    plans: dict
    num_epochs: int
    folds: int
    structures: Sequence[Sequence[int]]
    reader: type[BaseReaderWriter]

    @property
    def fine_tuning_epochs(self) -> int:
        return round(self.num_epochs * self.options.finetune)

    @property
    def student_epochs(self) -> int:
        """Before fine-tuning."""
        return self.num_epochs - self.fine_tuning_epochs

    def teacher_plans(self, number: int) -> dict:
        """Plans of a teacher, counted from 1: all but the first differ in the seed, and keep no snapshots."""
        return _teacher_plans(self.options, self.plans, number)

    def student_plans(self) -> dict:
        if not self.fine_tuning_epochs:
            return self.plans
        return _with_settings(self.plans, self.options.plans_name, {"num_epochs": self.student_epochs})

    def fine_tuning_plans(self, dataset: str) -> dict:
        """Plans that fine-tune the student of a pseudo-labelled data set."""
        return _with_settings(self.plans, self.options.fine_tuning_plans_name(dataset),
                              {"num_epochs": self.num_epochs, "snapshots": 0})


def checked_start(options: Options, source: Source, folders: Folders) -> Start:
    """Check what can be checked before training.

    Raises:
        UserError: Data, plans, trainer or options cannot be used.
    """
    # Imports torch.
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunetv2_semi.methods.settings import settings_from_plan

    if not source.unlabelled:
        raise UserError(f"There are no unlabelled cases in {Path(source.folder) / UNLABELLED_FOLDER}. Put images "
                        f"there, named {naming_rule(source.dataset_json)}.")
    _check_range(options)
    preprocessed = folders.preprocessed / source.name
    plans = _plans(options, preprocessed)
    manager = PlansManager(plans)
    if options.configuration not in plans["configurations"]:
        raise UserError(f"The plans {options.plans} of {source.name} have no configuration {options.configuration}; "
                        f"they have {', '.join(plans['configurations'])}.")
    configuration = manager.get_configuration(options.configuration)
    if configuration.previous_stage_name is not None:
        raise UserError(f"{options.configuration} is the second stage of a cascade, which self-training cannot train.")
    if not any((preprocessed / configuration.data_identifier).glob("*.pkl")):
        raise UserError(f"{source.name} is not preprocessed: nnUNetv2_preprocess -d {int(source.name[7:10])} "
                        f"-plans_name {options.plans} -c {options.configuration}")
    method = _method(options.trainer)
    settings = settings_from_plan(method.Settings, configuration.configuration.get("semi", {}), method.name)
    student_epochs = _checked_student_epochs(options, settings.num_epochs)
    _check_snapshots(options, student_epochs)
    if method.uses_unlabelled and number_kept(len(source.unlabelled), options.keep) == len(source.unlabelled):
        raise UserError(f"--keep {options.keep:g} leaves no unlabelled case for {options.trainer}, which needs some.")
    folds = _number_of_folds(preprocessed, len(source.labelled))
    _check_fold(options, folds, preprocessed)
    _check_models_of_other_plans(options, plans, folders)
    _check_images(source, preprocessed, plans["image_reader_writer"])
    labels = manager.get_label_manager(source.dataset_json)
    structures = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    return Start(options, source, plans, settings.num_epochs, folds,
                 [np.atleast_1d(values).tolist() for values in structures],
                 manager.image_reader_writer_class)


def _check_range(options: Options) -> None:
    if not 0 < options.keep <= 1:
        raise UserError(f"--keep must be above 0 and at most 1, got {options.keep:g}.")
    for name, value in (("snapshots", options.snapshots), ("teachers", options.teachers)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}.")
    if not 0 <= options.finetune < 1:
        raise UserError(f"--finetune must be at least 0 and below 1, got {options.finetune:g}.")


def _plans(options: Options, preprocessed: Path) -> dict:
    """The data set's plans, so that snapshots are kept."""
    file = preprocessed / f"{options.plans}.json"
    plans = read_json_object(str(file))
    if plans is None or not (preprocessed / "dataset_fingerprint.json").is_file():
        raise UserError(f"There is no {file}, or no dataset_fingerprint.json beside it. Make them: "
                        f"nnUNetv2_plan_and_preprocess -d {int(options.dataset[7:10])} -pl nnUNetPlannerSemi, and name "
                        "the plans with -p.")
    for content in plans["configurations"].values():
        if "inherits_from" not in content or "semi" in content:
            content["semi"] = merged_settings(content.get("semi", {}),
                                              {"snapshots": options.snapshots, "final_validation": False})
    return {**plans, "plans_name": options.plans_name}


def _with_settings(plans: dict, name: str, settings: Mapping[str, object]) -> dict:
    """Plans of another name, with these settings in each "semi"."""
    changed = {**copy.deepcopy(plans), "plans_name": name}
    for content in changed["configurations"].values():
        if "semi" in content:
            content["semi"] = merged_settings(content["semi"], settings)
    return changed


def _teacher_plans(options: Options, plans: dict, number: int) -> dict:
    if number == 1:
        return plans
    changed = _with_settings(plans, options.teacher_plans_name(number), {"snapshots": 0})
    for content in changed["configurations"].values():
        if "semi" in content:
            content["semi"] = _with_own_seed({"seed": 0, **content["semi"]}, number)
    return changed


def _with_own_seed(semi: Mapping[str, object], number: int) -> dict[str, object]:
    """Settings of a teacher; a method's section may have a seed of its own."""
    changed = {key: _with_own_seed(value, number) if isinstance(value, dict) and is_section(key, value) else value
               for key, value in semi.items()}
    if isinstance(seed := semi.get("seed"), int):
        changed["seed"] = seed + SEED_STEP * (number - 1)
    return changed


def _method(trainer: str) -> type[Method]:
    """The method of a trainer of ours."""
    method = method_class(trainer)
    if method is None:
        raise UserError(f"{trainer} keeps no checkpoints on the way, and so the stability of its predictions cannot be "
                        "told. Use a trainer that does, for instance nnUNetTrainerSemiSupervised.")
    return method


def _checked_student_epochs(options: Options, num_epochs: int) -> int:
    """Epochs of a student before fine-tuning, of so many in all."""
    fine_tuning = round(num_epochs * options.finetune)
    if options.finetune and not 0 < fine_tuning < num_epochs:
        raise UserError(f"--finetune {options.finetune:g} of {num_epochs} epochs leaves no epoch for the fine-tuning, "
                        "or for what is before it.")
    return num_epochs - fine_tuning


def _check_snapshots(options: Options, num_epochs: int) -> None:
    kept = {snapshot_after(epoch, num_epochs, options.snapshots) for epoch in range(1, num_epochs)} - {None}
    if len(kept) < options.snapshots:
        raise UserError(f"A training of {num_epochs} epochs has no room for {options.snapshots} snapshots: give less "
                        "with --snapshots.")


def _number_of_folds(preprocessed: Path, labelled: int) -> int:
    """How many folds the data set has, or will have once nnU-Net makes them."""
    file = splits_path(preprocessed)
    if os.path.isfile(file):
        return len(read_splits(file))
    return folds_of_new_split(labelled)


def _check_fold(options: Options, folds: int, preprocessed: Path) -> None:
    if options.teacher_folds and options.fold != "all":
        raise UserError(f"--teacher-folds needs -f all: the teachers of other folds learn from the validation cases of "
                        f"fold {options.fold}.")
    if options.teacher_folds and options.teachers > 1:
        raise UserError("Give --teachers or --teacher-folds: the teachers differ in the seed, or in the fold.")
    if options.teacher_folds and folds < 2:
        raise UserError(f"--teacher-folds needs two folds of {preprocessed.name}, which has {folds}. Leave it out, or "
                        f"write your own splits to {splits_path(preprocessed)}.")
    if options.fold != "all" and int(options.fold) >= folds:
        raise UserError(f"There are {folds} folds of {preprocessed.name}, so there is no fold {options.fold}. Train "
                        f"with -f all, or write your own splits to {splits_path(preprocessed)}.")


def _check_models_of_other_plans(options: Options, plans: dict, folders: Folders) -> None:
    """Refuse to change plans that a teacher was trained with."""
    for number in range(1, options.teachers + 1):
        name, own = options.teacher_plans_name(number), _teacher_plans(options, plans, number)
        file = folders.preprocessed / options.dataset / f"{name}.json"
        models = list((folders.results / options.dataset).glob(f"*__{name}__*"))
        if models and (read_json_object(str(file)) or own) != own:
            raise UserError(f"{file} is not what {options.plans} with {options.snapshots} snapshots gives now, and "
                            f"models were trained with it: {', '.join(map(str, models))}. Remove both, or train with a "
                            "copy of the plans under another name.")


def _check_images(source: Source, preprocessed: Path, reader_name: str) -> None:
    """All images can be read, since nnUNetv2_predict will end at the first that cannot.

    And no labelled case, perhaps of the validation split, comes back with a predicted label and another name.
    """
    refuse_resource_forks(os.path.join(source.folder, UNLABELLED_FOLDER), source.dataset_json["file_ending"])
    labelled, unlabelled = ({name: list(case.images.values()) for name, case in cases.items()}
                            for cases in (source.labelled, source.unlabelled))
    contents, unreadable = TrainingData(Path(source.folder), preprocessed, reader_name).contents(
        [file for files in (*labelled.values(), *unlabelled.values()) for file in files])
    refuse_unreadable(unreadable)
    pairs = find_duplicates(unlabelled, contents, labelled)
    if pairs:
        raise UserError(f"{len(pairs)} unlabelled case(s) hold the same image as a labelled case: "
                        f"{shown_pairs(pairs)}. Remove them from {UNLABELLED_FOLDER}.")
