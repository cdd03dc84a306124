"""The data set of a self-training round: the labelled cases, and some unlabelled ones with predicted labels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id

from nnunetv2_semi import __version__
from nnunetv2_semi.benchmark.datasets.raw_datasets import (
    LARGEST_ID,
    NewDataset,
    adapted_dataset_json,
    free_ids,
    write_datasets,
)
from nnunetv2_semi.benchmark.datasets.source_cases import Source
from nnunetv2_semi.benchmark.self_training.input import OPTION_DEFAULTS
from nnunetv2_semi.data.atomic_files import read_json_object
from nnunetv2_semi.data.raw_cases import UNLABELLED_FOLDER
from nnunetv2_semi.errors import UserError

RECORD = "selftrain.json"
LOCK = ".nnunetv2_semi_selftrain.lock"


def pseudo_labelled_dataset(
    source: Source, round_number: int, made_by: Mapping[str, object], teachers: Sequence[Path],
    predictions: Path, scores: Mapping[str, float | None], kept: Sequence[str],
) -> str:
    """Name of the round's data set in nnUNet_raw; written unless one that was ``made_by`` the same is there.

    One that is there must be of the same cases and stabilities: other ones are of another teacher, or other data.

    Args:
        source: The original data set; its dataset.json is the new one's too.
        round_number: From 1; a part of the name.
        made_by: What tells this round of this self-training from all others; for the record, as what follows.
        teachers: Fold folders of the models that predicted.
        predictions: Folder with the label maps that kept cases get.
        scores: Stability per unlabelled case.
        kept: Cases that become labelled.

    Raises:
        UserError: No id is free, nnUNet_raw cannot be written to, or the data set that is there is of other cases or
            stabilities.
    """
    raw = Path(source.folder).parent
    # Held until the new folder is there, so that two at a time do not find the same id free.
    with FileLock(raw / LOCK):
        found = [file.parent.name for file in sorted(raw.glob(f"Dataset*/{RECORD}"))
                 if {**OPTION_DEFAULTS, **(read_json_object(str(file)) or {}).get("made_by", {})}
                 == {**OPTION_DEFAULTS, **made_by}]  # fmt: skip
        content = {"labelled": sorted(source.labelled), "pseudo_labelled": sorted(kept),
                   "unlabelled": sorted(set(source.unlabelled) - set(kept)), "stability": dict(scores)}
        if found:
            there = read_json_object(str(raw / found[0] / RECORD)) or {}
            if any(there.get(key) != value for key, value in content.items()):
                raise UserError(f"{raw / found[0]} has the pseudo-labels of other predictions, or of other cases. "
                                "Remove it, and the folders of that name in nnUNet_preprocessed and nnUNet_results.")
            return found[0]
        own = convert_dataset_name_to_id(source.name)
        ids = free_ids(own, 1)
        if not ids:
            raise UserError(f"There is no free id from {own + 1} to {LARGEST_ID} for the pseudo-labelled data set.")
        name = f"Dataset{ids[0]:03d}_{source.name.split('_', 1)[-1]}_selftrain{round_number}"
        links, copies = _files(source, predictions, kept)
        record = {
            "version": __version__, "made_by": made_by, "teachers": list(map(str, teachers)), **content,
            "links": links, "copies": copies,
        }  # fmt: skip
        dataset_json = adapted_dataset_json(source.dataset_json, len(source.labelled) + len(kept))
        write_datasets(str(raw), [NewDataset(name, dataset_json, RECORD, record, links, copies)])
    return name


def _files(source: Source, predictions: Path, kept: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """What is linked and what is copied: path in the new data set to original."""
    links: dict[str, str] = {}
    for case in source.labelled.values():
        links |= case.files("imagesTr", "labelsTr")
    for name, case in source.unlabelled.items():
        links |= case.files("imagesTr" if name in kept else UNLABELLED_FOLDER)
    for folder in ("imagesTs", "labelsTs"):
        where = os.path.join(source.folder, folder)
        names = sorted(os.listdir(where)) if os.path.isdir(where) else []
        links |= {f"{folder}/{name}": os.path.join(where, name) for name in names if not name.startswith(".")}
    # The voxel size of a TIFF file is stored in a JSON file beside it.
    labels = [predictions / f"{case}{ending}" for case in sorted(kept)
              for ending in (source.dataset_json["file_ending"], ".json")]  # fmt: skip
    return ({link: os.path.realpath(original) for link, original in links.items()},
            {f"labelsTr/{file.name}": str(file) for file in labels if file.is_file()})  # fmt: skip
