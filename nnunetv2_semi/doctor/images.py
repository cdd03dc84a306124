"""Checks of what is in the image and label files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from nnunetv2_semi.data.cached_reading import companion_files
from nnunetv2_semi.data.duplicates import LOOK_ALIKE, find_duplicates, find_look_alikes, shown_pairs
from nnunetv2_semi.data.file_contents import FileContent, file_contents, geometry_difference, name_of_reader
from nnunetv2_semi.data.grids import orientation
from nnunetv2_semi.data.label_files import label_mistake
from nnunetv2_semi.doctor.channels import check_channels
from nnunetv2_semi.doctor.checks import Check, ok, problem, warning
from nnunetv2_semi.doctor.preprocessed import Plan, check_intensities, check_preprocessed, check_sizes
from nnunetv2_semi.errors import UserError, shown
from nnunetv2_semi.processes.pool import processes_to_read

Cases = Mapping[str, list[str]]


def check_images(
    labelled: Cases, unlabelled: Cases, test: Cases, labels: Mapping[str, str], folder: str, dataset_json: dict,
    plans: Mapping[str, Plan],
) -> Iterator[Check]:
    """Check what the files hold: channels, geometry, label values, duplicates, intensities, sizes, preprocessed cases.

    Every file is decoded that is new or changed since a doctor, preprocessing or training last read it.

    Args:
        labelled: case name to its image files in channel order; `unlabelled` and `test` likewise.
        labels: label file of each labelled case.
        folder: of the raw data set.
        dataset_json: content of dataset.json.
        plans: of the data set, see `plans_of`.
    """
    images = [file for group in (labelled, unlabelled, test) for files in group.values() for file in files]
    files = [*images, *labels.values()]
    if not files:
        return
    try:
        reader_name = name_of_reader(dataset_json, files[0])
    except UserError as error:
        yield problem(str(error), "correct file_ending in dataset.json")
        return
    preprocessed = os.environ.get("nnUNet_preprocessed", "")
    contents: dict[str, FileContent] = {}
    unreadable: dict[str, str] = {}
    for paths, are_labels in ((images, False), (list(labels.values()), True)):
        found, reasons = file_contents(
            paths,
            labels=are_labels,
            cache_folder=os.path.join(preprocessed, os.path.basename(folder)) if os.path.isdir(preprocessed) else None,
            raw_dataset_folder=folder,
            reader_name=reader_name,
            num_processes=processes_to_read(paths),
        )
        contents |= found
        unreadable |= reasons
    yield from _check_readable(len(files), unreadable, {file for paths in test.values() for file in paths})
    yield from check_channels({"labelled": labelled, "unlabelled": unlabelled, "test": test}, contents, dataset_json)
    yield from _check_geometry({**labelled, **unlabelled}, labels, contents)
    yield from _check_orientations(labelled, unlabelled, contents)
    yield from _check_label_values(labels, contents, dataset_json)
    yield from _check_duplicates(labelled, unlabelled, test, contents)
    yield from _check_constant(unlabelled, contents)
    yield from check_intensities(labelled, unlabelled, contents, dataset_json)
    yield from check_sizes(plans, labelled, unlabelled, contents)
    yield from check_preprocessed(plans, contents, labels, dataset_json)


def _check_readable(number: int, unreadable: Mapping[str, str], test_files: set[str]) -> Iterator[Check]:
    for file, reason in sorted(unreadable.items()):
        finding = f"{file} cannot be read: {reason}"
        remedy = "replace the file, or remove the case"
        yield warning(finding, remedy) if file in test_files else problem(finding, remedy)
    if not unreadable:
        yield ok(f"all {number} image and label files can be read")


def _check_geometry(cases: Cases, labels: Mapping[str, str], contents: Mapping[str, FileContent]) -> Iterator[Check]:
    differing = []
    for case, files in cases.items():
        difference = geometry_difference([*files, *([labels[case]] if case in labels else [])], contents)
        if difference:
            differing.append(f"{case}: {difference}")
    if differing:
        yield problem(
            f"{len(differing)} cases have channels or labels that do not fit together: {shown(differing)}",
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
            f"{len(unknown)} TIFF labels have no .json file with their spacing: {shown(unknown)}; trainings do not "
            "need it, but nnU-Net's --verify_dataset_integrity fails",
            "copy the .json files of their images to labelsTr",
        )


def _check_constant(unlabelled: Cases, contents: Mapping[str, FileContent]) -> Iterator[Check]:
    """Whether every unlabelled image has more than one value; preprocessing refuses the others."""
    constant = [case for case, files in unlabelled.items()
                if (known := [contents[file] for file in files if file in contents])
                and all(content.constant for content in known)]
    if constant:
        yield problem(f"{len(constant)} unlabelled images have a single value: {shown(constant)}",
                      "replace their files, or remove the cases")


def _check_orientations(labelled: Cases, unlabelled: Cases, contents: Mapping[str, FileContent]) -> Iterator[Check]:
    """Whether any unlabelled case lies as some labelled case does; nnU-Net's usual readers turn no image."""
    here, there = (
        {orientation(contents[files[0]].grid) for files in cases.values() if files[0] in contents} - {""}
        for cases in (labelled, unlabelled)
    )
    if here and there and not here & there:
        yield warning(
            f"all unlabelled cases have another orientation ({shown(sorted(there))}) than the labelled ones "
            f"({shown(sorted(here))}), and nnU-Net trains on voxels as they lie in the file",
            "reorient the images in imagesUn as those in imagesTr, or all to RAS",
        )


def _check_label_values(
    labels: Mapping[str, str], contents: Mapping[str, FileContent], dataset_json: dict
) -> Iterator[Check]:
    wrong = []
    for case, file in labels.items():
        if file in contents:
            mistake = label_mistake(contents[file].shape[0], contents[file].values, dataset_json)
            wrong += [f"{case} ({mistake})"] if mistake else []
    if wrong:
        yield problem(
            f"{len(wrong)} labels are no labels of this data set: {shown(wrong)}",
            'correct the label files, or add the values to "labels" in dataset.json',
        )
    elif labels:
        yield ok("label values are those of dataset.json")


def _check_duplicates(
    labelled: Cases, unlabelled: Cases, test: Cases, contents: Mapping[str, FileContent]
) -> Iterator[Check]:
    leaks = find_duplicates(unlabelled, contents, labelled)
    if leaks:
        yield problem(
            f"{len(leaks)} unlabelled cases are labelled cases under another name: {shown_pairs(leaks)}",
            "remove these cases from imagesUn: they may belong to a validation split",
        )
    twice = find_duplicates(unlabelled, contents)
    if twice:
        yield warning(
            f"{len(twice)} unlabelled cases are there twice: {shown_pairs(twice)}",
            "remove one of each pair from imagesUn",
        )
    labelled_twice = find_duplicates(labelled, contents)
    if labelled_twice:
        yield warning(
            f"{len(labelled_twice)} labelled cases are there twice: {shown_pairs(labelled_twice)}",
            "remove one of each pair: training and validation may share them",
        )
    tested = find_duplicates(test, contents, {**labelled, **unlabelled})
    if tested:
        yield warning(
            f"{len(tested)} test cases are training cases under another name: {shown_pairs(tested)}",
            "results on these test cases mean nothing: remove them from imagesTs or from training",
        )
    alike = [
        *find_look_alikes(unlabelled, contents, labelled), *find_look_alikes(unlabelled, contents),
        *find_look_alikes(labelled, contents), *find_look_alikes(test, contents, {**labelled, **unlabelled}),
    ]
    if alike:
        yield warning(
            f"{len(alike)} pairs of cases {LOOK_ALIKE}: {shown_pairs(alike)}", "if they do, treat them as the same case"
        )
    if not (leaks or twice or labelled_twice or tested or alike):
        yield ok("no case is there twice")
