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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_semi.data.atomic_files import write_json_whole
from nnunetv2_semi.data.phantom import make_phantom_dataset
from nnunetv2_semi.data.phantom_anatomy import LABELS, MODALITIES
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods.settings import merged_settings
from nnunetv2_semi.processes.commands import (
    CommandFailed,
    Progress,
    command_path,
    ended_by_sigterm,
    finished_epochs,
    run_logged,
    run_watched,
)
from nnunetv2_semi.processes.pool import core_numbers, share_out

# So few labelled cases do not show all contrasts, shapes and bias fields that the unlabelled ones do. The images are
# 2D, so that 800 iterations take minutes on a processor.
LABELLED, UNLABELLED, TEST = 4, 60, 20
SHAPE = (64, 64)
DATASET_ID = 1
CONFIGURATION = "2d"
COMMANDS = ("nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict")
PLANNER, PLANS = "nnUNetPlannerSemiCPU", "nnUNetSemiCPUPlans"
PICTURE = "demo.png"
KEPT_FOLDER = "nnunetv2_semi_demo"
EPOCHS = 10
DEFAULT_ITERATIONS = 800
SHOWN_CASES = 3
NEXT = """
Next, with your own data set, number 7 say: put the unlabelled images into imagesUn/ beside imagesTr/, then
  nnunetv2_semi doctor -d 7
  nnUNetv2_plan_and_preprocess -d 7 -pl nnUNetPlannerSemi
  nnUNetv2_train 7 3d_fullres 0 -p nnUNetSemiPlans -tr nnUNetTrainerSemiMix
Which trainer suits which data: docs/which_trainer.md"""

# Dice per structure per case.
DicePerCase = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Entry:
    """A row of the demo's table: a trainer, and settings of the plans file's ``"semi"`` beside the common ones."""

    trainer: str
    settings: Mapping[str, object] = field(default_factory=dict)

    def plans_name(self, title: str) -> str:
        """A plans file of its own, so that entries with one trainer keep their models apart."""
        return f"{PLANS}_{title.replace(' ', '_')}"


CONTROL = "Supervised"
ENTRIES = {
    CONTROL: Entry("nnUNetTrainerSemiSupervised"),
    "Mix": Entry("nnUNetTrainerSemiMix"),
    "MeanTeacher": Entry("nnUNetTrainerSemiMeanTeacher"),
    "FixMatch": Entry("nnUNetTrainerSemiFixMatch"),
    "CPS": Entry("nnUNetTrainerSemiCPS"),
    "BCP": Entry("nnUNetTrainerSemiBCP"),
    "RCPS": Entry("nnUNetTrainerSemiRCPS"),
    "Semi-CML": Entry("nnUNetTrainerSemiCML"),
}
# Semi-CML trains a network for each modality and averages them: that alone differs from one network for both.
CML_CONTROL = {"CML on labels": Entry("nnUNetTrainerSemiCML", {"unlabelled_weight": 0.0, "SemiCML": {"prel": False}})}


def control_of(title: str) -> str:
    """The title of the entry that differs from this one in the unlabelled images, and what comes with them."""
    return next(iter(CML_CONTROL)) if title == "Semi-CML" else CONTROL


def chosen_entries(titles: Sequence[str]) -> dict[str, Entry]:
    """The entries of a run: the control, and before Semi-CML the same networks trained on labels alone."""
    chosen = {CONTROL: ENTRIES[CONTROL]}
    for title in titles:
        chosen |= CML_CONTROL if title == "Semi-CML" else {}
        chosen[title] = ENTRIES[title]
    return chosen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``nnunetv2_semi demo``."""
    parser.add_argument("--folder", type=Path, default=Path(), help=f"where {PICTURE} goes (default: current folder)")
    parser.add_argument(
        "--keep", action="store_true", help=f"leave data and models in {KEPT_FOLDER} in that folder (default: removed)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the phantom and of the trainings (default: 0)")
    parser.add_argument(
        "--trainers", nargs="+", default=["Mix"], choices=[title for title in ENTRIES if title != CONTROL],
        help="beside the control (default: Mix)",
    )  # fmt: skip
    parser.add_argument(
        "--iterations", type=int, default=DEFAULT_ITERATIONS,
        help=f"of each training, at least {EPOCHS} (default: {DEFAULT_ITERATIONS})",
    )  # fmt: skip
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), default="cpu", help="as in nnU-Net (default: cpu)")


def run(args: argparse.Namespace) -> int:
    """Run the demo and return the exit code: 0, 1 after a failed command, 130 after Ctrl-C.

    Raises:
        UserError: nnU-Net's commands are not there, or the folder for ``--keep`` exists already.
    """
    commands = {name: command_path(name) for name in COMMANDS}
    if args.iterations < EPOCHS:
        raise UserError(f"--iterations {args.iterations} is too few: give at least {EPOCHS}.")
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
            Demo(work, commands, chosen_entries(args.trainers), args.device, args.seed, args.iterations,
                 args.folder / PICTURE).run()
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
    print(NEXT)
    return 0


class Demo:
    """One run of the demo in a folder of its own.

    Args:
        work: Empty folder for data, models and logs.
        commands: Path per nnU-Net command.
        entries: What is trained, by title; the first one is the control.
        device: ``cpu``, ``cuda`` or ``mps``.
        seed: Of the phantom and of the trainings.
        iterations: Of each training.
        picture: File to draw.
    """

    def __init__(
        self, work: Path, commands: Mapping[str, str], entries: Mapping[str, Entry], device: str, seed: int,
        iterations: int, picture: Path,
    ) -> None:  # fmt: skip
        self.work = work
        self.commands = commands
        self.entries = entries
        self.iterations = iterations
        self.device = device
        self.seed = seed
        self.picture = picture
        self.folders = _nnunet_folders(work)
        self.logs = work / "logs"
        for folder in (*self.folders.values(), self.logs):
            folder.mkdir()
        self.environment = {
            **os.environ,
            **{variable: str(folder) for variable, folder in self.folders.items()},
            # For images so small, starting processes costs more than they would save. nnU-Net's planner takes no 0.
            "nnUNet_def_n_proc": "1",
            "nnUNet_n_proc_DA": "0",
            "nnUNet_compile": "f",
            "nnUNet_wandb_enabled": "0",
            "PYTHONUNBUFFERED": "1",
            # Threads that spin while they wait bring training to a standstill where other programs run too.
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    def run(self) -> None:
        """Everything from the phantom to the picture."""
        print(
            f"Making a phantom: {LABELLED} labelled, {UNLABELLED} unlabelled and {TEST} test images "
            f"with two modalities, {' and '.join(MODALITIES[:2])}."
        )
        dataset = make_phantom_dataset(
            self.folders["nnUNet_raw"], DATASET_ID, labelled=LABELLED, unlabelled=UNLABELLED, test=TEST,
            shape=SHAPE, seed=self.seed,
        )  # fmt: skip
        self.plan()
        self.write_plans(dataset.name)
        self.train()
        predictions = self.predict(dataset)
        dice = {title: dice_per_case(dataset / "labelsTs", folder) for title, folder in predictions.items()}
        print(f"\n{dice_table(dice)}\n")
        self.draw(dataset, predictions, dice)
        print(f"Picture: {self.picture.resolve()}")

    def plan(self) -> None:
        """Fingerprint, plans, preprocessing."""
        name = "nnUNetv2_plan_and_preprocess"
        options = ["-d", str(DATASET_ID), "-pl", PLANNER, "-c", CONFIGURATION, "-npfp", "1", "-np", "1"]
        command = self._shown(name, options)
        self._tell_seconds(run_logged(command, self.logs / f"{name}.txt", self.environment, Progress()))

    def write_plans(self, dataset_name: str) -> None:
        """A copy of the plans file for each entry, with the length of the training and the entry's settings."""
        folder = self.folders["nnUNet_preprocessed"] / dataset_name
        length = {"num_epochs": EPOCHS, "num_iterations_per_epoch": self.iterations // EPOCHS,
                  "num_val_iterations_per_epoch": 1, "seed": self.seed}
        for title, entry in self.entries.items():
            plans = json.loads((folder / f"{PLANS}.json").read_text(encoding="utf-8"))
            plans["plans_name"] = entry.plans_name(title)
            configuration = plans["configurations"][CONFIGURATION]
            configuration["semi"] = merged_settings(configuration.get("semi", {}), {**length, **entry.settings})
            write_json_whole(str(folder / f"{plans['plans_name']}.json"), plans)
        print(f'\nEach trainer gets a copy of the plans file, with the length of the training in its "semi": {EPOCHS} '
              f"epochs of\n{length['num_iterations_per_epoch']} iterations.")

    def train(self) -> None:
        """Each entry's model, on all labelled cases."""
        self._run_each(
            "nnUNetv2_train",
            {title: [str(DATASET_ID), CONFIGURATION, "all", "-tr", entry.trainer, "-p", entry.plans_name(title),
                     "-device", self.device] for title, entry in self.entries.items()},
            EPOCHS, "epoch", lambda title: finished_epochs(self._log("nnUNetv2_train", title)),
        )  # fmt: skip

    def predict(self, dataset: Path) -> dict[str, Path]:
        """Folder with the test cases' predictions, for each entry."""
        outputs = {title: self.work / "predictions" / title for title in self.entries}
        self._run_each(
            "nnUNetv2_predict",
            {title: ["-i", str(dataset / "imagesTs"), "-o", str(outputs[title]), "-d", str(DATASET_ID), "-c",
                     CONFIGURATION, "-f", "all", "-tr", entry.trainer, "-p", entry.plans_name(title), "-device",
                     self.device, "-npp", "0", "-nps", "0"] for title, entry in self.entries.items()},
            TEST, "case", lambda title: len(list(outputs[title].glob("*.nii.gz"))),
        )  # fmt: skip
        return outputs

    def draw(self, dataset: Path, predictions: Mapping[str, Path], dice: Mapping[str, DicePerCase]) -> None:
        """Picture of the first test cases."""
        # Imported late: matplotlib takes seconds, and a wrong option should be told at once.
        from nnunetv2_semi.pictures import PictureRow, save_overview

        def read(file: Path) -> np.ndarray:
            array = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
            return array if array.ndim == 3 else array[None]

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
        title = f"Phantom, {LABELLED} labelled and {UNLABELLED} unlabelled training images: first test images"
        save_overview(rows, LABELS, title, self.picture)

    def _run_each(
        self, name: str, arguments: Mapping[str, Sequence[str]], total: int, unit: str, done: Callable[[str], int]
    ) -> None:
        """A command for each entry; on the CPU side by side, one core each.

        On patches so small a second thread gains nothing; where other programs run, two wait for each other.

        Args:
            name: Of the command.
            arguments: Per title.
            total: What one of them does, in ``unit``.
            unit: Shown by the progress bar.
            done: How much the command of an entry has done.
        """
        commands = {title: self._shown(name, own) for title, own in arguments.items()}

        def run(title: str, cores: Sequence[int] | None, stop_if_asked: Callable[[], None]) -> None:
            run_watched(commands[title], self._log(name, title), self.environment, stop_if_asked, cores)

        cores = core_numbers()[:len(commands)] if self.device == "cpu" else []
        started = time.monotonic()
        with Progress(len(commands) * total, unit, lambda: sum(map(done, commands))).bar() as look:
            share_out(list(commands), [[core] for core in cores] or [None], run, look)
        self._tell_seconds(time.monotonic() - started)

    def _log(self, name: str, title: str) -> Path:
        return self.logs / f"{name}_{title}.txt"

    def _shown(self, name: str, arguments: Sequence[str]) -> list[str]:
        """The command, printed as the user would type it."""
        shown = shlex.join([name, *arguments])
        for variable, folder in self.folders.items():
            shown = shown.replace(str(folder), f"${variable}")
        print(f"\n$ {shown.replace(str(self.work), '.')}", flush=True)
        return [self.commands[name], *arguments]

    def _tell_seconds(self, seconds: float) -> None:
        print(f"  took {seconds:.0f} s", flush=True)


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
    mean = {}
    for title, per_case in dice.items():
        means = [float(np.nanmean([case[name] for case in per_case.values()])) for name in LABELS]
        mean[title] = float(np.mean(means))
        lines.append(f"{title:<22}" + "".join(f"{value:9.3f}" for value in (*means, mean[title])))
    for title in dice:
        control = control_of(title)
        if control in mean and title not in (CONTROL, *CML_CONTROL):
            lines.append(f"{title}: {mean[title] - mean[control]:+.3f} over {control}, which sees no unlabelled image.")
    lines.append("A phantom and a small network: what to expect of real images is in docs/results.")
    return "\n".join(lines)


def _nnunet_folders(work: Path) -> dict[str, Path]:
    return {variable: work / variable for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
