"""``nnunetv2_semi distill``: a plain nnU-Net learns what trained models predict; both are compared at the end."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_semi.benchmark.datasets.source_cases import read_source
from nnunetv2_semi.benchmark.self_training.models import run_shown
from nnunetv2_semi.benchmark.study.execution import FINAL, continue_option
from nnunetv2_semi.benchmark.study.jobs import Folders
from nnunetv2_semi.benchmark.training_data import TrainingData
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.processes.commands import Progress, exclusive_exit_status_of, finished_epochs

if TYPE_CHECKING:
    from nnunetv2_semi.benchmark.distillation.start import Start

RESULT = "distill"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, named as nnU-Net's commands name them."""
    parser.add_argument("-d", metavar="DATASET", required=True, help="name or id of a data set with unlabelled cases")
    parser.add_argument("-tr", metavar="TRAINER", help="the teacher's trainer, any that nnU-Net finds")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="its plans (default: %(default)s)")
    parser.add_argument("-c", metavar="CONFIGURATION", default="3d_fullres",
                        help="its configuration, and the student's (default: %(default)s)")
    parser.add_argument("-f", metavar="FOLD", nargs="+", default=["0"],
                        help="its folds. Of one fold, the student trains the same; of several, it trains fold all "
                        "(default: 0)")
    parser.add_argument("-chk", metavar="FILE", default=FINAL, help="its checkpoint (default: %(default)s)")
    parser.add_argument("-m", metavar="FOLDER", help="the teacher's model folder itself, instead of -tr and -p")
    parser.add_argument("--student", metavar="PLANS", required=True, help="plans of the student")
    parser.add_argument("--student-configuration", metavar="CONFIGURATION", help="of the student's plans (default: -c)")
    parser.add_argument("--modality", metavar="NAME", help="what the student sees (default: all channels)")
    parser.add_argument("--name", metavar="PLANS", help="of the plans that are written, a copy of the student's "
                        "(default: made of student, teacher and modality)")
    parser.add_argument("-device", "--device", choices=("cuda", "cpu", "mps"), default="cuda",
                        help="as in nnU-Net (default: cuda)")
    parser.add_argument("-num_gpus", type=int, default=1, help="for training, as in nnU-Net (default: 1)")
    parser.add_argument("--disable_tta", action="store_true", help="compare without mirroring at test time")
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        help="for the log, predictions and the table (default: a folder beside the models)")


def run(args: argparse.Namespace) -> int:
    """Do what is not done yet. Exit status: 0, 1 if a command failed, 130 after Ctrl-C.

    Raises:
        UserError: Something is wrong with the call or the data, or the teacher does not fit; nothing was trained.
    """
    folders = Folders.from_environment()
    if args.tr is None and args.m is None:
        raise UserError("Name the teacher: -tr TRAINER [-p PLANS] [-c CONFIGURATION], or -m FOLDER.")
    # Imports torch.
    from nnunetv2_semi.benchmark.distillation.start import ALL, checked_start
    from nnunetv2_semi.networks.trained_ensemble import TrainedModel

    source = read_source(args.d)
    teacher = TrainedModel.checked(args.m or folders.results / source.name / f"{args.tr}__{args.p}__{args.c}", args.f,
                                   args.chk)
    start = checked_start(source, folders, teacher, student=args.student, modality=args.modality, name=args.name,
                          configuration=args.student_configuration or args.c)
    results = folders.results / source.name
    name = f"{RESULT}__{start.model_folder.name}__fold_{start.fold}"
    out = (args.out or results / name).resolve()
    results.mkdir(parents=True, exist_ok=True)
    data = TrainingData(Path(source.folder), start.preprocessed, start.plans["image_reader_writer"])
    record = results / f"{name}_data.json"

    def work() -> int:
        if any((start.model_folder / f"fold_{start.fold}").glob("checkpoint_*.pth")):
            data.check_same(record, start.fold != ALL, "the student's training", "Give another name with --name, or "
                            f"remove the student, {start.model_folder}.")
        data.note(record)
        _train(start, out, args.device, args.num_gpus)
        _compare(start, out, args.device, mirroring=not args.disable_tta)
        return 0

    return exclusive_exit_status_of(work, results / f".{name}.lock",
                                    f"Another 'nnunetv2_semi distill' is at work on the same student ({name}).")


def _train(start: Start, out: Path, device: str, num_gpus: int) -> None:
    """Train the student, or go on; does nothing where it is trained."""
    from nnunetv2_semi.benchmark.distillation.start import TRAINER

    start.write_plans()
    model = start.model_folder / f"fold_{start.fold}"
    if (model / FINAL).is_file():
        return

    def epochs_done() -> int:
        return min(start.num_epochs, sum(map(finished_epochs, model.glob("training_log_*.txt"))))

    several = ["-num_gpus", str(num_gpus)] if num_gpus > 1 else []
    run_shown(["nnUNetv2_train", start.source.name, start.configuration, start.fold, "-tr", TRAINER, "-p",
               start.plans_name, "-device", device, *several, *continue_option(model)], device, out / "train.log",
              Progress(start.num_epochs, "epoch", epochs_done))


def _compare(start: Start, out: Path, device: str, mirroring: bool) -> None:
    """Predict the same cases with teacher and student; print and write what comes of it."""
    from nnunetv2_semi.benchmark.distillation import comparison
    from nnunetv2_semi.benchmark.distillation.start import TRAINER
    from nnunetv2_semi.networks.trained_ensemble import TrainedModel

    what, cases = start.cases_to_compare()
    student = TrainedModel.checked(start.model_folder, [start.fold], FINAL)
    if cases:
        models = {"teacher": start.teacher, "student": student}
        predicted = {name: comparison.predict(model, cases, out / "predictions" / name, device, mirroring, name)
                     for name, model in models.items()}
        dice = {name: comparison.dice(single, start.source, cases) for name, single in predicted.items()}
        rows = comparison.table({name: (single, dice[name]) for name, single in predicted.items()})
        of_cases = {name: {case: {"dice": dice[name][case], "seconds": single.seconds[case],
                                  "network_seconds": single.network_seconds[case]} for case in cases}
                    for name, single in predicted.items()}
        about = {"compared_on": what, "device": device, "mirroring": mirroring, "teacher": str(start.teacher.folder),
                 "teacher_folds": list(start.teacher.folds), "student": str(student.folder), "fold": start.fold,
                 "modality": start.modality}
        comparison.write(rows, of_cases, about, out / RESULT)
        print(f"\n{len(cases)} {what}:\n\n{comparison.printed(rows)}\n\nAlso in {out / RESULT}.csv and .json")
    else:
        print(f"\nNothing to compare teacher and student on: there are no {what} with a label"
              f"{' and that modality' if start.modality else ''}.")
    options = f"-d {start.source.name} -c {start.configuration} -p {start.plans_name} -tr {TRAINER} -f {start.fold}"
    print(f"\nThe student is in {student.folder}. To predict with it, or to take it where this package is not:\n"
          f"nnUNetv2_predict {options} -i IMAGES -o PREDICTIONS\nnnunetv2_semi export {options} -o MODEL")
