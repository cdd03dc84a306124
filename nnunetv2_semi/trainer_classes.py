"""Trainer classes by name: as nnU-Net finds them, and which are this package's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.installation import CLASS_FOLDERS, class_folder_source

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunetv2_semi.methods.base import Method


def trainer_class(name: str) -> type[nnUNetTrainer]:
    """The trainer that nnU-Net finds under this name. Raises UserError where it finds none."""
    # Imported late: nnU-Net's search imports all of its trainers.
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        cls = recursive_find_trainer_class_by_name(name)
    except RuntimeError:
        cls = None
    if cls is None:
        raise UserError(f"nnU-Net finds no trainer {name}. nnunetv2_semi doctor says whether ours are visible.")
    return cls


def method_class(trainer: str) -> type[Method] | None:
    """The method of the trainer of this name; None where it has none. Raises UserError as `trainer_class` does."""
    return getattr(trainer_class(trainer), "method_class", None)


def trainer_names() -> tuple[str, ...]:
    """Our trainers: one file each, named as the class. Raises UserError where their folder is not found."""
    return tuple(sorted(file.stem for file in class_folder_source(CLASS_FOLDERS[0]).glob("nnUNetTrainer*.py")))
