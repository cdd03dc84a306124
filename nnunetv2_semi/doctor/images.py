"""Checks of what is in the image and label files: every file is decoded."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from nnunetv2.configuration import default_num_processes
from nnunetv2.imageio.reader_writer_registry import (
    determine_reader_writer_from_dataset_json,
    recursive_find_reader_writer_by_name,
)
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_semi.data.duplicates import Duplicate, ImageContent, find_duplicates, geometry_difference, read_content
from nnunetv2_semi.doctor.channels import check_channels
from nnunetv2_semi.doctor.checks import Check, listed, ok, problem, warning
from nnunetv2_semi.errors import one_line
from nnunetv2_semi.processes.pool import results_in_parallel

# Starting a process costs about as much as reading this many small files.
_FILES_PER_PROCESS = 16
_SPACING_TOLERANCE = 1e-4


@dataclass(frozen=True)
class FileReport:
    """What one file holds, or why it cannot be read.

    Attributes:
        content: None if the file cannot be read.
        reason: why it cannot be read; "" if it can.
        values: different voxel values of a label file; () for an image.
    """

    content: ImageContent | None
    reason: str = ""
    values: tuple[float, ...] = ()


Cases = Mapping[str, list[str]]


def check_images(
    labelled: Cases, unlabelled: Cases, test: Cases, labels: Mapping[str, str], dataset_json: dict
) -> Iterator[Check]:
    """Decode every file, then check channels, geometry, label values and duplicates.

    Args:
        labelled: case name to its image files in channel order; `unlabelled` and `test` likewise.
        labels: label file of each labelled case.
        dataset_json: content of dataset.json.
    """
    images = [file for group in (labelled, unlabelled, test) for files in group.values() for file in files]
    files = [*images, *labels.values()]
    if not files:
        return
    try:
        reader_name = _reader_name(dataset_json, files)
    except RuntimeError as error:
        yield problem(f"nnU-Net has no reader for these images: {error}", "correct file_ending in dataset.json")
        return
    reports = _read_all(files, set(labels.values()), reader_name)
    yield from _check_readable(files, reports, {file for paths in test.values() for file in paths})
    contents = {file: report.content for file, report in reports.items() if report.content is not None}
    yield from check_channels({"labelled": labelled, "unlabelled": unlabelled, "test": test}, contents, dataset_json)
    yield from _check_geometry({**labelled, **unlabelled}, labels, contents)
    yield from _check_label_values(labels, reports, dataset_json)
    yield from _check_duplicates(labelled, unlabelled, test, contents)


def inspect_file(path: str, reader_name: str, label_files: frozenset[str]) -> FileReport:
    """Decode one file to its end; never raises for a damaged file."""
    try:
        content = read_content(path, reader_name)
        if path not in label_files:
            return FileReport(content)
        segmentation, _ = recursive_find_reader_writer_by_name(reader_name)().read_seg(path)
        return FileReport(content, values=tuple(float(value) for value in np.unique(segmentation)))
    except MemoryError:
        raise
    except EOFError as error:
        return FileReport(None, f"the file is truncated ({error})")
    except Exception as error:  # readers raise whatever their libraries do
        return FileReport(None, one_line(error))


def _reader_name(dataset_json: dict, files: list[str]) -> str:
    """The reader that nnU-Net would choose: the first that reads an example, where several share a file ending."""
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        try:
            reader = determine_reader_writer_from_dataset_json(dataset_json, files[0], verbose=False)
        except RuntimeError:
            reader = determine_reader_writer_from_dataset_json(dataset_json, verbose=False)
    return str(reader.__name__)


def _read_all(files: list[str], label_files: set[str], reader_name: str) -> dict[str, FileReport]:
    results = results_in_parallel(
        partial(inspect_file, reader_name=reader_name, label_files=frozenset(label_files)),
        files,
        num_processes=max(1, min(default_num_processes, len(files) // _FILES_PER_PROCESS)),
        description="Decoding files",
    )
    return dict(results)


def _check_readable(files: list[str], reports: Mapping[str, FileReport], test_files: set[str]) -> Iterator[Check]:
    damaged = sorted(file for file in files if reports[file].content is None)
    for file in damaged:
        finding = f"{file} cannot be read: {reports[file].reason}"
        remedy = "replace the file, or remove the case"
        yield warning(finding, remedy) if file in test_files else problem(finding, remedy)
    if not damaged:
        yield ok(f"all {len(files)} image and label files can be read")


def _check_geometry(cases: Cases, labels: Mapping[str, str], contents: Mapping[str, ImageContent]) -> Iterator[Check]:
    differing = []
    for case, files in cases.items():
        difference = geometry_difference(files, contents) or _label_difference(files[0], labels.get(case), contents)
        if difference:
            differing.append(f"{case}: {difference}")
    if differing:
        yield problem(
            f"{len(differing)} cases have channels or labels that do not fit together: {listed(differing)}",
            "resample them to one grid per case, or remove these cases",
        )
    else:
        yield ok("shape and spacing agree within each case")


def _label_difference(image: str, label: str | None, contents: Mapping[str, ImageContent]) -> str | None:
    if label is None or label not in contents or image not in contents:
        return None
    first, second = contents[image], contents[label]
    if first.shape[1:] != second.shape[1:]:
        return f"shape {list(second.shape[1:])} of the label differs from {list(first.shape[1:])} of the image"
    # nnU-Net compares label and image with a tolerance, but channels exactly.
    if not np.allclose(first.spacing, second.spacing, rtol=_SPACING_TOLERANCE):
        return f"spacing {list(second.spacing)} of the label differs from {list(first.spacing)} of the image"
    return None


def _check_label_values(
    labels: Mapping[str, str], reports: Mapping[str, FileReport], dataset_json: dict
) -> Iterator[Check]:
    manager = LabelManager(dataset_json["labels"], regions_class_order=dataset_json.get("regions_class_order"))
    expected = set(manager.all_labels) | ({manager.ignore_label} if manager.has_ignore_label else set())
    unknown = []
    for case, file in labels.items():
        values = sorted(set(reports[file].values) - expected)
        if values:
            unknown.append(f"{case} ({listed(f'{value:g}' for value in values)})")
    if unknown:
        yield problem(
            f"{len(unknown)} labels have values that dataset.json does not name: {listed(unknown)}",
            'correct the label files, or add the values to "labels" in dataset.json',
        )
    elif labels:
        yield ok("label values are those of dataset.json")


def _check_duplicates(
    labelled: Cases, unlabelled: Cases, test: Cases, contents: Mapping[str, ImageContent]
) -> Iterator[Check]:
    leaks = find_duplicates(unlabelled, contents, labelled)
    if leaks:
        yield problem(
            f"{len(leaks)} unlabelled cases are labelled cases under another name: {_pairs(leaks)}",
            "remove these cases from imagesUn: they may belong to a validation split",
        )
    twice = find_duplicates(unlabelled, contents)
    if twice:
        yield warning(
            f"{len(twice)} unlabelled cases are there twice: {_pairs(twice)}", "remove one of each pair from imagesUn"
        )
    labelled_twice = find_duplicates(labelled, contents)
    if labelled_twice:
        yield warning(
            f"{len(labelled_twice)} labelled cases are there twice: {_pairs(labelled_twice)}",
            "remove one of each pair: training and validation may share them",
        )
    tested = find_duplicates(test, contents, {**labelled, **unlabelled})
    if tested:
        yield warning(
            f"{len(tested)} test cases are training cases under another name: {_pairs(tested)}",
            "results on these test cases mean nothing: remove them from imagesTs or from training",
        )
    if not (leaks or twice or labelled_twice or tested):
        yield ok("no case is there twice")


def _pairs(duplicates: list[Duplicate]) -> str:
    return listed(
        f"{os.path.basename(pair.file)} = {os.path.join(*pair.other_file.split(os.sep)[-2:])}" for pair in duplicates
    )
