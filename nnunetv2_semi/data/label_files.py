"""Whether label files hold what dataset.json says: nnU-Net cuts off fractions and ignores what it does not know."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_semi.data.file_contents import FileContent, file_contents
from nnunetv2_semi.data.raw_cases import list_labelled_cases
from nnunetv2_semi.errors import UserError, shown


@dataclass(frozen=True)
class Labels:
    """Labels of a data set.

    Attributes:
        files: labelled case to its label file.
        contents: of the files that can be read.
        unreadable: of the others, the reason by path.
    """

    files: Mapping[str, str]
    contents: Mapping[str, FileContent]
    unreadable: Mapping[str, str]


def label_files(raw_dataset_folder: str, dataset_json: dict) -> dict[str, str]:
    """Labelled case to its label file, which need not be there."""
    listed = dataset_json.get("dataset")
    if listed is not None:
        return {case: os.path.normpath(os.path.join(raw_dataset_folder, os.path.expandvars(entry["label"])))
                for case, entry in sorted(listed.items())}
    folder = os.path.join(raw_dataset_folder, "labelsTr")
    return {case: os.path.join(folder, case + dataset_json["file_ending"])
            for case in list_labelled_cases(raw_dataset_folder, dataset_json)}


def read_labels(
    plans_manager: PlansManager,
    dataset_json: dict,
    raw_dataset_folder: str,
    num_processes: int,
    show_progress_bar: bool,
    report: Callable[[str], None],
) -> Labels:
    """Read the label of each labelled case of the raw data set, with the cache beside its preprocessed cases."""
    files = label_files(raw_dataset_folder, dataset_json)
    contents, unreadable = file_contents(
        list(files.values()),
        labels=True,
        cache_folder=os.path.join(nnUNet_preprocessed, plans_manager.dataset_name),
        raw_dataset_folder=raw_dataset_folder,
        reader_name=plans_manager.plans["image_reader_writer"],
        num_processes=num_processes,
        show_progress_bar=show_progress_bar,
        report=report,
    )
    return Labels(files, contents, unreadable)


def label_mistake(channels: int, values: Sequence[float], dataset_json: dict) -> str | None:
    """What is wrong with a label file of so many channels with these voxel values; None if nothing is."""
    if channels != 1:
        return f"it has {channels} channels, as a colour image has, where a label has one: save it as grey values"
    broken = [value for value in values if not (math.isfinite(value) and value == int(value))]
    if broken:
        return (f"its values {_listed(broken)} are no whole numbers, and nnU-Net cuts off what comes after the point: "
                "round them, and save integers")
    known = {0, *(int(value) for entry in dataset_json["labels"].values()
                  for value in (entry if isinstance(entry, (list, tuple)) else [entry]))}
    unknown = [value for value in values if value not in known]
    if unknown:
        return f"its values {_listed(unknown)} are not among the labels of dataset.json ({_listed(sorted(known), 50)})"
    return None


def check_label_files(labels: Labels, dataset_json: dict) -> None:
    """Refuse labels that nnU-Net would train on as something else.

    Raises:
        UserError: names all files and their values.
    """
    mistakes = [f"{file} ({reason})" for file, reason in labels.unreadable.items()]
    for file in labels.files.values():
        if file in labels.contents:
            content = labels.contents[file]
            mistake = label_mistake(content.shape[0], content.values, dataset_json)
            mistakes += [f"{file} ({mistake})"] if mistake else []
    if mistakes:
        raise UserError(
            f"{len(mistakes)} label file(s) are no labels of this data set: {shown(mistakes)}. Correct these files, or "
            f'"labels" in dataset.json (and plan again), or remove the cases; then preprocess the data set again.'
        )


def _listed(values: Iterable[float], at_most: int = 5) -> str:
    return shown((f"{value:.6g}" for value in values), at_most)
