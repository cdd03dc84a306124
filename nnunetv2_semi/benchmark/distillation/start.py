"""What a distillation starts from, checked before anything is trained; and on which cases it is judged."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_semi.benchmark.datasets.source_cases import Case, Source
from nnunetv2_semi.benchmark.distillation.preprocessing import differences, preprocessing_facts
from nnunetv2_semi.benchmark.study.jobs import Folders
from nnunetv2_semi.data.atomic_files import read_json_object, write_json_whole
from nnunetv2_semi.data.case_channels import channels_by_name
from nnunetv2_semi.data.dataset_settings import modalities_or_channels
from nnunetv2_semi.data.raw_cases import UNLABELLED_FOLDER, naming_rule
from nnunetv2_semi.data.splits_file import read_splits, splits_path
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods.distillation import Distillation
from nnunetv2_semi.methods.settings import merged_settings, settings_from_plan
from nnunetv2_semi.networks.trained_ensemble import TrainedModel

TRAINER = "nnUNetTrainerSemiDistill"
ALL = "all"


@dataclass(frozen=True)
class Start:
    """What is known before the first step.

    plans: of the student, to be written. fold: that the student trains. modality: that it sees, and its channels; None:
    all. num_epochs: of its training.
    """

    source: Source
    teacher: TrainedModel
    plans: dict
    configuration: str
    fold: str
    modality: str | None
    channels: Sequence[int] | None
    num_epochs: int
    folders: Folders

    @property
    def plans_name(self) -> str:
        return self.plans["plans_name"]

    @property
    def preprocessed(self) -> Path:
        return self.folders.preprocessed / self.source.name

    @property
    def model_folder(self) -> Path:
        """nnU-Net's folder of the student."""
        return self.folders.results / self.source.name / f"{TRAINER}__{self.plans_name}__{self.configuration}"

    def write_plans(self) -> None:
        write_json_whole(str(self.preprocessed / f"{self.plans_name}.json"), self.plans)

    def cases_to_compare(self) -> tuple[str, dict[str, Case]]:
        """What they are, in words, and the labelled cases that teacher and student are compared on, by name.

        Those of the fold's validation split; of fold all, or where the teacher is of another data set and may have
        trained on these, the test cases that have a label. Cases without what the student sees are left out. Known once
        the student is trained.

        Raises:
            UserError: The files of a case do not tell which channels they hold.
        """
        if self.fold == ALL or self.teacher.plans.dataset_name != self.source.name:
            what, cases = "test cases", self.source.test
        else:
            split = read_splits(splits_path(self.preprocessed))[int(self.fold)]
            what = f"validation cases of fold {self.fold}"
            cases = {name: self.source.labelled[name] for name in sorted(split["val"])}
        if self.channels is None:
            return what, cases
        found = channels_by_name({name: list(case.images.values()) for name, case in cases.items()},
                                 self.source.dataset_json, self.teacher.plans.image_reader_writer_class)
        return what, {name: case for name, case in cases.items() if not set(self.channels).isdisjoint(found[name])}


def checked_start(source: Source, folders: Folders, teacher: TrainedModel, *, student: str, configuration: str,
                  modality: str | None = None, name: str | None = None) -> Start:
    """Check what can be checked before training.

    Args:
        source: The data set that the student learns from.
        folders: nnU-Net's.
        teacher: The trained model.
        student: Name of the student's plans.
        configuration: In these plans.
        modality: That the student sees; None: all channels.
        name: Of the plans that are written; None: made of teacher, student and modality.

    Raises:
        UserError: Something is missing, or teacher and student do not fit together.
    """
    if not source.unlabelled:
        raise UserError(f"There are no unlabelled cases in {Path(source.folder) / UNLABELLED_FOLDER}. Put images "
                        f"there, named {naming_rule(source.dataset_json)}.")
    preprocessed = folders.preprocessed / source.name
    file = preprocessed / f"{student}.json"
    plans = read_json_object(str(file))
    if plans is None:
        raise UserError(f"There are no plans {file} for the student. Make them, for instance from a copy of the "
                        f"teacher's, {teacher.folder / 'plans.json'}, with another \"plans_name\" and a smaller "
                        "architecture; or name others with --student.")
    if configuration not in plans["configurations"]:
        raise UserError(f"The plans {student} of {source.name} have no configuration {configuration}; they have "
                        f"{', '.join(plans['configurations'])}.")
    manager = PlansManager(copy.deepcopy(plans))
    chosen = manager.get_configuration(configuration)
    if chosen.previous_stage_name is not None:
        raise UserError(f"{configuration} is the second stage of a cascade, which cannot be a student.")
    _check_same_preprocessing(teacher, source, manager, configuration, file)
    if not any((preprocessed / chosen.data_identifier).glob("*.pkl")):
        raise UserError(f"{source.name} is not preprocessed for the student: nnUNetv2_preprocess -d "
                        f"{int(source.name[7:10])} -plans_name {student} -c {configuration}")
    fold = teacher.folds[0] if len(teacher.folds) == 1 else ALL
    name = name or _plans_name(student, teacher, modality)
    own = _own_plans(plans, name, configuration, chosen.configuration.get("semi", {}), teacher, modality)
    settings = settings_from_plan(Distillation.Settings, own["configurations"][configuration]["semi"],
                                  Distillation.name)
    modalities = settings.modalities or modalities_or_channels(source.dataset_json)
    if modality is not None and modality not in modalities:
        raise UserError(f"There is no modality {modality!r} in {source.name}. Its modalities: {', '.join(modalities)}.")
    channels = None if modality is None else modalities[modality]
    start = Start(source, teacher, own, configuration, fold, modality, channels, settings.num_epochs, folders)
    _check_name_is_free(start, student)
    return start


def _check_same_preprocessing(teacher: TrainedModel, source: Source, plans: PlansManager, configuration: str,
                              file: Path) -> None:
    found = differences(preprocessing_facts(teacher.plans, teacher.configuration, teacher.dataset_json),
                        preprocessing_facts(plans, plans.get_configuration(configuration), source.dataset_json))
    if found:
        raise UserError(f"What the teacher in {teacher.folder} takes and gives is not what {file} makes of the same "
                        f"case. Different: {'; '.join(found)}. Make the student's plans from a copy of the teacher's "
                        "plans.json, and change only the architecture, patch_size and batch_size in it; or train a "
                        "teacher with the student's preprocessing.")


def _plans_name(student: str, teacher: TrainedModel, modality: str | None) -> str:
    """Free of "__", at which nnU-Net splits the name of a model folder."""
    parts = [*teacher.folder.name.split("__"), "fold", *teacher.folds, *([modality] if modality else [])]
    parts[0] = parts[0].removeprefix("nnUNetTrainer") or parts[0]
    return f"{student}_distilled_" + re.sub(r"[^\w.-]+|__+", "_", "_".join(parts))


def _own_plans(plans: dict, name: str, configuration: str, semi: Mapping[str, object], teacher: TrainedModel,
               modality: str | None) -> dict:
    """The student's plans under another name, with the settings of this distillation."""
    own = {**copy.deepcopy(plans), "plans_name": name}
    settings = {
        "teacher": str(teacher.folder.resolve()), "teacher_folds": list(teacher.folds),
        "teacher_checkpoint": teacher.checkpoint_name, "teacher_sha256": teacher.digests(), "modality": modality,
    }
    own["configurations"][configuration]["semi"] = merged_settings(
        semi, {"final_validation": False, Distillation.name: settings})
    return own


def _check_name_is_free(start: Start, student: str) -> None:
    """Refuse to change plans that are the user's, or that a model was trained with."""
    name = start.plans_name
    file = start.preprocessed / f"{name}.json"
    if "__" in name or name == student:
        raise UserError(f"The plans that are written cannot be named {name}: give another --name, without a double "
                        "underscore.")
    before = read_json_object(str(file))
    if before is None or before == start.plans:
        return
    models = _models(start)
    ours = Distillation.name in before["configurations"].get(start.configuration, {}).get("semi", {})
    if not ours:
        raise UserError(f"{file} is not a distillation's plans. Give another name with --name.")
    if models:
        raise UserError(f"{file} is not what this call gives now, and models were trained with it: "
                        f"{', '.join(map(str, models))}. The teacher, the student's plans or the options have changed "
                        "since. Give another name with --name, or remove both.")


def _models(start: Start) -> Sequence[Path]:
    return sorted((start.folders.results / start.source.name).glob(f"*__{start.plans_name}__*"))
