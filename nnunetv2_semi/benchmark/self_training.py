"""``nnunetv2_semi selftrain``: train, label unlabelled cases with the model, keep the stable ones, train again."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout
from nnunetv2.configuration import default_num_processes

from nnunetv2_semi.benchmark import stability
from nnunetv2_semi.benchmark.execution import FINAL, SELFTRAIN_RESULT, continue_option, environment
from nnunetv2_semi.benchmark.jobs import Folders
from nnunetv2_semi.benchmark.pseudo_labelled import RECORD, pseudo_labelled_dataset
from nnunetv2_semi.benchmark.self_training_input import Options, Start, checked_start
from nnunetv2_semi.benchmark.source_cases import label_values, read_source
from nnunetv2_semi.benchmark.stability_picture import overlay_rows, save_stability_picture
from nnunetv2_semi.checkpoints import snapshot_file
from nnunetv2_semi.commands import (
    CommandFailed,
    Progress,
    command_path,
    exit_status_of,
    finished_epochs,
    prediction_options,
    run_logged,
)
from nnunetv2_semi.data.raw_cases import UNLABELLED_FOLDER
from nnunetv2_semi.data.whole_files import read_json_object, write_json_whole
from nnunetv2_semi.errors import UserError

OPTIONS = "selftrain_options.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, named as nnU-Net's commands name them."""
    parser.add_argument("-d", metavar="DATASET", required=True, help="name or id of a data set with unlabelled cases")
    parser.add_argument("-c", metavar="CONFIGURATION", default="3d_fullres", help="(default: %(default)s)")
    parser.add_argument("-f", metavar="FOLD", type=_fold, default="all", help="a number or all (default: %(default)s)")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="(default: %(default)s)")
    parser.add_argument("-tr", metavar="TRAINER", default="nnUNetTrainerSemiSupervised", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="of labelling and training again (default: %(default)s)")
    parser.add_argument("--keep", type=float, default=0.5,
                        help="share of the unlabelled cases that get a label, the most stable ones (default: 0.5)")
    parser.add_argument("--snapshots", type=int, default=2,
                        help="checkpoints on the way to compare the final one with (default: %(default)s)")
    parser.add_argument("-device", "--device", choices=("cuda", "cpu", "mps"), default="cuda",
                        help="as in nnU-Net (default: cuda)")
    parser.add_argument("-num_gpus", type=int, default=1, help="for training, as in nnU-Net (default: 1)")
    parser.add_argument("--disable_tta", action="store_true", help="predict without mirroring")
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        help="for logs, predictions, tables and pictures (default: a folder beside the models)")


def run(args: argparse.Namespace) -> int:
    """Do what is not done yet. Exit status: 0, 1 if a command failed, 130 after Ctrl-C.

    Raises:
        UserError: Something is wrong with the call or the data; nothing was trained.
    """
    folders = Folders.from_environment()
    if args.rounds < 1:
        raise UserError(f"--rounds must be at least 1, got {args.rounds}.")
    source = read_source(args.d)
    options = Options(source.name, args.c, args.f, args.p, args.tr, args.keep, args.snapshots, not args.disable_tta)
    start = checked_start(options, source, folders)
    results = folders.results / source.name
    name = f"selftrain__{options.model_name}__fold_{options.fold}"
    out = (args.out or results / name).resolve()
    results.mkdir(parents=True, exist_ok=True)

    def work() -> int:
        _write_options(out / OPTIONS, asdict(options))
        SelfTraining(start, folders, out, args.device, args.num_gpus).run(args.rounds)
        return 0

    try:
        with FileLock(results / f".{name}.lock", timeout=0):
            return exit_status_of(work)
    except Timeout as error:
        raise UserError(f"Another 'nnunetv2_semi selftrain' is at work on the same models ({name}).") from error


class SelfTraining:
    """The steps; each does nothing where its result is there.

    Args:
        start: Data set, plans and options.
        folders: nnU-Net's.
        out: Folder for everything but models and data sets.
        device: ``cuda``, ``cpu`` or ``mps``.
        num_gpus: For training.
    """

    def __init__(self, start: Start, folders: Folders, out: Path, device: str, num_gpus: int) -> None:
        self.start, self.options, self.source = start, start.options, start.source
        self.folders, self.out, self.device, self.num_gpus = folders, out, device, num_gpus
        self.ending = str(self.source.dataset_json["file_ending"])
        self.files = [case + self.ending for case in self.source.unlabelled]

    def run(self, rounds: int) -> None:
        """All rounds; says where the last model is."""
        dataset, options = self.source.name, self.options
        self.write_plans(dataset)
        trainings = [self.train(dataset)]
        for number in range(1, rounds + 1):
            dataset = self.label(dataset, trainings[-1], number)
            self.preprocess(dataset)
            trainings.append(self.train(dataset))
        write_json_whole(str(self.out / SELFTRAIN_RESULT), {
            "dataset": dataset, "plans": options.plans_name, "trainer": options.trainer,
            "configuration": options.configuration, "fold": options.fold, "rounds": rounds,
            "model": str(trainings[-1]), "trainings": [str(model) for model in trainings]})
        print(f"\nResult: data set {dataset}, plans {options.plans_name}, trainer {options.trainer}, "
              f"fold {options.fold}, in {trainings[-1]}\nTo predict with it:\n"
              f"nnUNetv2_predict -d {dataset} -c {options.configuration} -f {options.fold} -p {options.plans_name} "
              f"-tr {options.trainer} -i IMAGES -o PREDICTIONS")

    def write_plans(self, dataset: str) -> None:
        """The plans of all models, for one of the data sets."""
        file = self.folders.preprocessed / dataset / f"{self.options.plans_name}.json"
        write_json_whole(str(file), {**self.start.plans, "dataset_name": dataset})

    def train(self, dataset: str) -> Path:
        """Fold folder of the model that is trained on a data set."""
        options = self.options
        model = self.folders.results / dataset / options.model_name / f"fold_{options.fold}"
        if (model / FINAL).is_file():
            return model

        def epochs() -> int:
            logs = model.glob("training_log_*.txt")  # one for each start
            return min(self.start.num_epochs, sum(map(finished_epochs, logs)))

        several = ["-num_gpus", str(self.num_gpus)] if self.num_gpus > 1 else []
        self._run(["nnUNetv2_train", dataset, options.configuration, str(options.fold), "-tr", options.trainer, "-p",
                   options.plans_name, "-device", self.device, *several, *continue_option(model)],
                  self.out / f"train_{dataset}.log", Progress(self.start.num_epochs, "epoch", epochs))
        return model

    def label(self, dataset: str, teacher: Path, number: int) -> str:
        """Name of the data set with the labels that a model, trained on ``dataset``, gives to the stable cases."""
        folder = self.out / f"round_{number}"
        checkpoints = {f"snapshot_{index + 1}": snapshot_file(index + 1) for index in range(self.options.snapshots)}
        final = self.predict(dataset, FINAL, folder, "final")
        snapshots = [self.predict(dataset, file, folder, name) for name, file in checkpoints.items()]
        scores, kept = self.rate(final, snapshots, folder / "stability.csv")
        empty = sorted(case for case, score in scores.items() if score is None)
        print(f"\nRound {number}: {len(kept)} of {len(scores)} unlabelled cases keep their prediction. See {folder}")
        if empty:
            print(f"  Nothing was predicted in {len(empty)}, which are not used: {', '.join(empty)}")
        if not kept:
            raise CommandFailed(f"The model in {teacher} finds nothing in any unlabelled case, so there is nothing to "
                                "learn from its predictions. Train longer, or on more labelled cases.")
        picture = folder / "stability.png"
        if not picture.is_file():
            rows = overlay_rows(self.source, self.start.reader, final, snapshots, scores)
            save_stability_picture(scores, kept, rows, self.source.dataset_json, f"{dataset}, round {number}", picture)
        made_by = {**asdict(self.options), "round": number, "folder": str(self.out)}
        return pseudo_labelled_dataset(self.source, number, made_by, teacher, final, scores, kept)

    def predict(self, dataset: str, checkpoint: str, folder: Path, name: str) -> Path:
        """Folder with a checkpoint's predictions of all unlabelled cases of the original data set."""
        done, options = folder / "predictions" / name, self.options
        if done.is_dir():
            return done
        unfinished = done.with_name(f"{name}.unfinished")
        for file in unfinished.glob(f"*{self.ending}"):
            if label_values(str(file), self.start.reader)[1]:
                file.unlink()  # cut off by a kill
        self._run(["nnUNetv2_predict", "-i", str(self.folders.raw / self.source.name / UNLABELLED_FOLDER), "-o",
                   str(unfinished), "-d", dataset, "-c", options.configuration, "-f", str(options.fold), "-tr",
                   options.trainer, "-p", options.plans_name, "-chk", checkpoint, "--continue_prediction",
                   *prediction_options(self.device, options.mirroring)], folder / f"predict_{name}.log",
                  Progress(len(self.files), "case", lambda: len(list(unfinished.glob(f"*{self.ending}")))))
        missing = [file for file in self.files if not (unfinished / file).is_file()]
        if missing:
            raise CommandFailed(f"nnUNetv2_predict left no prediction for {', '.join(missing)} in {unfinished}.")
        unfinished.rename(done)
        return done

    def rate(self, final: Path, snapshots: Sequence[Path],
             table: Path) -> tuple[Mapping[str, float | None], Sequence[str]]:
        """Stability per case, and the cases to keep; in ``table`` too."""
        if table.is_file():
            scores = stability.read_scores(table)
        else:
            rated = stability.stability_of_cases(final, snapshots, self.files, self.start.structures,
                                                 self.start.reader, default_num_processes)
            scores = {file.removesuffix(self.ending): score for file, score in rated.items()}
        kept = stability.most_stable(scores, self.options.keep)
        if not table.is_file():
            stability.write_scores(table, scores, kept)
        return scores, kept

    def preprocess(self, dataset: str) -> None:
        """Preprocess a pseudo-labelled data set with the plans of the original one."""
        raw, folder = self.folders.raw / dataset, self.folders.preprocessed / dataset
        original = self.folders.preprocessed / self.source.name
        done = folder / f"selftrain_{self.options.configuration}.done"
        if done.is_file():
            return
        self.write_plans(dataset)
        for file in (raw / "dataset.json", original / "dataset_fingerprint.json"):
            write_json_whole(str(folder / file.name), read_json_object(str(file)) or {})
        if isinstance(self.options.fold, int):
            split = json.loads((original / "splits_final.json").read_text(encoding="utf-8"))[self.options.fold]
            added = json.loads((raw / RECORD).read_text(encoding="utf-8"))["pseudo_labelled"]
            # The teacher has seen the validation cases of the other folds: these cannot be trained here.
            others: list[dict[str, list[str]]] = [{"train": [], "val": []} for _ in range(self.options.fold)]
            own = {"train": [*split["train"], *added], "val": split["val"]}
            write_json_whole(str(folder / "splits_final.json"), [*others, own])
        self._run(["nnUNetv2_preprocess", "-d", str(int(dataset[7:10])), "-plans_name", self.options.plans_name, "-c",
                   self.options.configuration, "-np", str(default_num_processes)],
                  self.out / f"preprocess_{dataset}.log", Progress())
        done.touch()

    def _run(self, command: Sequence[str], log: Path, progress: Progress) -> None:
        print(f"\n$ {shlex.join(command)}", flush=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        seconds = run_logged([command_path(command[0]), *command[1:]], log, environment(self.device, None), progress)
        print(f"  took {seconds:.0f} s", flush=True)


def _fold(text: str) -> int | str:
    if text == "all":
        return text
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is neither a number nor all")
    return int(text)


def _write_options(file: Path, options: Mapping[str, object]) -> None:
    """Note what a folder's results are made with; refuse to mix them with those of other options."""
    before = read_json_object(str(file)) or options
    changed = [f"{name} was {before.get(name)}, now {value}" for name, value in options.items()
               if before.get(name) != value]
    if changed:
        raise UserError(f"{file.parent} has results of another call: {'; '.join(changed)}. Give another --out, or "
                        "remove that folder.")
    write_json_whole(str(file), options)
