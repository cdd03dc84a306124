"""splits_final.json: which labelled cases each fold trains on, and which it validates on."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence

from nnunetv2_semi.errors import UserError, shown

SPLITS_FILE = "splits_final.json"
NNUNET_FOLDS = 5
PARTS = ("train", "val")
_FORM = '[{"train": ["case_1", "case_2"], "val": ["case_3"]}, ...], one object for each fold'
_REMEDY = ("Correct the file; or remove it: a new one is made at the next training, and folds that are trained already "
           "then have other validation cases")


def splits_path(preprocessed_dataset_folder: str | os.PathLike[str]) -> str:
    """Where nnU-Net keeps a data set's folds: in its folder of preprocessed data."""
    return os.path.join(preprocessed_dataset_folder, SPLITS_FILE)


def folds_of_new_split(labelled: int) -> int:
    """How many folds a new split of so many labelled cases has: nnU-Net's five, or one for each case; none of one."""
    return min(labelled, NNUNET_FOLDS) if labelled > 1 else 0


def read_splits(path: str) -> list[dict[str, list[str]]]:
    """The folds in a splits_final.json, each with "train" and "val".

    Raises:
        UserError: the file has another form.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}). It should be {_FORM}. {_REMEDY}.") from error
    if not isinstance(content, list) or not content:
        raise UserError(f"{path} holds no list of folds. It should be {_FORM}. {_REMEDY}.")
    wrong = [f"fold {fold} has no list of case names under {part!r}" for fold, split in enumerate(content)
             for part in PARTS if not _is_list_of_names(split, part)]
    if wrong:
        raise UserError(f"{path} has another form than nnU-Net's: {'; '.join(wrong)}. It should be {_FORM}. {_REMEDY}.")
    return [{part: list(split[part]) for part in PARTS} for split in content]


def check_splits(splits: Mapping[int, Mapping[str, Sequence[str]]], cases: Collection[str], path: str,
                 where: str) -> None:
    """Refuse folds that cannot be trained or validated.

    Args:
        splits: number of each fold to check, and what `read_splits` gives of it.
        cases: names of the labelled cases that there are.
        path: of the file, for messages.
        where: those cases are, for messages.

    Raises:
        UserError: names all empty lists, all cases that do not exist, and all that are on both sides.
    """
    mistakes = []
    for fold, split in splits.items():
        empty = [part for part in PARTS if not split[part]]
        missing = sorted({case for part in PARTS for case in split[part]} - set(cases))
        shared = sorted(set(split["train"]) & set(split["val"]))
        mistakes += [f"fold {fold} has no case under {part!r}" for part in empty]
        mistakes += [f"fold {fold} names cases that are not in {where}: {shown(missing)}"] if missing else []
        mistakes += [f"fold {fold} has cases in both 'train' and 'val': {shown(shared)}"] if shared else []
    if mistakes:
        raise UserError(f"{path} cannot be used: {'; '.join(mistakes)}. {_REMEDY}.")


def cases_left_out(split: Mapping[str, Sequence[str]], cases: Collection[str]) -> list[str]:
    """Those of ``cases`` that a fold neither trains nor validates: the file may be older than they are."""
    return sorted(set(cases) - {case for part in PARTS for case in split[part]})


def _is_list_of_names(split: object, part: str) -> bool:
    return isinstance(split, dict) and isinstance(split.get(part), list) and all(
        isinstance(name, str) for name in split[part])
