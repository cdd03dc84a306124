"""Checks of raw cases against the plans and preprocessed cases that are there, and against the other cases."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_semi.data.atomic_files import read_json_object
from nnunetv2_semi.data.dataset_settings import named_channels
from nnunetv2_semi.data.file_contents import FileContent
from nnunetv2_semi.data.label_files import Labels
from nnunetv2_semi.data.labelled_checks import preprocessing_command
from nnunetv2_semi.data.labelled_comparison import compare_with_raw, labelled_folder, names_preprocessed
from nnunetv2_semi.data.raw_cases import channel_numbers
from nnunetv2_semi.data.resampled_size import resampled_shape, size_problem
from nnunetv2_semi.doctor.checks import Check, ok, problem, warning
from nnunetv2_semi.errors import one_line, shown
from nnunetv2_semi.processes.pool import default_processes

_MUCH_LARGER = 30  # times the voxels of a usual labelled case
_FAR_OUTSIDE = 10  # times the range of the labelled cases
_MUCH_NARROWER = 20

Cases = Mapping[str, Sequence[str]]
Plan = tuple[PlansManager, ConfigurationManager]


def plans_of(dataset_name: str) -> dict[str, Plan]:
    """Every configuration of every plans file of a data set: "plans, configuration" to both; empty before planning."""
    folder = os.environ.get("nnUNet_preprocessed")
    found: dict[str, Plan] = {}
    for file in sorted(Path(folder, dataset_name).glob("*.json")) if folder else []:
        content = read_json_object(str(file)) or {}
        if isinstance(content.get("configurations"), dict) and "plans_name" in content:
            manager = PlansManager(content)
            for name in manager.available_configurations:
                if "spacing" in manager.get_configuration(name).configuration:
                    found[f"{file.stem}, {name}"] = manager, manager.get_configuration(name)
    return found


def check_preprocessed(
    plans: Mapping[str, Plan], contents: Mapping[str, FileContent], labels: Mapping[str, str],
    dataset_json: dict,
) -> Iterator[Check]:
    """Whether the preprocessed labelled cases are those of the raw data set, and images.

    Args:
        plans: see `plans_of`.
        contents: of the image and label files that can be read.
        labels: label file of each labelled case.
        dataset_json: content of dataset.json.
    """
    read = Labels(labels, {file: contents[file] for file in labels.values() if file in contents}, {})
    done: set[str] = set()
    for manager, configuration in plans.values():
        folder = labelled_folder(manager, configuration)
        if folder in done or not names_preprocessed(folder):
            continue
        done.add(folder)
        command = preprocessing_command(manager, configuration)
        try:
            found = compare_with_raw(
                manager, configuration, dataset_json, images=contents, labels=read, report=lambda line: None,
                num_processes=default_processes(),
            )  # fmt: skip
        except Exception as error:  # plans of another version, or with what is not installed
            yield problem(f"{folder} cannot be compared with the raw data set: {one_line(error)}", command)
            continue
        if not found.agrees:
            findings = found.findings()
            yield problem(f"{len(findings)} cases in {folder} are not as in the raw data set: {shown(findings)}",
                          f"{command} (and correct splits_final.json, if it names cases that are gone)")
        if found.unusable:
            images = [f"{case} ({reason})" for case, reason in found.unusable.items()]
            yield problem(f"{len(images)} cases in {folder} are no images: {shown(images)}",
                          f"replace or remove their files, then {command}")
        if found.agrees and not found.unusable:
            yield ok(f"the preprocessed cases in {os.path.basename(folder)} are those of the raw data set")


def check_sizes(
    plans: Mapping[str, Plan], labelled: Cases, unlabelled: Cases, contents: Mapping[str, FileContent]
) -> Iterator[Check]:
    """Whether every case can be resampled to each plan, or else to a usual voxel size of labelled cases."""
    first = {case: contents[files[0]] for cases in (labelled, unlabelled) for case, files in cases.items()
             if files and files[0] in contents}  # fmt: skip
    usual = [content for case, content in first.items() if case in labelled]
    if not usual:
        return
    targets = plans or {"the usual voxel size of labelled cases": _plan_of(usual)}
    found = False
    for name, (manager, configuration) in targets.items():
        sizes, impossible = {}, []
        for case, content in first.items():
            channels = sum(contents[file].shape[0] for file in {**unlabelled, **labelled}[case] if file in contents)
            reason = size_problem(content.shape[1:], content.spacing, channels, manager, configuration)
            if reason is not None:
                impossible.append(f"{case} ({reason})")
            else:
                sizes[case] = math.prod(resampled_shape(content.shape[1:], content.spacing, manager, configuration))
        if impossible:
            found = True
            yield problem(f"{len(impossible)} cases cannot be resampled ({name}): {shown(impossible)}",
                          'mend them, or remove them; unlabelled ones are left out with "skip_unreadable": true')
        median = float(np.median([float(size) for case, size in sizes.items() if case in labelled] or [math.inf]))
        large = [f"{case} ({size / median:.0f} times)" for case, size in sizes.items() if size > _MUCH_LARGER * median]
        if large:
            found = True
            yield warning(f"{len(large)} cases have many more voxels than a usual labelled one once they are resampled "
                          f"({name}): {shown(large)}", "see whether their voxel size in the header is in mm")
    if not found:
        yield ok(f"all {len(first)} cases can be resampled to {shown(targets)}")


def check_intensities(
    labelled: Cases, unlabelled: Cases, contents: Mapping[str, FileContent], dataset_json: dict
) -> Iterator[Check]:
    """Whether unlabelled images have intensities far outside those of the labelled ones, channel by channel.

    Args:
        labelled: case name to image files; `unlabelled` likewise.
        contents: of the image files that can be read.
        dataset_json: content of dataset.json.
    """
    ranges: dict[int, list[Sequence[float]]] = {}
    for files in labelled.values():
        for channel, file in _by_channel(files, dataset_json):
            if file in contents:
                ranges.setdefault(channel, []).append(contents[file].intensities)
    outside = []
    for files in unlabelled.values():
        for channel, file in _by_channel(files, dataset_json):
            if file in contents and channel in ranges:
                usual = ranges[channel]
                low, high = min(lowest for lowest, _, _ in usual), max(highest for _, _, highest in usual)
                lowest, median, highest = contents[file].intensities
                margin = _FAR_OUTSIDE * (high - low)
                narrow = _is_ct(channel, dataset_json) and highest - lowest < min(
                    top - bottom for bottom, _, top in usual) / _MUCH_NARROWER
                if lowest < low - margin or highest > high + margin or not low <= median <= high or narrow:
                    outside.append(f"{os.path.basename(file)} ({lowest:.4g} to {highest:.4g}; labelled ones have "
                                   f"{low:.4g} to {high:.4g})")
    if outside:
        yield warning(f"{len(outside)} unlabelled images have intensities far from those of the labelled ones: "
                      f"{shown(outside)}", "see whether they are what their names say, in the same unit, undamaged")


def _plan_of(contents: Sequence[FileContent]) -> Plan:
    spacing = np.median([content.spacing for content in contents], axis=0).tolist()
    return (PlansManager({"transpose_forward": list(range(len(spacing)))}),
            ConfigurationManager({"spacing": spacing, "architecture": {}}))


def _by_channel(files: Sequence[str], dataset_json: dict) -> list[tuple[int, str]]:
    """Channel and file; of files with several channels, or listed under any name, they count in their order."""
    numbers = channel_numbers(files, dataset_json["file_ending"]) or list(range(len(files)))
    return list(zip(numbers, files, strict=True))


def _is_ct(channel: int, dataset_json: dict) -> bool:
    names = {int(index): name for index, name in named_channels(dataset_json).items()}
    return channel in names and issubclass(get_normalization_scheme(names[channel]), CTNormalization)
