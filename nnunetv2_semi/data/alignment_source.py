"""The cases of a raw data set whose modalities are to be aligned."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from nnunetv2_semi.data.case_channels import channels_of_case
from nnunetv2_semi.data.label_files import label_files
from nnunetv2_semi.data.raw_cases import case_and_channel, list_labelled_cases, list_unlabelled_cases

SPLITS = ("Tr", "Un", "Ts")


@dataclass(frozen=True)
class SourceCase:
    """Files of one case.

    Attributes:
        split: Tr, Un or Ts, of the folders imagesTr and so on.
        name: of the case.
        images: channel to file.
        label: file; None where it has none.
    """

    split: str
    name: str
    images: Mapping[int, str]
    label: str | None

    @property
    def files(self) -> list[str]:
        return [*self.images.values(), *([self.label] if self.label else [])]


def source_cases(folder: str, dataset_json: dict) -> list[SourceCase]:
    """All cases of a raw data set, in the order of `SPLITS`, then of names.

    Raises:
        UserError: which channels a case has is not told by its files.
    """
    ending = dataset_json["file_ending"]
    listed = {"Tr": list_labelled_cases(folder, dataset_json), "Un": list_unlabelled_cases(folder, dataset_json),
              "Ts": _test_cases(os.path.join(folder, "imagesTs"), ending)}
    labels = label_files(folder, dataset_json)
    cases = []
    for split, by_name in listed.items():
        for name, files in by_name.items():
            label = labels[name] if split == "Tr" else os.path.join(folder, f"labels{split}", name + ending)
            images = dict(zip(channels_of_case(files, len(files), dataset_json), files, strict=True))
            cases.append(SourceCase(split, name, images, label if os.path.isfile(label) else None))
    return cases


def _test_cases(folder: str, ending: str) -> dict[str, list[str]]:
    cases: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        found = None if name.startswith(".") else case_and_channel(name, ending)
        if found is not None:
            cases.setdefault(found[0], []).append(os.path.join(folder, name))
    return cases
