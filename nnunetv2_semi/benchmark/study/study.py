"""The study file: which trainers are compared, on which data sets, with which folds and seeds."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nnunetv2_semi.errors import UserError

OUR_PREFIX = "nnUNetTrainerSemi"
CONTROL_TRAINER = "nnUNetTrainerSemiSupervised"
SELFTRAIN_KEYS = ["rounds", "keep", "snapshots", "teachers", "teacher_folds", "ignore_unstable", "finetune"]


@dataclass(frozen=True)
class Entry:
    """One row of a study's tables.

    trainer: class name. name: shown; by default the trainer's without its prefix. settings: of "semi", on top of the
    study's. selftrain: options of `nnunetv2_semi selftrain`: this is the self-training of that trainer's models.
    """

    trainer: str
    name: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    selftrain: Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        if not self.name:
            name = self.trainer.removeprefix(OUR_PREFIX) or self.trainer
            object.__setattr__(self, "name", name if self.selftrain is None else f"{name}, self-training")

    @property
    def slug(self) -> str:
        """The name as a part of file names."""
        return re.sub(r"[^A-Za-z0-9]+", "_", self.name).strip("_")


@dataclass(frozen=True)
class Study:
    """A study file's content.

    datasets: ids or names. upper_bound: data set with all labels, on which the control is trained. control: name of the
    entry that others are compared with. planner, plans: the plans are made by the planner where they do not exist; the
    name is the planner's own by default. plans_from: data set whose plans all others get. settings: of "semi", for all.
    meant_differences: names of what may differ between trainers. devices: one training at a time on each, for instance
    cuda:0, cuda:0, cpu. cluster: see `cluster_executor`. tolerance_mm: of the surface Dice. folder: where everything of
    the study lies, beside the file.
    """

    folder: Path
    datasets: tuple[int | str, ...]
    trainers: tuple[Entry, ...]
    title: str = ""
    upper_bound: int | str | None = None
    control: str | None = None
    configuration: str = "3d_fullres"
    planner: str = "nnUNetPlannerSemi"
    plans: str | None = None
    plans_from: int | str | None = None
    folds: tuple[int | str, ...] = ("all",)
    seeds: tuple[int, ...] = (0, 1, 2)
    settings: Mapping[str, object] = field(default_factory=dict)
    meant_differences: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    cluster: Mapping[str, object] = field(default_factory=dict)
    test_time_mirroring: bool = True
    tolerance_mm: float = 1.0

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def control_entry(self) -> Entry:
        """The entry that others are compared with, and that is trained on the upper bound's data set."""
        for entry in self.trainers:
            if entry.name == self.control or (self.control is None and entry.trainer == CONTROL_TRAINER
                                              and entry.selftrain is None):
                return entry
        if self.control is not None:
            raise UserError(f"control: {self.control!r} is not the name of a trainer of the study. Names: "
                            f"{', '.join(entry.name for entry in self.trainers)}.")
        raise UserError(f"The study has no control. Add {CONTROL_TRAINER} to trainers, or name one with control:.")


def read_study(file: Path) -> Study:
    """The study of a YAML file; its folder is beside the file, with the file's name without ending.

    Raises:
        UserError: The file cannot be read, has an unknown key, or a value that cannot be used.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise UserError("Studies need further packages: pip install \"nnunetv2-semi[benchmark]\"") from error
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must have keys such as datasets: and trainers:.")
    where = str(file)
    allowed = {single.name: single for single in dataclasses.fields(Study) if single.name != "folder"}
    _check_keys(content, list(allowed), where)
    values: dict[str, object] = {}
    for key, value in content.items():
        values[key] = _value(key, value, str(allowed[key].type), where)
    for key in ("datasets", "trainers"):
        if not values.get(key):
            raise UserError(f"{where}: {key} is missing or empty.")
    for key in ("folds", "seeds"):
        if key in values and not values[key]:
            raise UserError(f"{where}: {key} is empty.")
    study = Study(folder=file.with_suffix("").resolve(), **values)  # type: ignore[arg-type]
    if study.folder == file.resolve():
        raise UserError(f"{where}: give the file the ending .yaml: the folder {study.folder.name} is made beside it.")
    _check(study, where, text)
    return study


def _value(key: str, value: object, annotation: str, where: str) -> object:
    """``value`` as the annotated type of a field of `Study`."""
    if key == "trainers":
        return tuple(_entry(single, where) for single in _list(key, value, where))
    if annotation.startswith("tuple"):
        items = _list(key, value, where)
        kinds = {"tuple[int, ...]": (int,), "tuple[str, ...]": (str,)}.get(annotation, (int, str))
        if any(type(item) not in kinds for item in items):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f"{where}: {key} must hold {names}, got {value!r}.")
        return tuple(items)
    expected: dict[str, tuple[type, ...]] = {"bool": (bool,), "float": (int, float), "Mapping[str, object]": (dict,),
                                             "int | str | None": (int, str), "str | None": (str,), "str": (str,)}
    if type(value) not in expected[annotation]:
        raise UserError(f"{where}: {key} must be {annotation.replace('Mapping[str, object]', 'an object')}, "
                        f"got {value!r}.")
    return value


def _list(key: str, value: object, where: str) -> list:
    if not isinstance(value, list):
        raise UserError(f"{where}: {key} must be a list such as [a, b], got {value!r}.")
    return value


def _entry(value: object, where: str) -> Entry:
    if isinstance(value, str):
        return Entry(value)
    if not isinstance(value, dict) or not isinstance(value.get("trainer"), str):
        raise UserError(f"{where}: each of trainers must be a class name, or an object with trainer:, got {value!r}.")
    _check_keys(value, [single.name for single in dataclasses.fields(Entry)], f"{where}, trainers")
    if not isinstance(value.get("name", ""), str) or not Entry(**{**value, "selftrain": None}).slug:
        raise UserError(f"{where}: name must be text with letters or digits, got {value['name']!r}.")
    for key in ("settings", "selftrain"):
        if key in value and not isinstance(value[key], dict):
            raise UserError(f"{where}: {key} of {value['trainer']} must be an object, got {value[key]!r}.")
    if "selftrain" in value:
        _check_selftrain(value["selftrain"], f"{where}, selftrain of {value['trainer']}")
    return Entry(**value)


def _check_selftrain(options: Mapping[str, object], where: str) -> None:
    _check_keys(options, SELFTRAIN_KEYS, where)
    for key, value in options.items():
        if key == "keep":
            if type(value) not in (int, float) or not 0 < float(str(value)) <= 1:
                raise UserError(f"{where}: keep must be a number above 0 and at most 1, got {value!r}.")
        elif key == "finetune":
            if type(value) not in (int, float) or not 0 <= float(str(value)) < 1:
                raise UserError(f"{where}: finetune must be a number of at least 0 and below 1, got {value!r}.")
        elif key in ("teacher_folds", "ignore_unstable"):
            if type(value) is not bool:
                raise UserError(f"{where}: {key} must be true or false, got {value!r}.")
        elif type(value) is not int or value < 1:
            raise UserError(f"{where}: {key} must be a whole number of at least 1, got {value!r}.")


def _check_keys(content: Mapping[str, object], allowed: list[str], where: str) -> None:
    for key in content:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(f"{where}: unknown key {key!r}.{hint} Allowed: {', '.join(allowed)}.")


def _check(study: Study, where: str, text: str) -> None:
    slugs = [entry.slug for entry in study.trainers]
    for slug in slugs:
        if slugs.count(slug) > 1:
            raise UserError(f"{where}: two of trainers have the name {slug}. Tell them apart with name:.")
    for key in ("datasets", "folds", "seeds"):
        values = getattr(study, key)
        if len(set(values)) < len(values):
            raise UserError(f"{where}: {key} has a value twice.")
    for settings in (study.settings, *(entry.settings for entry in study.trainers)):
        if "seed" in settings:
            raise UserError(f"{where}: seed is not a setting of a study: list seeds: [0, 1, 2].")
    for fold in study.folds:
        if fold != "all" and not (isinstance(fold, int) and fold >= 0):
            raise UserError(f"{where}: a fold is a number from 0 or all, got {fold!r}.")
    # YAML takes 010 for the octal number 8, and 008 for text
    if re.search(r"^(datasets|upper_bound|plans_from)\s*:[^#\n]*[\[\s,]0\d", text, re.MULTILINE):
        raise UserError(f"{where}: write ids of data sets without zeros before them.")
    study.control_entry  # noqa: B018
