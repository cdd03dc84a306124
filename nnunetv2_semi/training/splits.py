"""The fold's split: whether it can be trained, and splits of fewer labelled cases than nnU-Net has folds."""

from __future__ import annotations

import os

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semi import compat
from nnunetv2_semi.data.atomic_files import write_json_whole
from nnunetv2_semi.data.splits_file import (
    NNUNET_FOLDS,
    cases_left_out,
    check_splits,
    folds_of_new_split,
    read_splits,
    splits_path,
)
from nnunetv2_semi.errors import UserError, shown
from nnunetv2_semi.training import batches


def prepare_split(trainer: nnUNetTrainer) -> None:
    """Check the fold's part of splits_final.json, see `check_splits`, or write the file, whole, where there is none.

    Raises:
        UserError: see `check_splits`; a fold that few cases do not make; labelled cases of which a split cannot be made
            yet, see `batches.check_labelled`.
    """
    if trainer.fold == "all":
        return
    path = splits_path(trainer.preprocessed_dataset_folder_base)
    if not os.path.isfile(path):
        # Its folds are made of whatever is preprocessed: what a killed preprocessing left would be trained on for good.
        batches.check_labelled(trainer)
        _write_split(trainer, path)
        return
    splits, folder = read_splits(path), trainer.preprocessed_dataset_folder
    if trainer.fold < len(splits):
        cases = infer_dataset_class(folder).get_identifiers(folder)
        check_splits({trainer.fold: splits[trainer.fold]}, cases, path, folder)


def name_cases_left_out(trainer: nnUNetTrainer) -> None:
    """Log the labelled cases that splits_final.json leaves out of the fold."""
    path, folder = splits_path(trainer.preprocessed_dataset_folder_base), trainer.preprocessed_dataset_folder
    splits = read_splits(path) if trainer.fold != "all" and os.path.isfile(path) else []
    if trainer.fold in range(len(splits)):
        left_out = cases_left_out(splits[trainer.fold], infer_dataset_class(folder).get_identifiers(folder))
        if left_out:
            trainer.print_to_log_file(
                f"WARNING: fold {trainer.fold} of {path} neither trains nor validates {len(left_out)} labelled "
                f"case(s): {shown(left_out)}. If that is not meant, add them there, or remove the file.")


def write_new_split(path: str, cases: list[str]) -> None:
    """Write nnU-Net's own split of two or more cases, into `folds_of_new_split` folds.

    nnU-Net itself writes its five in each process, in place, where another may read half of them.
    """
    write_json_whole(path, compat.crossval_split(cases, folds_of_new_split(len(cases))))


def _write_split(trainer: nnUNetTrainer, path: str) -> None:
    """nnU-Net's five folds; of fewer than five labelled cases, as many as there are cases."""
    folder = trainer.preprocessed_dataset_folder
    cases = infer_dataset_class(folder).get_identifiers(folder)
    if len(cases) < NNUNET_FOLDS:
        if trainer.fold >= (folds := folds_of_new_split(len(cases))):
            raise UserError(f"{len(cases)} labelled cases make {folds} fold(s), so there is no fold {trainer.fold}. "
                            f"Train with fold 'all', or write your own splits to {path}.")
        trainer.print_to_log_file(f"Only {len(cases)} labelled cases: writing a split with {len(cases)} folds to "
                                  f"{path}.")
    write_new_split(path, cases)
