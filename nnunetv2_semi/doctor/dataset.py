"""Checks of one raw data set: what dataset.json says, which files lie where, and what is in them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.utils import create_paths_fn, get_identifiers_from_splitted_dataset_folder

from nnunetv2_semi.data.atomic_files import read_json_object
from nnunetv2_semi.data.dataset_settings import named_channels, num_channels, read_dataset_settings
from nnunetv2_semi.data.raw_cases import (
    LABELLED_FOLDER,
    UNLABELLED_FOLDER,
    channel_numbers,
    check_names_are_unlabelled,
    labelled_images_without_label,
    list_labelled_cases,
    list_unlabelled_cases,
    naming_rule,
)
from nnunetv2_semi.doctor.checks import Check, listed, ok, problem, warning
from nnunetv2_semi.doctor.images import check_images
from nnunetv2_semi.errors import UserError

TEST_FOLDER = "imagesTs"
REQUIRED_KEYS = ("channel_names", "labels", "numTraining", "file_ending")
FOLDS = 5


@dataclass(frozen=True)
class RawCases:
    """Cases of a data set: name to image files, in channel order; and the label file of each labelled case."""

    labelled: dict[str, list[str]]
    unlabelled: dict[str, list[str]]
    test: dict[str, list[str]]
    labels: dict[str, str]


def check_dataset(dataset_name_or_id: str) -> Iterator[Check]:
    """Checks of the data set with that number or name in nnUNet_raw."""
    try:
        folder = _raw_folder(dataset_name_or_id)
    except UserError as error:
        yield problem(f"data set {dataset_name_or_id} not found: {error}", "check the number and nnUNet_raw")
        return
    path = os.path.join(folder, "dataset.json")
    dataset_json = read_json_object(path)
    if dataset_json is None:
        yield problem(f"{path} is absent or not valid JSON", "write it as nnU-Net's dataset format says")
        return
    absent = [key for key in REQUIRED_KEYS if key not in dataset_json and not _has_old_name(key, dataset_json)]
    if absent:
        yield problem(f"{path} lacks {listed(absent)}", "add what nnU-Net's dataset format asks for")
        return
    yield ok(f"data set {os.path.basename(folder)} in {os.path.dirname(folder)}")
    yield _check_settings(dataset_json, path)
    layout_checks, cases = _check_layout(folder, dataset_json)
    yield from layout_checks
    yield from check_images(cases.labelled, cases.unlabelled, cases.test, cases.labels, dataset_json)


def _raw_folder(dataset_name_or_id: str) -> str:
    raw = os.environ.get("nnUNet_raw")
    if not raw:
        raise UserError("nnUNet_raw is not set")
    try:
        name = str(maybe_convert_to_dataset_name(dataset_name_or_id))
    except (RuntimeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    folder = os.path.join(raw, name)
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}")
    return folder


def _has_old_name(key: str, dataset_json: Mapping[str, object]) -> bool:
    return key == "channel_names" and "modality" in dataset_json


def _check_settings(dataset_json: dict, path: str) -> Check:
    try:
        modalities = read_dataset_settings(dataset_json, path).modalities
        channels = num_channels(dataset_json)
    except UserError as error:
        return problem(str(error))
    if modalities is not None:
        named = listed(f"{name} (channels {listed(indices)})" for name, indices in modalities.items())
        return ok(f"modalities: {named}")
    return ok(f"modalities: {channels}, each channel is one: {listed(named_channels(dataset_json).values())}")


def _check_layout(folder: str, dataset_json: dict) -> tuple[list[Check], RawCases]:
    """Checks that need file names alone, and the cases found."""
    checks: list[Check] = []
    labelled = _listed_labelled(folder, dataset_json)
    test = _cases_as_nnunet_lists_them(os.path.join(folder, TEST_FOLDER), dataset_json)
    try:
        unlabelled = list_unlabelled_cases(folder, dataset_json)
    except UserError as error:
        checks.append(problem(str(error)))
        unlabelled = _without_surplus(
            _cases_as_nnunet_lists_them(os.path.join(folder, UNLABELLED_FOLDER), dataset_json), dataset_json
        )
    without_label = labelled_images_without_label(folder, dataset_json) if labelled else []
    with_label = [case for case in labelled if case not in without_label]
    checks += _check_labelled(folder, dataset_json, with_label, without_label)
    checks += _check_unlabelled(folder, dataset_json, labelled, unlabelled)
    checks.append(ok(f"{len(test)} test cases in {TEST_FOLDER}"))
    labels = {case: _label_file(folder, dataset_json, case) for case in with_label}
    return checks, RawCases(labelled, unlabelled, test, labels)


def _listed_labelled(folder: str, dataset_json: dict) -> dict[str, list[str]]:
    if "dataset" not in dataset_json and not os.path.isdir(os.path.join(folder, LABELLED_FOLDER)):
        return {}
    return list_labelled_cases(folder, dataset_json)


def _cases_as_nnunet_lists_them(folder: str, dataset_json: dict) -> dict[str, list[str]]:
    if not os.path.isdir(folder):
        return {}
    ending = dataset_json["file_ending"]
    files = sorted(name for name in os.listdir(folder) if name.endswith(ending) and not name.startswith("."))
    names = [str(name) for name in get_identifiers_from_splitted_dataset_folder(folder, ending)]
    cases = {name: list(create_paths_fn(folder, files, ending, name)) for name in names}
    return {name: paths for name, paths in cases.items() if paths}


def _without_surplus(cases: dict[str, list[str]], dataset_json: dict) -> dict[str, list[str]]:
    """Only the files whose channel the data set has: the others have been reported."""
    ending, count = dataset_json["file_ending"], num_channels(dataset_json)
    numbers = {case: channel_numbers(files, ending) or [] for case, files in cases.items()}
    known = {
        case: [file for file, number in zip(files, numbers[case], strict=False) if number < count]
        for case, files in cases.items()
    }
    return {case: files for case, files in known.items() if files}


def _label_file(folder: str, dataset_json: dict, case: str) -> str:
    if "dataset" in dataset_json:
        return os.path.join(folder, os.path.expandvars(dataset_json["dataset"][case]["label"]))
    return os.path.join(folder, "labelsTr", case + dataset_json["file_ending"])


def _check_labelled(
    folder: str, dataset_json: dict, with_label: Sequence[str], without_label: Sequence[str]
) -> Iterator[Check]:
    images, labels = os.path.join(folder, LABELLED_FOLDER), os.path.join(folder, "labelsTr")
    if not with_label:
        yield problem(f"no labelled case in {images}", f"put images there and their labels into {labels}")
    elif len(with_label) < FOLDS:
        count = len(with_label)
        folds = f"our trainers make folds 0 to {count - 1}" if count > 1 else "one case makes no fold"
        yield warning(
            f"{count} labelled case(s): too few for nnU-Net's {FOLDS}-fold cross-validation ({folds})",
            "train the fold `all`" + (", or one of these" if count > 1 else ""),
        )
    else:
        yield ok(f"{len(with_label)} labelled cases")
    if without_label:
        yield problem(
            f"{len(without_label)} cases in {images} have no label: {listed(without_label)}",
            f"move their images to {os.path.join(folder, UNLABELLED_FOLDER)}",
        )
    if "dataset" not in dataset_json:
        ending = dataset_json["file_ending"]
        present = os.listdir(labels) if os.path.isdir(labels) else []
        label_names = {name[: -len(ending)] for name in present if name.endswith(ending) and not name.startswith(".")}
        orphans = sorted(label_names - set(with_label))
        if orphans:
            yield warning(
                f"{len(orphans)} labels in {labels} have no image: {listed(orphans)}",
                f"add their images to {images}, or remove the labels",
            )
    if dataset_json["numTraining"] != len(with_label):
        yield warning(
            f"numTraining in dataset.json is {dataset_json['numTraining']}, but {len(with_label)} cases have labels: "
            "nnU-Net's --verify_dataset_integrity fails",
            f'set "numTraining": {len(with_label)}',
        )


def _check_unlabelled(
    folder: str, dataset_json: dict, labelled: Mapping[str, list[str]], unlabelled: Mapping[str, list[str]]
) -> Iterator[Check]:
    where = os.path.join(folder, UNLABELLED_FOLDER)
    if not unlabelled:
        yield problem(
            f"no unlabelled case in {where}: the semi-supervised trainers need some",
            f"put images without labels there, named {naming_rule(dataset_json)}; nnUNetTrainerSemiSupervised and "
            "nnU-Net's own trainers run without",
        )
        return
    yield ok(f"{len(unlabelled)} unlabelled cases in {UNLABELLED_FOLDER}")
    try:
        check_names_are_unlabelled(unlabelled, labelled, LABELLED_FOLDER)
    except UserError as error:
        yield problem(str(error))
