"""A study as a list of trainings, each with a folder that says how far it is."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from nnunetv2_semi.benchmark.report.runs import PredictedRun, Role
from nnunetv2_semi.benchmark.study.study import Entry, Study
from nnunetv2_semi.data.atomic_files import read_json_object, write_json_whole
from nnunetv2_semi.data.cached_reading import file_stamp
from nnunetv2_semi.data.raw_cases import case_and_channel, list_labelled_cases
from nnunetv2_semi.data.splits_file import SPLITS_FILE
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods.settings import merged_settings

# In a model's folder: what the training began with.
MARKER = "study.json"
SECONDS_BETWEEN_TRIES = 1.0
State = Literal["waiting", "running", "finished", "failed"]


def read_object(file: Path) -> dict:
    """Content of plans or of a dataset.json. Raises UserError if it is no JSON object."""
    content = read_json_object(str(file))
    if content is None:
        raise UserError(f"{file} is missing or is not valid JSON: correct it.")
    return content


@dataclass(frozen=True)
class Folders:
    """nnU-Net's three folders."""

    raw: Path
    preprocessed: Path
    results: Path

    @classmethod
    def from_environment(cls) -> Folders:
        """Raises UserError where one of nnU-Net's variables is not set."""
        names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        missing = [name for name in names if not os.environ.get(name)]
        if missing:
            raise UserError(f"Set nnU-Net's environment variables first; missing: {', '.join(missing)}.")
        return cls(*(Path(os.environ[name]) for name in names))


@dataclass(frozen=True)
class Job:
    """One training of a study, and its predictions of the test cases.

    dataset: its full name. plans: name of the plans that its own ones are made from.
    """

    study: Study
    entry: Entry
    dataset: str
    role: Role
    fold: int | str
    seed: int
    plans: str
    folders: Folders

    @property
    def name(self) -> str:
        kind = f"{self.entry.slug}_upper_bound" if self.role == "upper bound" else self.entry.slug
        return f"{self.dataset}__{kind}__fold_{self.fold}__seed_{self.seed}"

    @property
    def folder(self) -> Path:
        return self.study.folder / "runs" / self.name

    @property
    def predictions(self) -> Path:
        return self.folder / "predictions"

    @property
    def training_log(self) -> Path:
        return self.folder / "training.log"

    @property
    def raw(self) -> Path:
        return self.folders.raw / self.dataset

    # plans

    @property
    def plans_name(self) -> str:
        """A name of its own, since nnU-Net names a model's folder by its plans."""
        return f"{self.plans}_{self.study.name}_{self.entry.slug}_seed{self.seed}"

    @property
    def plans_file(self) -> Path:
        return self.folders.preprocessed / self.dataset / f"{self.plans_name}.json"

    @property
    def base_plans_file(self) -> Path:
        """The data set's plans."""
        return self.folders.preprocessed / self.dataset / f"{self.plans}.json"

    def own_plans(self) -> dict:
        """The data set's plans with the settings of this training.

        Raises:
            UserError: The data set is no longer planned.
        """
        if not self.base_plans_file.is_file():
            raise UserError(f"{self.base_plans_file} is missing: whether trainings were begun with these plans cannot "
                            "be told. Bring it back. Where only predictions are left, give the report their folders: "
                            "nnunetv2_semi benchmark report --predictions.")
        plans = read_object(self.base_plans_file)
        configuration = plans["configurations"][self.study.configuration]
        merged: Mapping[str, object] = {"final_validation": False, **self._planned_settings(plans)}
        for settings in (self.study.settings, self.entry.settings, {"seed": self.seed}):
            merged = merged_settings(merged, settings)
        configuration["semi"] = merged
        plans["plans_name"] = self.plans_name
        return plans

    def _planned_settings(self, plans: dict) -> dict:
        """"semi" of the configuration, or of the one that it inherits from: of these nnU-Net takes the first whole."""
        name = self.study.configuration
        while name is not None:
            configuration = plans["configurations"][name]
            if "semi" in configuration:
                return dict(configuration["semi"])
            name = configuration.get("inherits_from")
        return {}

    @property
    def model(self) -> Path:
        """nnU-Net's folder of the trained fold."""
        name = f"{self.entry.trainer}__{self.plans_name}__{self.study.configuration}"
        return self.folders.results / self.dataset / name / f"fold_{self.fold}"

    def made_with(self) -> str:
        """Digest of all that decides the result but the code."""
        return digest([self.entry.trainer, self.entry.selftrain, self.own_plans(), self.study.test_time_mirroring])

    def begun_with(self) -> str | None:
        """`made_with` when the training began; None before that. Another study of its name that is still there, in
        another folder, counts as another beginning: both would train the same model."""
        marker = read_json_object(str(self.model / MARKER)) or {}
        study = marker.get("study")
        if study and Path(study) != self.study.folder and Path(study).is_dir():
            return str(study)
        if marker or "made_with" in self.record:
            return str(marker.get("made_with", self.record.get("made_with")))
        return "unknown" if any(self.model.glob("checkpoint_*.pth")) else None

    # data

    @property
    def data_record(self) -> Path:
        """What the training cases of the data set hold, see `TrainingData.note`."""
        return self.study.folder / f"data_{self.dataset}.json"

    def data_digest(self, digests: Mapping[str, str]) -> str:
        """Of those of `TrainingData.digests` that matter to this training."""
        return digest({name: value for name, value in digests.items() if self.fold != "all" or name != SPLITS_FILE})

    def data_begun_with(self) -> str | None:
        """`data_digest` when the training began; None before that, or where it is not known."""
        return (read_json_object(str(self.model / MARKER)) or {}).get("data")

    @property
    def dataset_json(self) -> dict:
        return read_object(self.raw / "dataset.json")

    def labelled_cases(self) -> list[str]:
        """Names, sorted."""
        return sorted(list_labelled_cases(str(self.raw), self.dataset_json))

    def test_cases(self) -> list[str]:
        """Names of the files in labelsTs."""
        ending = self.dataset_json["file_ending"]
        return sorted(file.name for file in (self.raw / "labelsTs").iterdir()
                      if file.name.endswith(ending) and not file.name.startswith("."))

    def test_images(self) -> dict[str, list[int]]:
        """`file_stamp` of each image of the test cases, by the name of the file."""
        ending, cases = self.dataset_json["file_ending"], set(self.test_cases())
        return {file.name: file_stamp(str(file)) for file in sorted((self.raw / "imagesTs").iterdir())
                if (named := case_and_channel(file.name, ending)) and named[0] + ending in cases}

    def has_predicted_these_images(self) -> bool:
        """Whether no image of a test case changed since it was predicted; so it is where that is not known."""
        predicted = self.record.get("test_images")
        return predicted is None or all(predicted.get(name) == stamp for name, stamp in self.test_images().items())

    @property
    def group(self) -> str:
        """Data sets with the same one have the same test cases: what subset.json says, else a digest of the labels'
        names and sizes."""
        subset = read_json_object(str(self.raw / "subset.json"))
        if subset is not None:
            return str(subset["group"])
        files = [(name, (self.raw / "labelsTs" / name).stat().st_size) for name in self.test_cases()]
        return f"{len(files)} test cases {digest(files)[:6]}"

    # state

    @property
    def record(self) -> dict:
        """Content of run.json; empty before the first start."""
        return read_json_object(str(self.folder / "run.json")) or {}

    def write_record(self, state: State, **further: object) -> None:
        """Change the state, and whatever else is given, in run.json."""
        known = {"dataset": self.dataset, "method": self.entry.name, "trainer": self.entry.trainer, "role": self.role,
                 "fold": self.fold, "seed": self.seed, "plans": self.plans_name, "model": str(self.model)}
        write_json_whole(str(self.folder / "run.json"), {**self.record, **known, "state": state, **further})

    @property
    def state(self) -> State:
        return self.record.get("state", "waiting")

    @contextmanager
    def lock(self, while_waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Held by the process that works on this job; waits for it to be free. It is freed when that process ends."""
        lock = FileLock(self.folder / ".lock", timeout=SECONDS_BETWEEN_TRIES)
        while not lock.is_locked:
            while_waiting()
            try:
                lock.acquire()
            except Timeout:
                pass
        try:
            yield
        finally:
            lock.release()

    def state_now(self) -> str:
        """The state, or "stopped" where a process that ran this was killed."""
        if self.state != "running":
            return self.state
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                return "stopped"
        except Timeout:
            return "running"

    def is_done(self) -> bool:
        """Whether it is finished, and all predictions are still there and of the images that are there now."""
        return (self.state == "finished" and all((self.predictions / case).is_file() for case in self.test_cases())
                and self.has_predicted_these_images())

    def epochs_done(self, num_epochs: int) -> int:
        """Of this training, for a progress bar; those done again after a kill count once."""
        if self.state == "finished":
            return num_epochs
        try:
            begun = re.findall(rb": Epoch (\d+)\s*$", self.training_log.read_bytes(), re.MULTILINE)
        except FileNotFoundError:
            return 0
        return min(num_epochs, int(begun[-1])) if begun else 0

    def predicted(self) -> PredictedRun:
        """For the report; of a finished job."""
        record = self.record
        return PredictedRun(
            dataset=self.dataset, group=self.group, labelled=record.get("labelled"),
            method=self.entry.name, role=self.role, seed=self.seed, fold=str(self.fold), predictions=self.predictions,
            truth=self.raw / "labelsTs", images=self.raw / "imagesTs", dataset_json=self.raw / "dataset.json",
            model=Path(record["model"]), training_seconds=record.get("training_seconds"))


def digest(content: object) -> str:
    """Of anything that can be written as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def jobs_of(study: Study, datasets: Mapping[int | str, str], plans: str, folders: Folders) -> Iterator[Job]:
    """All trainings: data set by data set, in the order of the file; those of one seed before those of the next, so
    that an unfinished study can be reported.

    datasets: id or name in the study file -> full name.
    """
    control = study.control_entry
    for seed in study.seeds:
        for dataset in study.datasets:
            for entry in study.trainers:
                role: Role = "control" if entry == control else "method"
                for fold in study.folds:
                    yield Job(study, entry, datasets[dataset], role, fold, seed, plans, folders)
        if study.upper_bound is not None:
            for fold in study.folds:
                yield Job(study, control, datasets[study.upper_bound], "upper bound", fold, seed, plans, folders)
