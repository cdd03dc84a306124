"""What a self-training starts from, checked before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from nnunetv2.configuration import default_num_processes
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunetv2_semi.benchmark.jobs import Folders
from nnunetv2_semi.benchmark.source_cases import Source
from nnunetv2_semi.benchmark.stability import number_kept
from nnunetv2_semi.benchmark.trainer_facts import trainer_class
from nnunetv2_semi.data.identity import HASHES_FILE, find_duplicates, image_contents
from nnunetv2_semi.data.raw_cases import UNLABELLED_FOLDER, naming_rule
from nnunetv2_semi.data.whole_files import read_json_object
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.schedules import snapshot_after
from nnunetv2_semi.training_data import NNUNET_FOLDS

if TYPE_CHECKING:
    from nnunetv2_semi.methods.base import Method


@dataclass(frozen=True)
class Options:
    """What decides the result of a round. keep: share of unlabelled cases. snapshots: checkpoints to compare."""

    dataset: str
    configuration: str
    fold: int | str
    plans: str
    trainer: str
    keep: float
    snapshots: int
    mirroring: bool

    @property
    def plans_name(self) -> str:
        """Of the plans that all models are trained with."""
        return f"{self.plans}_selftrain"

    @property
    def model_name(self) -> str:
        """nnU-Net's name of a model's folder."""
        return f"{self.trainer}__{self.plans_name}__{self.configuration}"


@dataclass(frozen=True)
class Start:
    """What is known before the first step.

    plans: of the name ``options.plans_name``. structures: label values of each structure, without background. reader:
    nnU-Net's of the images.
    """

    options: Options
    source: Source
    plans: dict
    num_epochs: int
    structures: Sequence[Sequence[int]]
    reader: type[BaseReaderWriter]


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
    _check_snapshots(options, settings.num_epochs)
    if method.uses_unlabelled and number_kept(len(source.unlabelled), options.keep) == len(source.unlabelled):
        raise UserError(f"--keep {options.keep:g} leaves no unlabelled case for {options.trainer}, which needs some.")
    _check_fold(options.fold, preprocessed, len(source.labelled))
    _check_models_of_other_plans(options, plans, folders)
    _check_no_labelled_image(source, preprocessed, plans["image_reader_writer"])
    labels = manager.get_label_manager(source.dataset_json)
    structures = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    return Start(options, source, plans, settings.num_epochs,
                 [np.atleast_1d(values).tolist() for values in structures],
                 manager.image_reader_writer_class)


def _check_range(options: Options) -> None:
    if not 0 < options.keep <= 1:
        raise UserError(f"--keep must be above 0 and at most 1, got {options.keep:g}.")
    if options.snapshots < 1:
        raise UserError(f"--snapshots must be at least 1, got {options.snapshots}.")


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
            content["semi"] = {**content.get("semi", {}), "snapshots": options.snapshots, "final_validation": False}
    return {**plans, "plans_name": options.plans_name}


def _method(trainer: str) -> type[Method]:
    """The method of a trainer of ours."""
    method = getattr(trainer_class(trainer), "method_class", None)
    if method is None:
        raise UserError(f"{trainer} keeps no checkpoints on the way, and so the stability of its predictions cannot be "
                        "told. Use a trainer that does, for instance nnUNetTrainerSemiSupervised.")
    return method


def _check_snapshots(options: Options, num_epochs: int) -> None:
    kept = {snapshot_after(epoch, num_epochs, options.snapshots) for epoch in range(1, num_epochs)} - {None}
    if len(kept) < options.snapshots:
        raise UserError(f"A training of {num_epochs} epochs has no room for {options.snapshots} snapshots: give less "
                        "with --snapshots.")


def _check_fold(fold: int | str, preprocessed: Path, labelled: int) -> None:
    if fold == "all":
        return
    file = preprocessed / "splits_final.json"
    made = min(NNUNET_FOLDS, labelled) if labelled > 1 else 0
    folds = len(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else made
    if int(fold) >= folds:
        raise UserError(f"There are {folds} folds of {preprocessed.name}, so there is no fold {fold}. Train with -f "
                        f"all, or write your own splits to {file}.")


def _check_models_of_other_plans(options: Options, plans: dict, folders: Folders) -> None:
    """Refuse to change plans that a model was trained with."""
    file = folders.preprocessed / options.dataset / f"{options.plans_name}.json"
    models = list((folders.results / options.dataset).glob(f"*__{options.plans_name}__*"))
    if models and (read_json_object(str(file)) or plans) != plans:
        raise UserError(f"{file} is not what {options.plans} with {options.snapshots} snapshots gives now, and models "
                        f"were trained with it: {', '.join(map(str, models))}. Remove both, or train with a copy of "
                        "the plans under another name.")


def _check_no_labelled_image(source: Source, preprocessed: Path, reader_name: str) -> None:
    """A labelled case, perhaps of the validation split, must not come back with a predicted label and another name."""
    labelled, unlabelled = ({name: list(case.images.values()) for name, case in cases.items()}
                            for cases in (source.labelled, source.unlabelled))
    contents, _ = image_contents(
        [file for files in (*labelled.values(), *unlabelled.values()) for file in files],
        raw_dataset_folder=source.folder, cache_file=str(preprocessed / HASHES_FILE), reader_name=reader_name,
        num_processes=default_num_processes)
    pairs = [f"{Path(same.file).name} = {Path(same.other_file).name}"
             for same in find_duplicates(unlabelled, contents, labelled)]
    if pairs:
        raise UserError(f"{len(pairs)} unlabelled case(s) hold the same image as a labelled case: {', '.join(pairs)}. "
                        f"Remove them from {UNLABELLED_FOLDER}.")
