"""All checks of a raw data set that need no image to be read: the same for planners, preprocessor and trainers."""

from __future__ import annotations

import os
from collections.abc import Iterable

from nnunetv2_semi.data.case_names import case_name_mistakes, check_case_names_can_be_told_apart
from nnunetv2_semi.data.raw_cases import (
    LABELLED_FOLDER,
    UNLABELLED_FOLDER,
    check_labelled_images_have_labels,
    check_names_are_unlabelled,
    labelled_file_mistakes,
    list_labelled_cases,
    list_unlabelled_cases,
)
from nnunetv2_semi.data.splits_file import read_splits, splits_path
from nnunetv2_semi.errors import UserError, shown


def check_case_names(
    raw_dataset_folder: str, preprocessed_dataset_folder: str, dataset_json: dict
) -> dict[str, list[str]]:
    """Check which files lie where, and how they are named. Returns the unlabelled cases (may be none).

    Args:
        raw_dataset_folder: holds `imagesTr/` and `imagesUn/`.
        preprocessed_dataset_folder: may be absent.
        dataset_json: content of dataset.json, checked.

    Raises:
        UserError: images in imagesTr without a label, or which nnU-Net takes for images and that are none; wrongly
            named unlabelled cases; case names that collide with other files; unlabelled cases that are labelled as well
            (in imagesTr, or named in splits_final.json); a splits_final.json that cannot be used.
    """
    labelled = check_labelled_case_names(raw_dataset_folder, preprocessed_dataset_folder, dataset_json)
    unlabelled = list_unlabelled_cases(raw_dataset_folder, dataset_json)
    check_names_are_unlabelled(unlabelled, labelled, LABELLED_FOLDER)
    _check_names(unlabelled, preprocessed_dataset_folder, dataset_json, UNLABELLED_FOLDER)
    check_not_in_splits(unlabelled, preprocessed_dataset_folder)
    return unlabelled


def check_labelled_case_names(
    raw_dataset_folder: str, preprocessed_dataset_folder: str, dataset_json: dict
) -> dict[str, list[str]]:
    """The part of `check_case_names` that concerns labelled cases, which it returns."""
    mistakes = labelled_file_mistakes(raw_dataset_folder, dataset_json)
    if mistakes:
        raise UserError(" ".join(mistakes))
    check_labelled_images_have_labels(raw_dataset_folder, dataset_json)
    labelled = list_labelled_cases(raw_dataset_folder, dataset_json)
    _check_names(labelled, preprocessed_dataset_folder, dataset_json, LABELLED_FOLDER)
    return labelled


def _check_names(cases: Iterable[str], preprocessed_dataset_folder: str, dataset_json: dict, where: str) -> None:
    names = list(cases)
    mistakes = case_name_mistakes(names, dataset_json["file_ending"], where)
    if mistakes:
        raise UserError(" ".join(mistakes))
    check_case_names_can_be_told_apart(names, preprocessed_dataset_folder, where)


def check_not_in_splits(unlabelled: Iterable[str], preprocessed_dataset_folder: str) -> None:
    """Refuse unlabelled cases that splits_final.json, if there is one, names as labelled.

    Raises:
        UserError: names them all; or the file cannot be used.
    """
    path = splits_path(preprocessed_dataset_folder)
    if os.path.isfile(path):
        named = {case for split in read_splits(path) for cases in split.values() for case in cases}
        shared = sorted(named & set(unlabelled))
        if shared:
            raise UserError(
                f"{path} names {len(shared)} case(s) that are in {UNLABELLED_FOLDER}: {shown(shared)}. If their labels "
                f"were taken away, remove them there, or the file, of which nnU-Net then makes a new one (models "
                f"trained before have other folds). If they are labelled, remove them from {UNLABELLED_FOLDER}."
            )
