"""``nnunetv2_semi selftrain``: train, label unlabelled cases with the model, keep the stable ones, train again."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from nnunetv2_semi.benchmark.datasets.source_cases import read_source
from nnunetv2_semi.benchmark.self_training import stability
from nnunetv2_semi.benchmark.self_training.input import OPTION_DEFAULTS, Options, Start, checked_start
from nnunetv2_semi.benchmark.self_training.models import Models, Predictor, Teacher, run_shown
from nnunetv2_semi.benchmark.self_training.pseudo_labelled import RECORD, pseudo_labelled_dataset
from nnunetv2_semi.benchmark.self_training.stability_picture import overlay_rows, save_stability_picture
from nnunetv2_semi.benchmark.self_training.unstable_voxels import with_ignore_label, write_stable_labels
from nnunetv2_semi.benchmark.study.execution import SELFTRAIN_RESULT
from nnunetv2_semi.benchmark.study.jobs import Folders
from nnunetv2_semi.benchmark.training_data import TrainingData
from nnunetv2_semi.data.atomic_files import read_json_object, write_json_whole
from nnunetv2_semi.data.file_contents import file_contents
from nnunetv2_semi.data.raw_cases import UNLABELLED_FOLDER
from nnunetv2_semi.data.splits_file import read_splits, splits_path
from nnunetv2_semi.errors import UserError, shown
from nnunetv2_semi.processes.commands import CommandFailed, Progress, exclusive_exit_status_of, prediction_options
from nnunetv2_semi.processes.pool import default_processes, processes_to_read

OPTIONS = "selftrain_options.json"
ANEW = ("Begin anew: with another --out, and without this self-training's models and data sets, or with a copy of the "
        "plans under another name.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, named as nnU-Net's commands name them."""
    parser.add_argument("-d", metavar="DATASET", required=True, help="name or id of a data set with unlabelled cases")
    parser.add_argument("-c", metavar="CONFIGURATION", default="3d_fullres", help="(default: %(default)s)")
    parser.add_argument("-f", metavar="FOLD", type=_fold, default="all", help="a number or all (default: %(default)s)")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="(default: %(default)s)")
    parser.add_argument("-tr", metavar="TRAINER", default="nnUNetTrainerSemiSupervised", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="of labelling and training again (default: %(default)s)")
    parser.add_argument("--keep", type=float, default=0.9,
                        help="share of the unlabelled cases that get a label, the most stable ones (default: 0.9)")
    parser.add_argument("--snapshots", type=int, default=2,
                        help="checkpoints on the way to compare a single teacher's final one with (default: 2)")
    parser.add_argument("--teachers", type=int, default=1,
                        help="models of the first round, which differ in the seed; their ensemble labels (default: 1)")
    parser.add_argument("--teacher-folds", action="store_true",
                        help="these models are those of nnU-Net's folds instead (with -f all)")
    parser.add_argument("--ignore-unstable", action="store_true",
                        help="give voxels on which predictions differ the ignore label")
    parser.add_argument("--finetune", type=float, default=0.0, metavar="FRACTION",
                        help="of the student's epochs, the last ones, on the true labels alone (default: 0)")
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
    options = Options(source.name, args.c, args.f, args.p, args.tr, args.keep, args.snapshots, not args.disable_tta,
                      args.teachers, args.ignore_unstable, args.finetune, args.teacher_folds)
    start = checked_start(options, source, folders)
    results = folders.results / source.name
    name = f"selftrain__{options.model_name}__fold_{options.fold}"
    out = (args.out or results / name).resolve()
    results.mkdir(parents=True, exist_ok=True)
    data = TrainingData(Path(source.folder), folders.preprocessed / source.name, start.reader.__name__)
    record = results / f"{name}_data.json"

    def work() -> int:
        _write_options(out / OPTIONS, asdict(options))
        fold = "*" if options.teacher_folds else options.fold
        if (out / "round_1").is_dir() or any((results / options.model_name).glob(f"fold_{fold}/checkpoint_*.pth")):
            data.check_same(record, fold != "all", "the self-training", ANEW)
        data.note(record)
        SelfTraining(start, folders, out, args.device, args.num_gpus).run(args.rounds)
        return 0

    return exclusive_exit_status_of(work, results / f".{name}.lock",
                                    f"Another 'nnunetv2_semi selftrain' is at work on the same models ({name}).")


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
        self.folders, self.out, self.device = folders, out, device
        self.models = Models(start, folders, out, device, num_gpus)
        self.ending = str(self.source.dataset_json["file_ending"])
        self.files = [case + self.ending for case in self.source.unlabelled]

    def run(self, rounds: int) -> None:
        """All rounds; says where the last model is."""
        options = self.options
        teacher = self.models.first_teacher()
        trainings = list(teacher.models)
        for number in range(1, rounds + 1):
            dataset = self.label(teacher, number)
            self.preprocess(dataset)
            teacher = self.models.student(dataset)
            trainings += teacher.models
        dataset, plans_name = self.models.deployed(dataset)
        write_json_whole(str(self.out / SELFTRAIN_RESULT), {
            "dataset": dataset, "plans": plans_name, "trainer": options.trainer,
            "configuration": options.configuration, "fold": options.fold, "rounds": rounds, "options": asdict(options),
            "model": str(trainings[-1]), "trainings": [str(model) for model in trainings]})
        print(f"\nResult: data set {dataset}, plans {plans_name}, trainer {options.trainer}, "
              f"fold {options.fold}, in {trainings[-1]}\nTo predict with it:\n"
              f"nnUNetv2_predict -d {dataset} -c {options.configuration} -f {options.fold} -p {plans_name} "
              f"-tr {options.trainer} -i IMAGES -o PREDICTIONS")

    def label(self, teacher: Teacher, number: int) -> str:
        """Name of the data set with the labels that a teacher gives to the stable cases."""
        folder = self.out / f"round_{number}"
        final = self.predict(teacher.final, folder)
        others = {other.name: self.predict(other, folder) for other in teacher.others}
        scores, kept = self.rate(final, list(others.values()), folder / "stability.csv")
        empty = sorted(case for case, score in scores.items() if score is None)
        print(f"\nRound {number}: {len(kept)} of {len(scores)} unlabelled cases keep their prediction. See {folder}")
        if empty:
            print(f"  Nothing was predicted in {len(empty)}, which are not used: {shown(empty)}")
        if not kept:
            where = ", ".join(map(str, teacher.models))
            raise CommandFailed(f"The model in {where} finds nothing in any unlabelled case, so there is nothing to "
                                "learn from its predictions. Train longer, or on more labelled cases.")
        picture = folder / "stability.png"
        if not picture.is_file():
            names = {name.replace("_", " ").capitalize(): predictions for name, predictions in others.items()}
            rows = overlay_rows(self.source, self.start.reader, final, names, scores)
            title = f"{teacher.trained_on}, round {number}"
            save_stability_picture(scores, kept, rows, self.source.dataset_json, title, picture)
        made_by = {**asdict(self.options), "round": number, "folder": str(self.out)}
        source, labels = self.source, final
        if self.options.ignore_unstable:
            source = replace(source, dataset_json=with_ignore_label(source.dataset_json))
            labels = folder / "labels"
            if not labels.is_dir():
                write_stable_labels(final, list(others.values()), [case + self.ending for case in sorted(kept)],
                                    source.dataset_json["labels"]["ignore"], self.start.reader, labels,
                                    default_processes())
        return pseudo_labelled_dataset(source, number, made_by, teacher.models, labels, scores, kept)

    def predict(self, predictor: Predictor, folder: Path) -> Path:
        """Folder with the predictions of all unlabelled cases of the original data set."""
        name = predictor.name
        done = folder / "predictions" / name
        if done.is_dir():
            return done
        unfinished = done.with_name(f"{name}.unfinished")
        for file in self._unreadable(unfinished):
            os.remove(file)  # cut off by a kill
        run_shown([predictor.command, "-i", str(self.folders.raw / self.source.name / UNLABELLED_FOLDER), "-o",
                   str(unfinished), "--continue_prediction",
                   *prediction_options(self.device, self.options.mirroring), *predictor.model],
                  self.device, folder / f"predict_{name}.log",
                  Progress(len(self.files), "case", lambda: len(list(unfinished.glob(f"*{self.ending}")))))
        missing = [file for file in self.files if not (unfinished / file).is_file()]
        if missing:
            raise CommandFailed(f"nnUNetv2_predict left no prediction for {shown(missing)} in {unfinished}.")
        unfinished.rename(done)
        return done

    def _unreadable(self, folder: Path) -> Iterable[str]:
        """The predictions in ``folder`` that cannot be read."""
        files = [str(file) for file in folder.glob(f"*{self.ending}")]
        _, reasons = file_contents(files, labels=True, cache_folder=None, raw_dataset_folder="",
                                   reader_name=self.start.reader.__name__, num_processes=processes_to_read(files),
                                   show_progress_bar=False)
        return reasons

    def rate(self, final: Path, others: Sequence[Path],
             table: Path) -> tuple[Mapping[str, float | None], Sequence[str]]:
        """Stability per case, and the cases to keep; in ``table`` too."""
        if table.is_file():
            scores = stability.read_scores(table)
            if set(scores) != set(self.source.unlabelled):
                changed = shown(sorted(set(scores) ^ set(self.source.unlabelled)))
                raise UserError(f"Other cases are unlabelled than when {table.parent} was made: {changed}. {ANEW}")
        else:
            rated = stability.stability_of_cases(final, others, self.files, self.start.structures,
                                                 self.start.reader, default_processes())
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
        self.models.write_plans(dataset, self.start.student_plans())
        for file in (raw / "dataset.json", original / "dataset_fingerprint.json"):
            write_json_whole(str(folder / file.name), read_json_object(str(file)) or {})
        if isinstance(self.options.fold, int):
            split = read_splits(splits_path(original))[self.options.fold]
            added = json.loads((raw / RECORD).read_text(encoding="utf-8"))["pseudo_labelled"]
            # The teacher has seen the validation cases of the other folds: these cannot be trained here.
            others: list[dict[str, list[str]]] = [{"train": [], "val": []} for _ in range(self.options.fold)]
            own = {"train": [*split["train"], *added], "val": split["val"]}
            write_json_whole(splits_path(folder), [*others, own])
        run_shown(["nnUNetv2_preprocess", "-d", str(int(dataset[7:10])), "-plans_name", self.options.plans_name, "-c",
                   self.options.configuration, "-np", str(default_processes())],
                  self.device, self.out / f"preprocess_{dataset}.log", Progress())
        done.touch()


def _fold(text: str) -> int | str:
    if text == "all":
        return text
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is neither a number nor all")
    return int(text)


def _write_options(file: Path, options: Mapping[str, object]) -> None:
    """Note what a folder's results are made with; refuse to mix them with those of other options."""
    before = {**OPTION_DEFAULTS, **(read_json_object(str(file)) or options)}
    changed = [f"{name} was {before.get(name)}, now {value}" for name, value in options.items()
               if before.get(name) != value]
    if changed:
        raise UserError(f"{file.parent} has results of another call: {'; '.join(changed)}. Give another --out, or "
                        "remove that folder.")
    write_json_whole(str(file), options)
