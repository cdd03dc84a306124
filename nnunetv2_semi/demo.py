"""``nnunetv2_semi demo``: from raw images to evaluated predictions on a phantom, with nnU-Net's own commands."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_semi.commands import CommandFailed, Progress, command_path, ended_by_sigterm, finished_epochs, run_logged
from nnunetv2_semi.data.phantom import make_phantom_dataset
from nnunetv2_semi.data.phantom_anatomy import LABELS, MODALITIES
from nnunetv2_semi.data.whole_files import write_json_whole
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.training_time import iterations_for, seconds_per_pass

LABELLED, UNLABELLED, TEST = 4, 18, 6
SHAPE = (24, 32, 24)
DATASET_ID = 1
CONFIGURATION = "3d_fullres"
COMMANDS = ("nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict")
PLANNER, PLANS = "nnUNetPlannerSemiCPU", "nnUNetSemiCPUPlans"
TRAINERS = {"Supervised": "nnUNetTrainerSemiSupervised", "Semi-CML": "nnUNetTrainerSemiCML"}
PICTURE = "demo.png"
KEPT_FOLDER = "nnunetv2_semi_demo"
EPOCHS = 10
SHOWN_CASES = 3

DEFAULT_MINUTES = 5.0
SMALLEST_MINUTES = 3.0
# Dice per structure per case.
DicePerCase = dict[str, dict[str, float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``nnunetv2_semi demo``."""
    parser.add_argument("--folder", type=Path, default=Path(), help=f"where {PICTURE} goes (default: current folder)")
    parser.add_argument(
        "--keep", action="store_true", help=f"leave data and models in {KEPT_FOLDER} in that folder (default: removed)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the phantom's random numbers (default: 0)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=DEFAULT_MINUTES,
        help=f"about how long it may take (default: {DEFAULT_MINUTES})",
    )
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), default="cpu", help="as in nnU-Net (default: cpu)")


def run(args: argparse.Namespace) -> int:
    """Run the demo and return the exit code: 0, 1 after a failed command, 130 after Ctrl-C.

    Raises:
        UserError: nnU-Net's commands are not there, or the folder for ``--keep`` exists already.
    """
    commands = {name: command_path(name) for name in COMMANDS}
    if args.minutes < SMALLEST_MINUTES:
        raise UserError(f"--minutes {args.minutes:g} leaves no time for training: give at least {SMALLEST_MINUTES:g}.")
    started = time.monotonic()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.keep:
        work = (args.folder / KEPT_FOLDER).resolve()
        if work.exists():
            raise UserError(f"{work} exists already: remove it, or give another --folder.")
        work.mkdir()
    else:
        work = Path(tempfile.mkdtemp(prefix="nnunetv2_semi_demo_"))
    try:
        with ended_by_sigterm():
            Demo(work, commands, args.device, args.seed, args.minutes, args.folder / PICTURE).run()
    except CommandFailed as failure:
        print(f"\n{failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    finally:
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)
    print(f"The demo took {(time.monotonic() - started) / 60:.1f} minutes.")
    if args.keep:
        print("\nTo look around with nnU-Net's commands:")
        for variable, folder in _nnunet_folders(work).items():
            print(f"export {variable}={shlex.quote(str(folder))}")
    return 0


class Demo:
    """One run of the demo in a folder of its own.

    Args:
        work: Empty folder for data, models and logs.
        commands: Path per nnU-Net command.
        device: ``cpu``, ``cuda`` or ``mps``.
        seed: Of the phantom.
        minutes: Time for the whole run; decides how long is trained.
        picture: File to draw.
    """

    def __init__(
        self, work: Path, commands: Mapping[str, str], device: str, seed: int, minutes: float, picture: Path
    ) -> None:
        self.work = work
        self.commands = commands
        self.device = device
        self.seed = seed
        self.end = time.monotonic() + 60 * minutes
        self.picture = picture
        self.folders = _nnunet_folders(work)
        self.logs = work / "logs"
        for folder in (*self.folders.values(), self.logs):
            folder.mkdir()
        processes = str(min(4, os.cpu_count() or 1))
        self.environment = {
            **os.environ,
            **{variable: str(folder) for variable, folder in self.folders.items()},
            "nnUNet_def_n_proc": processes,
            "nnUNet_compile": "f",
            "nnUNet_wandb_enabled": "0",
            "PYTHONUNBUFFERED": "1",
            # Threads that spin while they wait bring training to a standstill where other programs run too.
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    def run(self) -> None:
        """Everything from the phantom to the picture."""
        print(
            f"Making a phantom: {LABELLED} labelled, {UNLABELLED} unlabelled and {TEST} test cases "
            f"with two modalities, {' and '.join(MODALITIES[:2])}."
        )
        dataset = make_phantom_dataset(
            self.folders["nnUNet_raw"], DATASET_ID, labelled=LABELLED, unlabelled=UNLABELLED, test=TEST,
            shape=SHAPE, seed=self.seed,
        )  # fmt: skip
        self.set_training_length(dataset.name, self.plan())
        for trainer in TRAINERS.values():
            self.train(trainer)
        predictions = {title: self.predict(dataset, title, trainer) for title, trainer in TRAINERS.items()}
        dice = {title: dice_per_case(dataset / "labelsTs", folder) for title, folder in predictions.items()}
        print(f"\n{dice_table(dice)}\n")
        self.draw(dataset, predictions, dice)
        print(f"Picture: {self.picture.resolve()}")

    def plan(self) -> float:
        """Fingerprint, plans, preprocessing; the seconds it took."""
        processes = self.environment["nnUNet_def_n_proc"]
        return self._run(
            "nnUNetv2_plan_and_preprocess",
            ["-d", str(DATASET_ID), "-pl", PLANNER, "-c", CONFIGURATION, "-npfp", processes, "-np", processes],
            Progress(),
        )

    def set_training_length(self, dataset_name: str, planning_seconds: float) -> None:
        """Write the number of epochs and iterations that fit the time into the plans file."""
        file = self.folders["nnUNet_preprocessed"] / dataset_name / f"{PLANS}.json"
        plans = json.loads(file.read_text(encoding="utf-8"))
        pass_seconds = seconds_per_pass(plans, CONFIGURATION, self.device)
        iterations = iterations_for(self.end - time.monotonic(), planning_seconds, pass_seconds)
        settings = {
            "num_epochs": EPOCHS,
            "num_iterations_per_epoch": max(1, round(iterations / EPOCHS)),
            "num_val_iterations_per_epoch": 1,
        }
        configuration = plans["configurations"][CONFIGURATION]
        configuration["semi"] = {**configuration.get("semi", {}), **settings}
        write_json_whole(str(file), plans)
        print(
            f'Training length, as "semi" in the plans file: {settings["num_epochs"]} epochs of '
            f"{settings['num_iterations_per_epoch']} iterations for each trainer."
        )

    def train(self, trainer: str) -> None:
        """One model on all labelled cases."""
        log = self.logs / f"train_{trainer}.txt"
        self._run(
            "nnUNetv2_train",
            [str(DATASET_ID), CONFIGURATION, "all", "-tr", trainer, "-p", PLANS, "-device", self.device],
            Progress(EPOCHS, "epoch", lambda: finished_epochs(log)),
            log,
        )

    def predict(self, dataset: Path, title: str, trainer: str) -> Path:
        """Folder with the test cases' predictions."""
        output = self.work / "predictions" / title
        self._run(
            "nnUNetv2_predict",
            ["-i", str(dataset / "imagesTs"), "-o", str(output), "-d", str(DATASET_ID), "-c", CONFIGURATION,
             "-f", "all", "-tr", trainer, "-p", PLANS, "-device", self.device, "-npp", "0", "-nps", "0"],
            Progress(TEST, "case", lambda: len(list(output.glob("*.nii.gz")))),
            self.logs / f"predict_{trainer}.txt",
        )  # fmt: skip
        return output

    def draw(self, dataset: Path, predictions: Mapping[str, Path], dice: Mapping[str, DicePerCase]) -> None:
        """Picture of the first test cases."""
        # Imported late: matplotlib takes seconds, and a wrong option should be told at once.
        from nnunetv2_semi.pictures import PictureRow, save_overview

        def read(file: Path) -> np.ndarray:
            return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))

        rows = []
        for truth in sorted((dataset / "labelsTs").iterdir())[:SHOWN_CASES]:
            case = truth.name.removesuffix(".nii.gz")
            images = {
                modality: read(dataset / "imagesTs" / f"{case}_{channel:04d}.nii.gz")
                for channel, modality in enumerate(MODALITIES[:2])
            }
            segmentations = {"Truth": read(truth)} | {t: read(f / truth.name) for t, f in predictions.items()}
            means = {title: float(np.nanmean(list(dice[title][case].values()))) for title in predictions}
            rows.append(PictureRow(case, images, segmentations, means))
        title = f"Phantom, {LABELLED} labelled and {UNLABELLED} unlabelled training cases: first test cases"
        save_overview(rows, LABELS, title, self.picture)

    def _run(self, name: str, arguments: Sequence[str], progress: Progress, log: Path | None = None) -> float:
        shown = shlex.join([name, *arguments])
        for variable, folder in self.folders.items():
            shown = shown.replace(str(folder), f"${variable}")
        print(f"\n$ {shown.replace(str(self.work), '.')}", flush=True)
        log = log or self.logs / f"{name}.txt"
        environment = dict(self.environment)
        if name == "nnUNetv2_train":
            # For volumes so small, starting processes costs more than they would save. The planner takes no 0.
            environment |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}
        seconds = run_logged([self.commands[name], *arguments], log, environment, progress)
        print(f"  took {seconds:.0f} s", flush=True)
        return seconds


def dice_per_case(truth_folder: Path, prediction_folder: Path) -> DicePerCase:
    """Dice of every structure in every predicted case, as ``nnUNetv2_evaluate_folder`` computes it; NaN if in neither.

    Raises:
        CommandFailed: A prediction is missing.
    """
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    dice: DicePerCase = {}
    for truth in sorted(truth_folder.glob("*.nii.gz")):
        prediction = prediction_folder / truth.name
        if not prediction.exists():
            raise CommandFailed(f"nnUNetv2_predict left no prediction for {truth.name} in {prediction_folder}.")
        metrics = compute_metrics(str(truth), str(prediction), SimpleITKIO(), list(LABELS.values()))["metrics"]
        dice[truth.name.removesuffix(".nii.gz")] = {
            name: float(metrics[label]["Dice"]) for name, label in LABELS.items()
        }
    return dice


def dice_table(dice: Mapping[str, DicePerCase]) -> str:
    """Table of mean Dice: a row per trainer, a column per structure and one for their mean."""
    cases = len(next(iter(dice.values())))
    heading = f"Dice, {cases} test cases"
    lines = [f"{heading:<22}" + "".join(f"{name:>9}" for name in (*LABELS, "mean"))]
    for title, per_case in dice.items():
        means = [float(np.nanmean([case[name] for case in per_case.values()])) for name in LABELS]
        lines.append(f"{title:<22}" + "".join(f"{value:9.3f}" for value in (*means, float(np.mean(means)))))
    lines.append("Note: a phantom, a few minutes of training.")
    return "\n".join(lines)


def _nnunet_folders(work: Path) -> dict[str, Path]:
    return {variable: work / variable for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
