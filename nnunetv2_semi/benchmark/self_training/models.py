"""The models of a self-training: trained by nnU-Net's command, and how to predict with them."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_semi.benchmark.datasets.raw_datasets import make_link
from nnunetv2_semi.benchmark.self_training.fine_tuning import begin_fine_tuning
from nnunetv2_semi.benchmark.self_training.input import Start
from nnunetv2_semi.benchmark.study.execution import FINAL, continue_option, environment
from nnunetv2_semi.benchmark.study.jobs import Folders
from nnunetv2_semi.data.atomic_files import read_json_object, write_json_whole
from nnunetv2_semi.processes.commands import Progress, command_path, finished_epochs, run_logged
from nnunetv2_semi.training.checkpoints import snapshot_file


@dataclass(frozen=True)
class Predictor:
    """One of nnU-Net's prediction commands. name: of the predictions. model: options that name the model."""

    name: str
    command: str
    model: Sequence[str]


@dataclass(frozen=True)
class Teacher:
    """What labels the cases of a round.

    trained_on: name of a data set. models: fold folders. final: predicts the labels. others: predict what these are
    compared with.
    """

    trained_on: str
    models: Sequence[Path]
    final: Predictor
    others: Sequence[Predictor]


class Models:
    """Trains what is not trained yet.

    Args:
        start: Data set, plans and options.
        folders: nnU-Net's.
        out: Folder for logs, and for the ensemble.
        device: ``cuda``, ``cpu`` or ``mps``.
        num_gpus: For training.
    """

    def __init__(self, start: Start, folders: Folders, out: Path, device: str, num_gpus: int) -> None:
        self.start, self.options, self.source = start, start.options, start.source
        self.folders, self.out, self.device, self.num_gpus = folders, out, device, num_gpus

    def first_teacher(self) -> Teacher:
        """Trained on the labelled cases: one model compared with its snapshots, or an ensemble with its members."""
        dataset, options = self.source.name, self.options
        if options.teacher_folds:
            return self._teacher_of_folds(dataset)
        numbers = range(1, options.teachers + 1)
        models = [self._train(dataset, self.start.teacher_plans(number), self.start.num_epochs) for number in numbers]
        if len(models) == 1:
            final = self._predictor("final", dataset, options.plans_name, FINAL)
            return Teacher(dataset, models, final, self._snapshots(dataset))
        # Unlike nnUNetv2_predict, this command needs processes beside its own.
        processes = ["-npp", "1", "-nps", "1"] if self.device == "cpu" else []
        ensemble = ["-m", str(self._ensemble(models)), "-f", *map(str, range(len(models))), "-chk", FINAL, *processes]
        members = [self._predictor(f"teacher_{number}", dataset, options.teacher_plans_name(number), FINAL)
                   for number in numbers]  # fmt: skip
        return Teacher(dataset, models, Predictor("final", "nnUNetv2_predict_from_modelfolder", ensemble), members)

    def _teacher_of_folds(self, dataset: str) -> Teacher:
        """An ensemble of the models of all folds, with its members."""
        plans, folds = self.start.teacher_plans(1), range(self.start.folds)
        models = [self._train(dataset, plans, self.start.num_epochs, fold) for fold in folds]
        members = [self._predictor(f"fold_{fold}", dataset, plans["plans_name"], FINAL, [fold]) for fold in folds]
        return Teacher(dataset, models, self._predictor("final", dataset, plans["plans_name"], FINAL, folds), members)

    def student(self, dataset: str) -> Teacher:
        """Trained on a pseudo-labelled data set, and fine-tuned; the next round's teacher."""
        model = self._train(dataset, self.start.student_plans(), self.start.student_epochs)
        if self.options.finetune:
            model = self._fine_tune(dataset, model)
        return Teacher(dataset, [model], self._predictor("final", *self.deployed(dataset), FINAL),
                       self._snapshots(dataset))

    def deployed(self, dataset: str) -> tuple[str, str]:
        """Names of data set and plans with which nnU-Net finds the student of a pseudo-labelled data set."""
        if self.options.finetune:
            return self.source.name, self.options.fine_tuning_plans_name(dataset)
        return dataset, self.options.plans_name

    def write_plans(self, dataset: str, plans: dict) -> None:
        """Plans for one of the data sets."""
        file = self.folders.preprocessed / dataset / f"{plans['plans_name']}.json"
        write_json_whole(str(file), {**plans, "dataset_name": dataset})

    def _fold_folder(self, dataset: str, plans_name: str, fold: int | str) -> Path:
        return self.folders.results / dataset / self.options.model_name_of(plans_name) / f"fold_{fold}"

    def _train(self, dataset: str, plans: dict, epochs: int, fold: int | str | None = None) -> Path:
        """Fold folder of the model that is trained on a data set with these plans. epochs: to be done."""
        options, name = self.options, plans["plans_name"]
        fold = options.fold if fold is None else fold
        self.write_plans(dataset, plans)
        model = self._fold_folder(dataset, name, fold)
        if (model / FINAL).is_file():
            return model

        def epochs_done() -> int:
            logs = model.glob("training_log_*.txt")  # one for each start
            return min(epochs, sum(map(finished_epochs, logs)))

        several = ["-num_gpus", str(self.num_gpus)] if self.num_gpus > 1 else []
        of_fold = "" if fold == options.fold else f"_fold_{fold}"
        log = f"train_{dataset}{name.removeprefix(options.plans_name)}{of_fold}.log"
        run_shown(["nnUNetv2_train", dataset, options.configuration, str(fold), "-tr", options.trainer, "-p", name,
                   "-device", self.device, *several, *continue_option(model)], self.device, self.out / log,
                  Progress(epochs, "epoch", epochs_done))
        return model

    def _fine_tune(self, dataset: str, student: Path) -> Path:
        """Fold folder of the student of a data set after further epochs on the original data set."""
        plans, original = self.start.fine_tuning_plans(dataset), self.source.name
        dataset_json = read_json_object(str(self.folders.preprocessed / original / "dataset.json")) or {}
        model = self._fold_folder(original, plans["plans_name"], self.options.fold)
        begin_fine_tuning(student, model, plans, dataset_json)
        return self._train(original, plans, self.start.fine_tuning_epochs)

    def _predictor(self, name: str, dataset: str, plans_name: str, checkpoint: str,
                   folds: Sequence[int | str] = ()) -> Predictor:
        options = self.options
        return Predictor(name, "nnUNetv2_predict", ["-d", dataset, "-c", options.configuration, "-f",
                                                    *map(str, folds or [options.fold]), "-tr", options.trainer, "-p",
                                                    plans_name, "-chk", checkpoint])

    def _snapshots(self, dataset: str) -> list[Predictor]:
        """Of the first teacher, or of a student before it is fine-tuned."""
        return [self._predictor(f"snapshot_{number}", dataset, self.options.plans_name, snapshot_file(number))
                for number in range(1, self.options.snapshots + 1)]  # fmt: skip

    def _ensemble(self, models: Sequence[Path]) -> Path:
        """Folder that has several trained models as folds, for nnU-Net's prediction. They are links."""
        folder = self.out / "ensemble"
        shutil.rmtree(folder, ignore_errors=True)
        for number, model in enumerate(models):
            fold = folder / f"fold_{number}"
            fold.mkdir(parents=True)
            make_link(str(model.resolve() / FINAL), str(fold / FINAL))
        for name in ("dataset.json", "plans.json"):
            shutil.copyfile(models[0].parent / name, folder / name)
        return folder


def run_shown(command: Sequence[str], device: str, log: Path, progress: Progress) -> None:
    """Run one of nnU-Net's commands; print it, and the seconds it took.

    Raises:
        CommandFailed: It returned non-zero.
    """
    print(f"\n$ {shlex.join(command)}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    seconds = run_logged([command_path(command[0]), *command[1:]], log, environment(device, None), progress)
    print(f"  took {seconds:.0f} s", flush=True)
