"""New raw data sets, made of links to the files of another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

from nnunetv2_semi.data.atomic_files import whole_folder, write_json_whole
from nnunetv2_semi.errors import UserError

LARGEST_ID = 999
# In nnU-Net's and in older forms of dataset.json, lists of files and their numbers: the source's.
FILE_LISTS = ("dataset", "training", "test", "numTest")


@dataclass(frozen=True)
class NewDataset:
    """A new data set: its name and what it holds.

    Attributes:
        name: such as Dataset511_Mine_labeled5pct.
        dataset_json: content of dataset.json.
        record_name, record: name and content of the JSON file that says what was made from what.
        links: path in the data set to path of the original.
        copies: the same, of files that are copied.
    """

    name: str
    dataset_json: dict
    record_name: str
    record: dict
    links: Mapping[str, str]
    copies: Mapping[str, str] = field(default_factory=dict)


def free_ids(after: int, count: int) -> list[int]:
    """The next ids that no folder of nnU-Net has, fewer than `count` where there are not so many."""
    return [number for number in range(after + 1, LARGEST_ID + 1) if not len(find_candidate_datasets(number))][:count]


def adapted_dataset_json(source: dict, num_training: int) -> dict:
    """Content of dataset.json for other training cases than the source's."""
    return {key: value for key, value in source.items() if key not in FILE_LISTS} | {"numTraining": num_training}


def write_datasets(raw: str, datasets: Sequence[NewDataset]) -> None:
    """Write the data sets into the folder `raw`. They appear when all are complete, and not at all if this fails.

    Raises:
        UserError: the folder cannot be written to, or holds neither symbolic nor hard links, or two files of a data
            set have one name.
    """
    try:
        with ExitStack() as unfinished:
            for dataset in datasets:
                # A copy onto a link would overwrite the original.
                if twice := sorted(dataset.links.keys() & dataset.copies.keys()):
                    raise UserError(f"{dataset.name} would get two files named {', '.join(twice)}.")
                folder = unfinished.enter_context(whole_folder(os.path.join(raw, dataset.name)))
                for files, write in ((dataset.links, make_link), (dataset.copies, shutil.copyfile)):
                    for name, original in files.items():
                        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
                        write(original, os.path.join(folder, name))
                write_json_whole(os.path.join(folder, "dataset.json"), dataset.dataset_json)
                write_json_whole(os.path.join(folder, dataset.record_name), dataset.record)
    except OSError as error:
        raise UserError(f"The new data sets cannot be written to {raw}: {error}.") from error


def make_link(original: str, link: str) -> None:
    """A symbolic link, or a hard link where the system (Windows) does not permit symbolic ones."""
    try:
        os.symlink(original, link)
    except (OSError, NotImplementedError) as symlink_error:
        try:
            os.link(original, link)
        except (OSError, NotImplementedError) as error:
            raise UserError(
                f"{original} cannot be linked: {symlink_error}; {error}. On Windows, switch on developer mode, which "
                f"permits symbolic links, or have nnUNet_raw on the drive of the originals."
            ) from error
