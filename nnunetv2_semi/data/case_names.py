"""Names of cases that collide with files which nnU-Net, or another case, writes."""

from __future__ import annotations

import os
import tempfile
import unicodedata
from collections.abc import Iterable

from nnunetv2_semi.errors import UserError, shown

# nnU-Net keeps the segmentation of CASE in CASE_seg.b2nd (or CASE_seg.npy) beside the image of CASE_seg, and takes
# every file with this ending for a segmentation.
_SEGMENTATION_SUFFIX = "_seg"
# Beside predictions nnU-Net writes these .json files, and for TIFF images CASE.json with the voxel size.
_FILES_BESIDE_PREDICTIONS = ("dataset", "plans", "predict_from_raw_data_args", "summary")
_TIFF = (".tif", ".tiff")


def case_name_mistakes(cases: Iterable[str], file_ending: str, where: str) -> list[str]:
    """What is wrong with the names of cases whose files lie in one folder, with the remedy.

    Args:
        cases: their names.
        file_ending: of dataset.json.
        where: the folder named in messages.
    """
    names = sorted(cases)
    mistakes = []
    if segmentations := [name for name in names if name.endswith(_SEGMENTATION_SUFFIX)]:
        mistakes.append(
            f"{len(segmentations)} case name(s) in {where} end with {_SEGMENTATION_SUFFIX}: {shown(segmentations)}. "
            f"nnU-Net takes a preprocessed file of that name for the segmentation of another case, and would leave "
            f"these cases out: rename them."
        )
    if file_ending.lower() in _TIFF and (taken := [name for name in names if name in _FILES_BESIDE_PREDICTIONS]):
        mistakes.append(
            f"{len(taken)} case name(s) in {where} are those of files that nnU-Net writes beside predictions: "
            f"{', '.join(f'{name} ({name}.json)' for name in taken)}. Rename these cases."
        )
    return mistakes


def names_that_differ_in_case_only(cases: Iterable[str]) -> list[str]:
    """Such as ["a = A"]: cases that are one file on a file system that does not tell upper and lower case apart."""
    by_folded: dict[str, list[str]] = {}
    for name in sorted(cases):
        by_folded.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    return [" = ".join(names) for names in by_folded.values() if len(names) > 1]


def check_case_names_can_be_told_apart(cases: Iterable[str], preprocessed_folder: str, where: str) -> None:
    """Refuse names that differ in case only where preprocessed data lies on a file system that folds case.

    Args:
        cases: whose preprocessed files lie in one folder.
        preprocessed_folder: in which that folder lies, or will lie.
        where: the raw folder named in messages.

    Raises:
        UserError: names them all.
    """
    same = names_that_differ_in_case_only(cases)
    if same and folds_case(preprocessed_folder):
        raise UserError(
            f"{len(same)} case name(s) in {where} differ only in upper and lower case: {shown(same)}. In "
            f"{preprocessed_folder} they would be the same file: rename all but one of each."
        )


def folds_case(folder: str) -> bool:
    """Whether names that differ in case only are one file there; False where nothing can be written to find out."""
    while not os.path.isdir(folder):
        parent = os.path.dirname(folder)
        if parent == folder:
            return False
        folder = parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".case_") as file:
            return os.path.exists(os.path.join(folder, os.path.basename(file.name).swapcase()))
    except OSError:
        return False
