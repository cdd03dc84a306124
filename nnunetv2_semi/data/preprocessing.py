"""Unlabelled cases, preprocessed as the labelled ones are, in a folder of their own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_semi.data.case_channels import channels_of_cases, lacking_channels, lacking_warning
from nnunetv2_semi.data.case_preprocessing import PreprocessingJob, preprocess_missing
from nnunetv2_semi.data.case_records import CaseRecords, plans_digest
from nnunetv2_semi.data.duplicates import LOOK_ALIKE, find_duplicates, find_look_alikes, shown_pairs
from nnunetv2_semi.data.file_contents import FileContent, file_contents, geometry_difference
from nnunetv2_semi.data.one_at_a_time import one_at_a_time
from nnunetv2_semi.data.raw_cases import (
    LABELLED_FOLDER,
    UNLABELLED_FOLDER,
    check_names_are_unlabelled,
    list_labelled_cases,
    naming_rule,
)
from nnunetv2_semi.data.raw_checks import check_case_names, check_not_in_splits
from nnunetv2_semi.data.resampled_size import size_problem
from nnunetv2_semi.errors import UserError


@dataclass(frozen=True)
class UnlabelledCases:
    """Preprocessed unlabelled cases that may be trained on.

    Attributes:
        folder: holds `<case>.b2nd`, `<case>_seg.b2nd` (-1 outside the image's non-zero region, else 0), `<case>.pkl`.
        identifiers: case names, in alphabetical order. The folder may hold others that must not be used.
        skipped: cases left out because they cannot be used.
    """

    folder: str
    identifiers: list[str]
    skipped: list[str] = field(default_factory=list)


def unlabelled_folder(plans_manager: PlansManager, configuration_manager: ConfigurationManager) -> str:
    """Folder of the configuration's preprocessed unlabelled cases, beside that of the labelled ones."""
    return os.path.join(
        nnUNet_preprocessed, plans_manager.dataset_name, configuration_manager.data_identifier + "_unlabeled"
    )


def prepare_unlabelled(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    dataset_json: dict,
    *,
    num_processes: int,
    skip_unreadable: bool = False,
    report: Callable[[str], None] = print,
    show_progress_bar: bool = True,
    preprocessor_class: type[DefaultPreprocessor] | None = None,
) -> UnlabelledCases:
    """Preprocess what is new or changed in imagesUn, and return all unlabelled cases that may be trained on.

    A case may lack channels, of which one line is reported. A case is done again if its raw images or those parts of
    the plans that it depends on changed, else not. Killed at any moment, it continues where it was. Without raw data
    (a cluster node), finished cases are used as they are. Processes that are started together do it one after another.

    Args:
        plans_manager: names the data set.
        configuration_manager: with the preprocessor, spacing and normalisation.
        dataset_json: content of dataset.json.
        num_processes: spawned for reading and preprocessing; 1 works in the calling process.
        skip_unreadable: leave out cases that cannot be used (unreadable, impossible to resample, or no image once they
            are normalised) with a warning instead of raising.
        report: receives one line of text per fact worth knowing.
        show_progress_bar: of reading and preprocessing.
        preprocessor_class: instead of the one that the configuration names.

    Raises:
        UserError: no unlabelled case; the mistakes listed in `nnunetv2_semi.data.raw_checks.check_case_names`; an
            unlabelled image that is a labelled case under another name; files that hold other channels than their
            names say; cases that lack channels with a preprocessor that cannot fill them; images that cannot be used
            (all in one message).
    """
    folder = unlabelled_folder(plans_manager, configuration_manager)
    preprocessed_dataset_folder = os.path.dirname(folder)
    records = CaseRecords(folder, plans_digest(plans_manager, configuration_manager))
    job = PreprocessingJob(plans_manager, configuration_manager, dataset_json, preprocessor_class, folder)
    with one_at_a_time(preprocessed_dataset_folder, report):
        raw_dataset_folder = _raw_dataset_folder(plans_manager.dataset_name)
        if raw_dataset_folder is None:
            labelled_folder = os.path.join(preprocessed_dataset_folder, configuration_manager.data_identifier)
            return _cases_without_raw_data(records, labelled_folder, dataset_json, report)

        cases = _listed_cases(raw_dataset_folder, preprocessed_dataset_folder, dataset_json, records)
        labelled = list_labelled_cases(raw_dataset_folder, dataset_json)
        contents, unreadable_files = file_contents(
            [file for files in (*labelled.values(), *cases.values()) for file in files],
            raw_dataset_folder=raw_dataset_folder,
            cache_folder=preprocessed_dataset_folder,
            reader_name=plans_manager.plans["image_reader_writer"],
            num_processes=num_processes,
            show_progress_bar=show_progress_bar,
        )
        _refuse_labelled_images(cases, labelled, contents)
        _report_duplicates(cases, contents, report)
        unusable = _unreadable_cases(cases, contents, unreadable_files)
        unusable |= _cases_of_impossible_size(_without(cases, unusable), contents, plans_manager, configuration_manager)
        readable = _without(cases, unusable)
        lacking = _lacking_channels(readable, contents, dataset_json, report)
        new = {case: files for case, files in readable.items()
               if not records.is_done(case, [contents[file] for file in files], lacking.get(case))}
        _report_look_alikes(new, {**labelled, **_without(readable, new)}, contents, report)
        no_images = preprocess_missing(
            job, readable, contents, lacking, records, num_processes, show_progress_bar, report)
        unusable |= {case: f"{', '.join(readable[case])} ({problem})" for case, problem in no_images.items()}

        of_labelled = [f"{file} ({reason})" for file, reason in unreadable_files.items() if file not in _files(cases)]
        of_labelled += [f"labelled case {case} ({difference})" for case, files in labelled.items()
                        if (difference := geometry_difference(files, contents)) is not None]
        _refuse_or_report_unusable(of_labelled, list(unusable.values()), skip_unreadable, report)
        if len(unusable) == len(cases):
            raise UserError(f"None of the unlabelled cases can be used: {'; '.join(unusable.values())}.")
        return UnlabelledCases(folder, sorted(set(cases) - set(unusable)), sorted(unusable))


def _listed_cases(
    raw_dataset_folder: str, preprocessed_dataset_folder: str, dataset_json: dict, records: CaseRecords
) -> dict[str, list[str]]:
    """The cases in imagesUn, at least one; records of others are forgotten."""
    cases = check_case_names(raw_dataset_folder, preprocessed_dataset_folder, dataset_json)
    if not cases:
        raise UserError(_no_case_message(raw_dataset_folder, dataset_json))
    for case in set(records.cases()) - set(cases):
        with contextlib.suppress(OSError):  # matters only where the raw data is not, in a folder that is read-only
            records.forget(case)
    return cases


def _lacking_channels(
    cases: Mapping[str, list[str]],
    contents: Mapping[str, FileContent],
    dataset_json: dict,
    report: Callable[[str], None],
) -> dict[str, list[int]]:
    """Those cases that lack channels, with the channels that they have; one line is reported of them."""
    channels_read = {case: sum(contents[file].shape[0] for file in files) for case, files in cases.items()}
    channels = channels_of_cases(cases, channels_read, dataset_json)
    if warning := lacking_warning(channels, dataset_json, "unlabelled"):
        report(warning)
    return lacking_channels(channels, dataset_json)


def _report_duplicates(
    cases: Mapping[str, list[str]], contents: Mapping[str, FileContent], report: Callable[[str], None]
) -> None:
    if duplicates := find_duplicates(cases, contents):
        report(
            f"WARNING: {len(duplicates)} pair(s) of cases in {UNLABELLED_FOLDER} hold the same image: "
            f"{shown_pairs(duplicates)}. Training sees it twice as often as others."
        )


def _refuse_labelled_images(
    cases: Mapping[str, list[str]], labelled: Mapping[str, list[str]], contents: Mapping[str, FileContent]
) -> None:
    duplicates = find_duplicates(cases, contents, labelled)
    if duplicates:
        raise UserError(
            f"{len(duplicates)} unlabelled case(s) in {UNLABELLED_FOLDER} hold the same image as a labelled case in "
            f"{LABELLED_FOLDER}: {shown_pairs(duplicates)}. Labelled cases, and with them those of the validation "
            f"split, must not be unlabelled training data: remove these cases from {UNLABELLED_FOLDER}."
        )


def _report_look_alikes(
    new: Mapping[str, list[str]],
    others: Mapping[str, list[str]],
    contents: Mapping[str, FileContent],
    report: Callable[[str], None],
) -> None:
    """Name new cases that seem to be copies: once, since to compare thousands of cases takes minutes."""
    alike = [*find_look_alikes(new, contents, others), *find_look_alikes(new, contents)]
    if alike:
        report(
            f"WARNING: {len(alike)} pair(s) of an image in {UNLABELLED_FOLDER} and another {LOOK_ALIKE}: "
            f"{shown_pairs(alike)}. If they do, remove the first: the other may be a validation case, or is seen too "
            "often."
        )


def _unreadable_cases(
    cases: Mapping[str, list[str]], contents: Mapping[str, FileContent], unreadable_files: Mapping[str, str]
) -> dict[str, str]:
    """Case name to the file(s) that cannot be read, with the reasons."""
    unreadable: dict[str, str] = {}
    for case, files in cases.items():
        reasons = [f"{file} ({unreadable_files[file]})" for file in files if file in unreadable_files]
        difference = geometry_difference(files, contents)
        if difference:
            reasons.append(f"{case} ({difference})")
        if reasons:
            unreadable[case] = "; ".join(reasons)
    return unreadable


def _cases_of_impossible_size(
    cases: Mapping[str, list[str]],
    contents: Mapping[str, FileContent],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
) -> dict[str, str]:
    """Case name to its file and why it cannot be resampled to the spacing of the plans."""
    impossible: dict[str, str] = {}
    for case, files in cases.items():
        first, channels = contents[files[0]], sum(contents[file].shape[0] for file in files)
        problem = size_problem(first.shape[1:], first.spacing, channels, plans_manager, configuration_manager)
        if problem is not None:
            impossible[case] = f"{files[0]} ({problem})"
    return impossible


def _refuse_or_report_unusable(
    of_labelled: list[str], of_unlabelled: list[str], skip_unreadable: bool, report: Callable[[str], None]
) -> None:
    """Labelled cases are never left out."""
    refused = of_labelled if skip_unreadable else [*of_labelled, *of_unlabelled]
    if refused:
        raise UserError(
            f"{len(refused)} image(s) or case(s) cannot be used: {'; '.join(refused)}. Replace or remove these files "
            f"(all other unlabelled cases are preprocessed already). To leave out such unlabelled cases with a "
            f'warning, set "skip_unreadable": true in the "semi" object of the configuration in the plans file.'
        )
    for reason in of_unlabelled:
        report(f"WARNING: left out, because it cannot be used: {reason}")


def _cases_without_raw_data(
    records: CaseRecords, labelled_folder: str, dataset_json: dict, report: Callable[[str], None]
) -> UnlabelledCases:
    finished = [case for case in records.cases() if records.is_done(case)]
    if not finished:
        raise UserError(
            f"There is no raw data set (environment variable nnUNet_raw) to take unlabelled cases from, and no "
            f"preprocessed unlabelled case for these plans in {records.folder}. Set nnUNet_raw, put the images into "
            f"{UNLABELLED_FOLDER} named {naming_rule(dataset_json)}; or copy the preprocessed folder here."
        )
    if os.path.isdir(labelled_folder):
        names = {os.path.splitext(name)[0] for name in os.listdir(labelled_folder)}
        check_names_are_unlabelled(finished, names, labelled_folder)
    check_not_in_splits(finished, os.path.dirname(labelled_folder))
    report(f"The raw data set is not here: using the {len(finished)} preprocessed unlabelled cases in {records.folder}")
    return UnlabelledCases(records.folder, finished)


def _raw_dataset_folder(dataset_name: str) -> str | None:
    if not nnUNet_raw.is_set():
        return None
    folder = os.path.join(nnUNet_raw, dataset_name)
    return folder if os.path.isdir(folder) else None


def _no_case_message(raw_dataset_folder: str, dataset_json: dict) -> str:
    folder = os.path.join(raw_dataset_folder, UNLABELLED_FOLDER)
    found = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    if found:
        state = f"holds only other files ({', '.join(found[:5])})"
    else:
        state = "is empty" if os.path.isdir(folder) else "does not exist"
    return (
        f"There are no unlabelled cases: {folder} {state}. Put the unlabelled images there, named "
        f"{naming_rule(dataset_json)}, without label files."
    )


def _without(cases: Mapping[str, list[str]], others: Container[str]) -> dict[str, list[str]]:
    return {case: files for case, files in cases.items() if case not in others}


def _files(cases: Mapping[str, list[str]]) -> set[str]:
    return {file for files in cases.values() for file in files}
