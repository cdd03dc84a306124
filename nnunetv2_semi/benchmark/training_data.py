"""What the training cases of a data set hold, kept beside what was trained with them: results of other data differ."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_semi.benchmark.study.jobs import digest
from nnunetv2_semi.data.atomic_files import read_json_object, write_json_whole
from nnunetv2_semi.data.dataset_json import read_dataset_json
from nnunetv2_semi.data.raw_cases import list_labelled_cases, list_unlabelled_cases
from nnunetv2_semi.data.splits_file import SPLITS_FILE, read_splits, splits_path
from nnunetv2_semi.errors import UserError, shown
from nnunetv2_semi.processes.pool import default_processes

if TYPE_CHECKING:
    from nnunetv2_semi.data.file_contents import FileContent


@dataclass(frozen=True)
class TrainingData:
    """The cases that trainings on a raw data set see.

    raw: folder of the data set. preprocessed: likewise; it has the cache of what was read, and the splits. reader: name
    of nnU-Net's.
    """

    raw: Path
    preprocessed: Path
    reader: str

    def images(self) -> dict[str, list[str]]:
        """Image files of each labelled and unlabelled case."""
        raw, dataset_json = str(self.raw), read_dataset_json(str(self.raw / "dataset.json"))
        return {**list_labelled_cases(raw, dataset_json), **list_unlabelled_cases(raw, dataset_json)}

    def contents(self, files: Sequence[str], labels: bool = False) -> tuple[dict[str, FileContent], dict[str, str]]:
        """What files of the raw data set hold, and the reason by path for those that cannot be read."""
        from nnunetv2_semi.data.file_contents import file_contents

        return file_contents(files, labels=labels, cache_folder=str(self.preprocessed),
                             raw_dataset_folder=str(self.raw), reader_name=self.reader,
                             num_processes=default_processes())

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of each image and label, by its place in the raw data set, and of nnU-Net's splits where there are any."""
        from nnunetv2_semi.data.label_files import label_files

        labels = list(label_files(str(self.raw), read_dataset_json(str(self.raw / "dataset.json"))).values())
        images = [file for files in self.images().values() for file in files]
        contents = {**self.contents(images)[0], **self.contents(labels, labels=True)[0]}
        digests = {os.path.relpath(file, self.raw): digest([content.digest, content.spacing])
                   for file, content in contents.items()}
        splits = splits_path(self.preprocessed)
        if os.path.isfile(splits):
            digests[SPLITS_FILE] = digest(read_splits(splits))
        return digests

    def check_same(self, record: Path, splits_matter: bool, what: str, remedy: str) -> None:
        """Refuse other data than those of which `note` wrote ``record``; without a record nothing is known.

        Args:
            record: JSON file.
            splits_matter: Whether one of nnU-Net's folds is trained, not "all". Where there were no splits, nnU-Net has
                made them since.
            what: Was begun with these data; for the message, as what follows.
            remedy: Sentences.

        Raises:
            UserError: The data changed; with the files.
        """
        before = read_json_object(str(record))
        if before is None:
            return
        now = self.digests
        decisive = {*before, *now} - (set() if splits_matter and SPLITS_FILE in before else {SPLITS_FILE})
        changed = sorted(name for name in decisive if before.get(name) != now.get(name))
        if changed:
            raise UserError(f"{self.raw.name} has changed since {what} began with it: {shown(changed)}. {remedy}")

    def note(self, record: Path) -> None:
        """Write down what `check_same` compares."""
        write_json_whole(str(record), self.digests)
