"""The cases of a fully labelled raw data set: their files, as a new data set names them, and the classes in them."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.utilities.utils import create_paths_fn, get_filenames_of_train_images_and_targets

from nnunetv2_semi.data.atomic_files import read_json_object
from nnunetv2_semi.data.dataset_settings import num_channels
from nnunetv2_semi.data.file_contents import file_contents
from nnunetv2_semi.data.raw_cases import (
    channel_numbers,
    check_labelled_images_have_labels,
    check_names_are_unlabelled,
    list_labelled_cases,
    list_unlabelled_cases,
    raw_dataset_folder,
)
from nnunetv2_semi.errors import UserError, shown
from nnunetv2_semi.processes.pool import default_processes

REQUIRED_KEYS = ("labels", "file_ending")


@dataclass(frozen=True)
class Case:
    """Files of one case: file name in an nnU-Net folder to path of the file. Without a label, `label` is empty.

    beside_images, beside_label: what belongs to these files and is no image: the voxel size of TIFF files.
    """

    images: dict[str, str]
    label: dict[str, str]
    beside_images: dict[str, str] = field(default_factory=dict)
    beside_label: dict[str, str] = field(default_factory=dict)

    def files(self, images_folder: str, label_folder: str | None = None) -> dict[str, str]:
        """All files, by their path in a data set: in ``images_folder`` and, unless it is None, ``label_folder``."""
        groups = [(images_folder, self.images | self.beside_images)]
        if label_folder is not None:
            groups.append((label_folder, self.label | self.beside_label))
        return {f"{folder}/{name}": path for folder, group in groups for name, path in group.items()}


@dataclass(frozen=True)
class Source:
    """A raw data set. Cases by name, in alphabetical order; `test` has those of `imagesTs` that have a label."""

    folder: str
    dataset_json: dict
    labelled: dict[str, Case]
    unlabelled: dict[str, Case]
    test: dict[str, Case]

    @property
    def name(self) -> str:
        """Such as Dataset007_Mine."""
        return os.path.basename(self.folder)


def read_source(dataset_name_or_id: str) -> Source:
    """List the cases of a data set in nnUNet_raw. Label files are not opened.

    Raises:
        UserError: there is no such data set, dataset.json cannot be used, or files are missing or misnamed.
    """
    folder = raw_dataset_folder(dataset_name_or_id)
    dataset_json = read_json_object(os.path.join(folder, "dataset.json")) or {}
    absent = [key for key in REQUIRED_KEYS if key not in dataset_json]
    if absent:
        raise UserError(f"dataset.json in {folder} is absent, not valid JSON, or lacks {', '.join(absent)}.")
    check_labelled_images_have_labels(folder, dataset_json)
    labelled = list_labelled_cases(folder, dataset_json)
    unlabelled = list_unlabelled_cases(folder, dataset_json)
    check_names_are_unlabelled(unlabelled, labelled, "imagesTr")
    if not labelled:
        raise UserError(f"There are no labelled cases in {os.path.join(folder, 'imagesTr')}.")
    ending = dataset_json["file_ending"]
    if "dataset" in dataset_json:
        # It may list files of any name.
        listed = get_filenames_of_train_images_and_targets(folder, copy.deepcopy(dataset_json))
        labels = {case: listed[case]["label"] for case in labelled}
        images = {
            case: {
                f"{case}_{index:04d}{ending}": path
                for index, path in zip(_channels(paths, dataset_json), paths, strict=True)
            }
            for case, paths in labelled.items()
        }
    else:
        labels = {case: os.path.join(folder, "labelsTr", case + ending) for case in labelled}
        images = {case: _by_name(paths) for case, paths in labelled.items()}
    source = Source(
        folder,
        dataset_json,
        {case: _case(case, images[case], labels[case], ending) for case in labelled},
        {case: _case(case, _by_name(paths), None, ending) for case, paths in unlabelled.items()},
        _test_cases(folder, ending),
    )
    _check_files(source)
    return source


def class_names(dataset_json: dict) -> dict[int, str]:
    """Name of each label value, without background and ignore. Where there are regions, values are named by number.

    Raises:
        UserError: "labels" are not as nnU-Net wants them.
    """
    try:
        values = {
            name: [int(item) for item in (value if isinstance(value, list) else [value])]
            for name, value in dataset_json["labels"].items()
            if name not in ("background", "ignore")
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f'"labels" in dataset.json must name numbers or lists of numbers: {error}.') from error
    has_regions = any(len(region) > 1 for region in values.values())
    names = {value: f"label {value}" if has_regions else name for name, region in values.items() for value in region}
    return {value: names[value] for value in sorted(names) if value != 0}


def classes_per_case(dataset_json: dict, cases: Mapping[str, Case]) -> dict[str, frozenset[str]]:
    """Names of the classes in the label file of each case, read in parallel with nnU-Net's reader.

    Raises:
        UserError: label files that cannot be read, or that hold values which dataset.json does not name.
    """
    names = class_names(dataset_json)
    files = {case: next(iter(entry.label.values())) for case, entry in cases.items()}
    example = next(iter(next(iter(cases.values())).images.values()))
    try:
        reader = determine_reader_writer_from_dataset_json(dataset_json, example, verbose=False)
    except RuntimeError as error:
        raise UserError(f"nnU-Net has no reader for {example}: {error}") from error
    contents, reasons = file_contents(
        files.values(),
        labels=True,
        cache_folder=None,
        raw_dataset_folder="",
        reader_name=reader.__name__,
        num_processes=default_processes(),
    )
    known = {*names, 0, dataset_json["labels"].get("ignore", 0)}
    unknown = {file: sorted({*content.values} - known) for file, content in contents.items()}
    reasons |= {file: f"values that dataset.json does not name: {values}" for file, values in unknown.items() if values}
    problems = [f"{file} ({reason})" for file, reason in sorted(reasons.items())]
    if problems:
        raise UserError(
            f"{len(problems)} label file(s) cannot be used: {shown(problems)}. Replace them, or remove their cases."
        )
    return {
        case: frozenset(name for value, name in names.items() if value in contents[file].values)
        for case, file in files.items()
    }


def _test_cases(folder: str, ending: str) -> dict[str, Case]:
    images, labels = os.path.join(folder, "imagesTs"), os.path.join(folder, "labelsTs")
    if not (os.path.isdir(images) and os.path.isdir(labels)):
        return {}
    image_names = sorted(os.listdir(images))
    cases = {}
    for name in sorted(os.listdir(labels)):
        if name.endswith(ending) and not name.startswith("."):
            case = name[: -len(ending)]
            paths = create_paths_fn(images, image_names, ending, case)
            if paths:
                cases[case] = _case(case, _by_name(paths), os.path.join(labels, name), ending)
    return cases


def _case(case: str, images: Mapping[str, str], label: str | None, ending: str) -> Case:
    found = Case(dict(images), {} if label is None else {case + ending: label})
    if ending.lower() in Tiff3DIO.supported_file_endings:
        # Where the voxel size of a TIFF file is stored: beside the first channel, without its number.
        stems = [(found.beside_images, next(iter(images.values()))[: -len(ending) - 5]),
                 (found.beside_label, (label or "")[: -len(ending)])]
        for group, stem in stems:
            if stem and os.path.isfile(stem + ".json"):
                group[case + ".json"] = stem + ".json"
    return found


def _channels(paths: Sequence[str], dataset_json: dict) -> list[int]:
    """Channel of each listed file: its place in the list, or, where the case lacks channels, the number in its name."""
    numbers = channel_numbers(paths, dataset_json["file_ending"])
    count = num_channels(dataset_json)
    if len(paths) < count and numbers is not None and max(numbers) < count:
        return numbers
    return list(range(len(paths)))


def _by_name(paths: Sequence[str]) -> dict[str, str]:
    return {os.path.basename(path): path for path in paths}


def _check_files(source: Source) -> None:
    ending = source.dataset_json["file_ending"]
    wrong = [
        path
        for case in (*source.labelled.values(), *source.unlabelled.values(), *source.test.values())
        for path in (*case.images.values(), *case.label.values())
        if not os.path.isfile(path) or not path.endswith(ending)
    ]
    if wrong:
        raise UserError(
            f"{len(wrong)} file(s) of {source.folder} do not exist, or do not end with {ending}: {shown(wrong)}."
        )
