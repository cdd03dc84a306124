"""What is asked of labelled cases before anything is trained on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_semi.data.file_contents import FileContent, geometry_difference
from nnunetv2_semi.data.label_files import Labels, check_label_files, read_labels
from nnunetv2_semi.data.labelled_comparison import (
    Comparison,
    compare_with_raw,
    labelled_folder,
    names_preprocessed,
    read_labelled,
)
from nnunetv2_semi.data.one_at_a_time import one_at_a_time
from nnunetv2_semi.data.raw_cases import list_labelled_cases
from nnunetv2_semi.data.raw_checks import check_labelled_case_names
from nnunetv2_semi.data.splits_file import splits_path
from nnunetv2_semi.errors import UserError, shown


def check_labelled_cases(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    dataset_json: dict,
    *,
    num_processes: int,
    report: Callable[[str], None] = print,
    show_progress_bar: bool = True,
) -> None:
    """Refuse to train on preprocessed labelled cases that are not those of the raw data set, or no images or labels.

    Without raw data (a cluster node) there is nothing to compare with. Processes that are started together do it one
    after another.

    Args:
        plans_manager: names the data set.
        configuration_manager: of the training.
        dataset_json: content of dataset.json.
        num_processes: of the reading; 1 works in the calling process.
        report: receives one line per fact worth knowing.
        show_progress_bar: of reading and comparing.

    Raises:
        UserError: no preprocessed case; cases that differ; labels or channels on another grid; the mistakes
            listed in `check_labelled_case_names`; see `check_label_files`.
    """
    check_preprocessed(plans_manager, configuration_manager)
    folder = labelled_folder(plans_manager, configuration_manager)
    command = preprocessing_command(plans_manager, configuration_manager)
    if not nnUNet_raw.is_set() or not os.path.isdir(os.path.join(nnUNet_raw, plans_manager.dataset_name)):
        return
    raw_dataset_folder = os.path.join(nnUNet_raw, plans_manager.dataset_name)
    check_labelled_case_names(raw_dataset_folder, os.path.dirname(folder), dataset_json)
    with one_at_a_time(os.path.dirname(folder), report):
        images, labels = read_labelled(
            plans_manager, dataset_json, num_processes=num_processes, report=report,
            show_progress_bar=show_progress_bar,
        )  # fmt: skip
        check_label_files(labels, dataset_json)
        _check_grids(list_labelled_cases(raw_dataset_folder, dataset_json), images, labels)
        found = compare_with_raw(
            plans_manager, configuration_manager, dataset_json, images=images, labels=labels,
            num_processes=num_processes, report=report, show_progress_bar=show_progress_bar,
        )  # fmt: skip
    if not found.agrees:
        raise UserError(disagreement_message(found, raw_dataset_folder, folder, command))
    if found.unusable:
        no_images = [f"{case} ({reason})" for case, reason in found.unusable.items()]
        raise UserError(
            f"{len(no_images)} labelled case(s) in {folder} are no images: {shown(no_images)}. Replace their files in "
            f"{raw_dataset_folder}, or remove the cases; then run: {command}"
        )


def check_preprocessed(plans_manager: PlansManager, configuration_manager: ConfigurationManager) -> None:
    """Refuse a configuration without preprocessed labelled cases. Raises UserError with the command that makes them."""
    folder = labelled_folder(plans_manager, configuration_manager)
    if not names_preprocessed(folder):
        raise UserError(f"There is no preprocessed labelled case in {folder}. Run: "
                        f"{preprocessing_command(plans_manager, configuration_manager)}")


def check_labels_before_preprocessing(
    plans_manager: PlansManager, dataset_json: dict, *, num_processes: int, show_progress_bar: bool = True
) -> None:
    """`check_label_files` of all labelled cases of the raw data set."""
    raw_dataset_folder = os.path.join(nnUNet_raw, plans_manager.dataset_name)
    labels = read_labels(plans_manager, dataset_json, raw_dataset_folder, num_processes, show_progress_bar, print)
    check_label_files(labels, dataset_json)


def _check_grids(cases: Mapping[str, list[str]], images: Mapping[str, FileContent], labels: Labels) -> None:
    contents = {**images, **labels.contents}
    differing = [f"{case} ({difference})" for case, files in cases.items()
                 if (difference := geometry_difference([*files, labels.files[case]], contents))]
    if differing:
        raise UserError(
            f"{len(differing)} labelled case(s) have channels or labels that lie elsewhere than their first channel: "
            f"{shown(differing)}. Resample them to one grid per case; or, if the voxels do fit, copy the header of the "
            f"first channel. Then preprocess the data set again."
        )


def disagreement_message(found: Comparison, raw_dataset_folder: str, folder: str, command: str) -> str:
    """Which cases differ, and how to mend it."""
    findings = found.findings()
    splits = splits_path(os.path.dirname(folder))
    mistakes = []
    if os.path.isfile(splits):
        text = _text(splits)
        if named := [case for case in found.gone if f'"{case}"' in text]:
            mistakes.append(f"names {shown(named)}: remove these cases there")
        if unnamed := [case for case in found.new if f'"{case}"' not in text]:
            mistakes.append(f"does not name {shown(unnamed)}: add these cases there")
    in_splits = "".join(
        f" {splits} {mistake}, or remove the file, of which nnU-Net then makes a new one (models trained before have "
        f"other folds)." for mistake in mistakes
    )
    return (
        f"{len(findings)} labelled case(s) in {folder} are not as in {raw_dataset_folder}: {shown(findings)}."
        f"{in_splits} To train on what the raw data set holds now, preprocess it again, which replaces that folder: "
        f"{command}"
    )


def preprocessing_command(plans_manager: PlansManager, configuration_manager: ConfigurationManager) -> str:
    """nnU-Net's command that makes the folder of the configuration anew."""
    own = configuration_manager.data_identifier
    names = [name for name in plans_manager.available_configurations
             if plans_manager.get_configuration(name).data_identifier == own]
    number = plans_manager.dataset_name.removeprefix("Dataset")[:3].lstrip("0") or "0"
    return f"nnUNetv2_preprocess -d {number} -plans_name {plans_manager.plans_name} -c {names[0] if names else own}"


def _text(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()
