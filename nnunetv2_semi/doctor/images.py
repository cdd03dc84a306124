"""Checks of what is in the image and label files: every file is decoded."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
from nnunetv2.configuration import default_num_processes
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

from nnunetv2_semi.data.cached_reading import companion_files
from nnunetv2_semi.data.duplicates import Duplicate, ImageContent, find_duplicates, geometry_difference, read_file
from nnunetv2_semi.data.grids import orientation
from nnunetv2_semi.data.label_files import label_mistake
from nnunetv2_semi.doctor.channels import check_channels
from nnunetv2_semi.doctor.checks import Check, listed, ok, problem, warning
from nnunetv2_semi.doctor.preprocessed import Plan, check_intensities, check_preprocessed, check_sizes
from nnunetv2_semi.errors import one_line
from nnunetv2_semi.processes.pool import results_in_parallel

# Starting a process costs about as much as reading this many small files.
_FILES_PER_PROCESS = 16
_VOXELS_FOR_MEDIAN = 100_000


@dataclass(frozen=True)
class FileReport:
    """What one file holds, or why it cannot be read.

    Attributes:
        content: None if the file cannot be read.
        reason: why it cannot be read; "" if it can.
        values: different voxel values of a label file; () for an image.
        intensities: lowest, about the median, and highest of an image; () for a label.
    """

    content: ImageContent | None
    reason: str = ""
    values: tuple[float, ...] = ()
    intensities: tuple[float, ...] = ()


Cases = Mapping[str, list[str]]


def check_images(
    labelled: Cases, unlabelled: Cases, test: Cases, labels: Mapping[str, str], dataset_json: dict,
    plans: Mapping[str, Plan],
) -> Iterator[Check]:
    """Decode every file; check channels, geometry, label values, duplicates, intensities, sizes and preprocessed cases.

    Args:
        labelled: case name to its image files in channel order; `unlabelled` and `test` likewise.
        labels: label file of each labelled case.
        dataset_json: content of dataset.json.
        plans: of the data set, see `plans_of`.
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
    yield from _check_orientations(labelled, unlabelled, contents)
    yield from _check_label_values(labels, reports, dataset_json)
    yield from _check_duplicates(labelled, unlabelled, test, contents)
    intensities = {file: report.intensities for file, report in reports.items() if report.intensities}
    yield from check_intensities(labelled, unlabelled, intensities, dataset_json)
    yield from check_sizes(plans, labelled, unlabelled, contents)
    values = {file: reports[file].values for file in labels.values()}
    yield from check_preprocessed(plans, contents, labels, values, dataset_json)


def inspect_file(path: str, reader_name: str, label_files: frozenset[str]) -> FileReport:
    """Decode one file to its end; never raises for a damaged file."""
    try:
        is_label = path in label_files
        with contextlib.redirect_stdout(io.StringIO()):  # a reader of TIFF files prints a line for each
            content, voxels = read_file(path, reader_name, is_label=is_label)
        if is_label and reader_name == "Tiff3DIO" and not companion_files(path):
            content = replace(content, spacing=())  # the reader's 1 mm is a guess
        if is_label:
            return FileReport(content, values=tuple(sorted(pd.unique(voxels.ravel()).tolist())))
        median = float(np.median(voxels.ravel()[::max(1, voxels.size // _VOXELS_FOR_MEDIAN)]))
        return FileReport(content, intensities=(float(voxels.min()), median, float(voxels.max())))
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
        difference = geometry_difference([*files, *([labels[case]] if case in labels else [])], contents)
        if difference:
            differing.append(f"{case}: {difference}")
    if differing:
        yield problem(
            f"{len(differing)} cases have channels or labels that do not fit together: {listed(differing)}",
            "resample them to one grid per case (if the voxels do fit, copy the header of the first channel), or "
            "remove these cases",
        )
    else:
        yield ok("shape, spacing, origin and direction agree within each case")
    unknown = [
        case for case, label in labels.items()
        if label in contents and not contents[label].spacing and companion_files(cases[case][0])
    ]
    if unknown:
        yield warning(
            f"{len(unknown)} TIFF labels have no .json file with their spacing: {listed(unknown)}; trainings do not "
            "need it, but nnU-Net's --verify_dataset_integrity fails",
            "copy the .json files of their images to labelsTr",
        )


def _check_orientations(labelled: Cases, unlabelled: Cases, contents: Mapping[str, ImageContent]) -> Iterator[Check]:
    """Whether any unlabelled case lies as some labelled case does; nnU-Net's usual readers turn no image."""
    here, there = (
        {orientation(contents[files[0]].grid) for files in cases.values() if files[0] in contents} - {""}
        for cases in (labelled, unlabelled)
    )
    if here and there and not here & there:
        yield warning(
            f"all unlabelled cases have another orientation ({listed(sorted(there))}) than the labelled ones "
            f"({listed(sorted(here))}), and nnU-Net trains on voxels as they lie in the file",
            "reorient the images in imagesUn as those in imagesTr, or all to RAS",
        )


def _check_label_values(
    labels: Mapping[str, str], reports: Mapping[str, FileReport], dataset_json: dict
) -> Iterator[Check]:
    wrong = []
    for case, file in labels.items():
        content = reports[file].content
        mistake = None if content is None else label_mistake(content.shape[0], reports[file].values, dataset_json)
        wrong += [f"{case} ({mistake})"] if mistake else []
    if wrong:
        yield problem(
            f"{len(wrong)} labels are no labels of this data set: {listed(wrong)}",
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
