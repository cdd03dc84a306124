"""Which cases lie in a raw data set folder, and whether they are named as nnU-Net expects."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Sequence

from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_semi.data.dataset_settings import num_channels
from nnunetv2_semi.errors import UserError, shown

UNLABELLED_FOLDER = "imagesUn"
LABELLED_FOLDER = "imagesTr"
RESOURCE_FORK = "._"  # begins the names of files that macOS writes beside those it copies


def raw_dataset_folder(dataset_name_or_id: str) -> str:
    """The folder of a raw data set.

    Raises:
        UserError: nnUNet_raw is not set, or holds no such data set.
    """
    raw = os.environ.get("nnUNet_raw")
    if not raw:
        raise UserError("The environment variable nnUNet_raw is not set.")
    try:
        folder = os.path.join(raw, str(maybe_convert_to_dataset_name(dataset_name_or_id)))
    except (RuntimeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if not os.path.isdir(folder):
        raise UserError(f"There is no folder {folder}.")
    return folder


def list_unlabelled_cases(raw_dataset_folder: str, dataset_json: dict) -> dict[str, list[str]]:
    """Unlabelled cases in `imagesUn/`: case name to its channel files, in channel order; cases in alphabetical order.

    A case may lack channels: `channels_of_case` tells which it has. An absent or empty folder gives an empty dict.
    Hidden files and other file endings than dataset.json's are ignored. Links that lead nowhere are listed: they are
    images that cannot be read.

    Raises:
        UserError: images without a channel number in their name, or channels that dataset.json does not have.
    """
    folder = os.path.join(raw_dataset_folder, UNLABELLED_FOLDER)
    cases, unnumbered = _channels_per_case(folder, dataset_json["file_ending"])
    if unnumbered:
        raise UserError(_unnumbered_message(folder, unnumbered, dataset_json))
    _check_no_surplus(folder, cases, dataset_json)
    return {case: [channels[index] for index in sorted(channels)] for case, channels in cases.items()}


def list_labelled_cases(raw_dataset_folder: str, dataset_json: dict) -> dict[str, list[str]]:
    """Labelled cases: case name to its channel files, in channel order; a case may lack channels.

    These are the cases in `imagesTr/`, or those under "dataset" in dataset.json where nnU-Net is told so. What nnU-Net
    would take for a case is one, but for what `labelled_file_mistakes` names.
    """
    if "dataset" in dataset_json:
        # nnU-Net rewrites the paths in what it is given
        listed = get_filenames_of_train_images_and_targets(raw_dataset_folder, copy.deepcopy(dataset_json))
        return {case: list(entry["images"]) for case, entry in sorted(listed.items())}
    folder = os.path.join(raw_dataset_folder, LABELLED_FOLDER)
    cases, _ = _channels_per_case(folder, dataset_json["file_ending"], hidden=True)
    return {case: [channels[index] for index in sorted(channels)] for case, channels in cases.items()}


def list_test_cases(folder: str, dataset_json: dict) -> dict[str, list[str]]:
    """Cases in a folder of images to predict, as nnU-Net lists them: case name to its channel files, in order."""
    cases, _ = _channels_per_case(folder, dataset_json["file_ending"], hidden=True)
    return {case: [channels[index] for index in sorted(channels)] for case, channels in cases.items()}


def labelled_file_mistakes(raw_dataset_folder: str, dataset_json: dict) -> list[str]:
    """What nnU-Net would take for labelled images, or leave out, though it is another thing; with the remedy."""
    if "dataset" in dataset_json:
        listed = [file for files in list_labelled_cases(raw_dataset_folder, dataset_json).values() for file in files]
        absent = [file for file in listed if not os.path.isfile(file)]
        return [
            f'{len(absent)} image(s) under "dataset" in dataset.json are not there: {shown(absent)}. Correct their '
            f"paths, or remove the cases."
        ] if absent else []
    folder = os.path.join(raw_dataset_folder, LABELLED_FOLDER)
    forks = resource_forks(folder, dataset_json["file_ending"])
    names = [name for name in image_files(folder, dataset_json["file_ending"]) if name not in forks]
    broken = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    _, unnumbered = _channels_per_case(folder, dataset_json["file_ending"], hidden=True)
    mistakes = []
    if forks:
        mistakes.append(_forks_message(folder, forks))
    if broken:
        targets = [f"{name} -> {os.readlink(os.path.join(folder, name))}" for name in broken]
        mistakes.append(
            f"{len(broken)} image(s) in {folder} are links to files that are not there, which nnU-Net leaves out "
            f"without a word: {shown(targets)}. Restore these files, or remove the links and their labels."
        )
    if unnumbered:
        mistakes.append(_unnumbered_message(folder, unnumbered, dataset_json))
    return mistakes


def image_files(folder: str, file_ending: str) -> list[str]:
    """Names of the files in a folder that end so, hidden ones and links that lead nowhere too, in alphabetical order.

    nnU-Net lists the same ones, but for those links.
    """
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries
                      if entry.name.endswith(file_ending) and not entry.is_dir())


def resource_forks(folder: str, file_ending: str) -> list[str]:
    """Names of the files that macOS has written beside images that it copied, which nnU-Net takes for images."""
    return [name for name in image_files(folder, file_ending) if name.startswith(RESOURCE_FORK)]


def refuse_resource_forks(folder: str, file_ending: str) -> None:
    """Raise UserError where nnUNetv2_predict would end at such a file."""
    if forks := resource_forks(folder, file_ending):
        raise UserError(_forks_message(folder, forks))


def _forks_message(folder: str, forks: list[str]) -> str:
    return (f"{len(forks)} file(s) in {folder} are no images, but nnU-Net reads them as cases: {shown(forks)}. macOS "
            f"writes such files beside copied ones: remove all files whose names begin with {RESOURCE_FORK}.")


def cases_in(folder: str, file_ending: str) -> set[str]:
    """Names of the cases of which any channel lies in `folder`."""
    return set(_channels_per_case(folder, file_ending)[0])


def labelled_images_without_label(raw_dataset_folder: str, dataset_json: dict) -> list[str]:
    """Names of the cases in `imagesTr/` that have no label file, in alphabetical order."""
    if "dataset" in dataset_json:
        listed = get_filenames_of_train_images_and_targets(raw_dataset_folder, copy.deepcopy(dataset_json))
        return sorted(case for case, entry in listed.items() if not os.path.isfile(entry["label"]))
    labels = os.path.join(raw_dataset_folder, "labelsTr")
    return [
        case
        for case in list_labelled_cases(raw_dataset_folder, dataset_json)
        if not os.path.isfile(os.path.join(labels, case + dataset_json["file_ending"]))
    ]


def check_labelled_images_have_labels(raw_dataset_folder: str, dataset_json: dict) -> None:
    """Refuse images in `imagesTr/` that have no label file.

    Raises:
        UserError: names them all, and says to move them to `imagesUn/`.
    """
    without_label = labelled_images_without_label(raw_dataset_folder, dataset_json)
    if without_label:
        raise UserError(
            f"{len(without_label)} case(s) in {os.path.join(raw_dataset_folder, LABELLED_FOLDER)} have no label file "
            f"in {os.path.join(raw_dataset_folder, 'labelsTr')}: {shown(without_label)}. If they are unlabelled, "
            f"move their images to {os.path.join(raw_dataset_folder, UNLABELLED_FOLDER)} (and set numTraining in "
            f"dataset.json to the number of labelled cases); else add the missing label files."
        )


def check_names_are_unlabelled(unlabelled: Iterable[str], labelled: Iterable[str], labelled_where: str) -> None:
    """Refuse a case name that is both unlabelled and labelled: its labels would leak into what is called unlabelled.

    Raises:
        UserError: names them all. `labelled_where` says where the labelled names were found.
    """
    shared = sorted(set(unlabelled) & set(labelled))
    if shared:
        raise UserError(
            f"{len(shared)} case(s) are both in {UNLABELLED_FOLDER} and in {labelled_where}: {shown(shared)}. A "
            f"labelled case must not be unlabelled training data as well: remove these cases from {UNLABELLED_FOLDER}, "
            f"or rename them if they are different images."
        )


def naming_rule(dataset_json: dict) -> str:
    """How image files of this data set are named, for messages."""
    ending = dataset_json["file_ending"]
    last = num_channels(dataset_json) - 1
    return f"CASE_0000{ending}" if last == 0 else f"CASE_0000{ending} to CASE_{last:04d}{ending} (one file per channel)"


def case_and_channel(file_name: str, file_ending: str) -> tuple[str, int] | None:
    """Case name and channel number in the name of an image file (`CASE_0001.nii.gz`: CASE and 1); None without one."""
    match = re.fullmatch(r"(.+)_(\d{4})" + re.escape(file_ending), file_name)
    return None if match is None else (match.group(1), int(match.group(2)))


def channel_numbers(files: Sequence[str], file_ending: str) -> list[int] | None:
    """The numbers in the names of one case's files (`CASE_0001.nii.gz`: 1), in the order of `files`.

    None where these are no channel numbers: a name has none, or the names differ in more than the number.
    """
    found = [case_and_channel(os.path.basename(file), file_ending) for file in files]
    named = [name for name in found if name is not None]
    if len(named) < len(files) or len({case for case, _ in named}) != 1:
        return None
    return [number for _, number in named]


def _channels_per_case(
    folder: str, file_ending: str, hidden: bool = False
) -> tuple[dict[str, dict[int, str]], list[str]]:
    """Case name to {channel index: file}, and the image files whose names have no channel number.

    hidden: hidden files count, as nnU-Net counts them, but for those that macOS writes beside copied ones.
    """
    cases: dict[str, dict[int, str]] = {}
    unnumbered: list[str] = []
    for name in image_files(folder, file_ending):
        if name.startswith(RESOURCE_FORK if hidden else "."):
            continue
        found = case_and_channel(name, file_ending)
        if found is None:
            unnumbered.append(name)
        else:
            case, channel = found
            cases.setdefault(case, {})[channel] = os.path.join(folder, name)
    return dict(sorted(cases.items())), unnumbered


def _unnumbered_message(folder: str, unnumbered: list[str], dataset_json: dict) -> str:
    return (f"Images in {folder} have no channel number in their name: {shown(unnumbered)}. Name them "
            f"{naming_rule(dataset_json)}.")


def _check_no_surplus(folder: str, cases: dict[str, dict[int, str]], dataset_json: dict) -> None:
    count = num_channels(dataset_json)
    surplus = [os.path.basename(file) for files in cases.values() for index, file in files.items() if index >= count]
    if surplus:
        raise UserError(
            f"Unlabelled cases in {folder} have more channels than the {count} that channel_names in dataset.json "
            f"names: {shown(surplus)}. Remove these files, or name them {naming_rule(dataset_json)}."
        )
