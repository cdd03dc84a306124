"""Checks of one raw data set: what dataset.json says, which files lie where, and what is in them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunetv2_semi.data.atomic_files import read_json_object
from nnunetv2_semi.data.case_names import (
    case_name_mistakes,
    check_case_names_can_be_told_apart,
    names_that_differ_in_case_only,
)
from nnunetv2_semi.data.dataset_json import dataset_json_mistakes
from nnunetv2_semi.data.dataset_settings import named_channels, num_channels, read_dataset_settings
from nnunetv2_semi.data.raw_cases import (
    LABELLED_FOLDER,
    RESOURCE_FORK,
    UNLABELLED_FOLDER,
    channel_numbers,
    check_names_are_unlabelled,
    labelled_file_mistakes,
    labelled_images_without_label,
    list_labelled_cases,
    list_test_cases,
    list_unlabelled_cases,
    naming_rule,
    resource_forks,
)
from nnunetv2_semi.data.splits_file import NNUNET_FOLDS, cases_left_out, check_splits, read_splits, splits_path
from nnunetv2_semi.doctor.checks import Check, ok, problem, warning
from nnunetv2_semi.doctor.images import check_images
from nnunetv2_semi.doctor.preprocessed import plans_of
from nnunetv2_semi.errors import UserError, shown

TEST_FOLDER = "imagesTs"


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
    mistakes = dataset_json_mistakes(dataset_json)
    for mistake in mistakes:
        yield problem(f"{path}: {mistake}")
    if mistakes:
        return  # which files are images, channels and labels is told by dataset.json alone
    yield ok(f"data set {os.path.basename(folder)} in {os.path.dirname(folder)}")
    yield _check_settings(dataset_json, path)
    layout_checks, cases = _check_layout(folder, dataset_json)
    yield from layout_checks
    plans = plans_of(os.path.basename(folder))
    yield from check_images(cases.labelled, cases.unlabelled, cases.test, cases.labels, folder, dataset_json, plans)


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


def _check_settings(dataset_json: dict, path: str) -> Check:
    try:
        modalities = read_dataset_settings(dataset_json, path).modalities
        channels = num_channels(dataset_json)
    except UserError as error:
        return problem(str(error))
    if modalities is not None:
        named = shown(f"{name} (channels {shown(indices)})" for name, indices in modalities.items())
        return ok(f"modalities: {named}")
    return ok(f"modalities: {channels}, each channel is one: {shown(named_channels(dataset_json).values())}")


def _check_layout(folder: str, dataset_json: dict) -> tuple[list[Check], RawCases]:
    """Checks that need file names alone, and the cases found."""
    checks: list[Check] = []
    checks += [problem(mistake) for mistake in labelled_file_mistakes(folder, dataset_json)]
    labelled = {case: [file for file in files if os.path.isfile(file)]
                for case, files in list_labelled_cases(folder, dataset_json).items()}
    labelled = {case: files for case, files in labelled.items() if files}  # the others have just been named
    test = list_test_cases(os.path.join(folder, TEST_FOLDER), dataset_json)
    try:
        unlabelled = list_unlabelled_cases(folder, dataset_json)
    except UserError as error:
        checks.append(problem(str(error)))
        unlabelled = _without_surplus(
            list_test_cases(os.path.join(folder, UNLABELLED_FOLDER), dataset_json), dataset_json
        )
    for cases, where in ((labelled, LABELLED_FOLDER), (unlabelled, UNLABELLED_FOLDER)):
        checks += _check_names(cases, where, os.path.basename(folder), dataset_json)
    without_label = [case for case in labelled_images_without_label(folder, dataset_json) if case in labelled]
    with_label = [case for case in labelled if case not in without_label]
    checks += _check_labelled(folder, dataset_json, with_label, without_label)
    checks += _check_unlabelled(folder, dataset_json, labelled, unlabelled)
    checks += _check_splits(os.path.basename(folder), with_label)
    checks.append(ok(f"{len(test)} test cases in {TEST_FOLDER}"))
    if forks := resource_forks(os.path.join(folder, TEST_FOLDER), dataset_json["file_ending"]):
        checks.append(warning(
            f"{len(forks)} file(s) in {TEST_FOLDER} are no images, but nnU-Net reads them as cases: {shown(forks)}",
            f"remove all files whose names begin with {RESOURCE_FORK}, which macOS writes beside copied ones",
        ))
    labels = {case: _label_file(folder, dataset_json, case) for case in with_label}
    return checks, RawCases(labelled, unlabelled, test, labels)


def _check_names(cases: Iterable[str], where: str, dataset_name: str, dataset_json: dict) -> Iterator[Check]:
    names = list(cases)
    for mistake in case_name_mistakes(names, dataset_json["file_ending"], where):
        yield problem(mistake)
    preprocessed = os.path.join(os.environ.get("nnUNet_preprocessed", ""), dataset_name)
    try:
        check_case_names_can_be_told_apart(names, preprocessed, where)
    except UserError as error:
        yield problem(str(error))
        return
    if same := names_that_differ_in_case_only(names):
        yield warning(
            f"{len(same)} case name(s) in {where} differ only in upper and lower case: {shown(same)}",
            "rename all but one of each: on most computers with Windows or macOS they are the same file",
        )


def _check_splits(dataset_name: str, labelled: Sequence[str]) -> Iterator[Check]:
    """Of the folds that nnU-Net would take from splits_final.json; a fold without any case is not meant for use."""
    path = splits_path(os.path.join(os.environ.get("nnUNet_preprocessed", ""), dataset_name))
    if not os.path.isfile(path):
        return
    try:
        folds = {fold: split for fold, split in enumerate(read_splits(path)) if any(split.values())}
        check_splits(folds, labelled, path, LABELLED_FOLDER)
    except UserError as error:
        yield problem(str(error))
        return
    left_out = [f"fold {fold} {shown(cases)}" for fold, split in folds.items()
                if (cases := cases_left_out(split, labelled))]
    if left_out:
        yield warning(f"{path} leaves out labelled cases, which are neither trained nor validated: "
                      f"{'; '.join(left_out)}", "add them there, or remove the file, if that is not meant")
    else:
        yield ok(f"{path} names cases that are there, in {len(folds)} folds")


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
    elif len(with_label) < NNUNET_FOLDS:
        count = len(with_label)
        folds = f"our trainers make folds 0 to {count - 1}" if count > 1 else "one case makes no fold"
        yield warning(
            f"{count} labelled case(s): too few for nnU-Net's {NNUNET_FOLDS}-fold cross-validation ({folds})",
            "train the fold `all`" + (", or one of these" if count > 1 else ""),
        )
    else:
        yield ok(f"{len(with_label)} labelled cases")
    if without_label:
        yield problem(
            f"{len(without_label)} cases in {images} have no label: {shown(without_label)}",
            f"move their images to {os.path.join(folder, UNLABELLED_FOLDER)}",
        )
    if "dataset" not in dataset_json:
        ending = dataset_json["file_ending"]
        present = os.listdir(labels) if os.path.isdir(labels) else []
        label_names = {name[: -len(ending)] for name in present if name.endswith(ending) and not name.startswith(".")}
        orphans = sorted(label_names - set(with_label))
        if orphans:
            yield warning(
                f"{len(orphans)} labels in {labels} have no image: {shown(orphans)}",
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
