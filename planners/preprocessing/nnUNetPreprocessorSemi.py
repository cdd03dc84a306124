"""Preprocessor that prepares unlabelled cases along with the labelled ones, and cases that lack channels."""

from __future__ import annotations

import os

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_semi.data.case_channels import channels_by_name, lacking_warning
from nnunetv2_semi.data.dataset_json import read_dataset_json
from nnunetv2_semi.data.filling_preprocessor import FillingPreprocessor
from nnunetv2_semi.data.labelled_checks import check_labels_before_preprocessing
from nnunetv2_semi.data.preprocessing import prepare_unlabelled
from nnunetv2_semi.data.raw_cases import list_labelled_cases
from nnunetv2_semi.data.raw_checks import check_case_names
from nnunetv2_semi.errors import UserError


class nnUNetPreprocessorSemi(FillingPreprocessor):
    """nnU-Net's default preprocessor; labelled cases that lack no channel come out the same, byte for byte.

    `run` then prepares the cases in imagesUn, if there are any, as the trainers would do on first use.
    """

    def run(
        self, dataset_name_or_id: int | str, configuration_name: str, plans_identifier: str, num_processes: int
    ) -> None:
        """Preprocess all labelled cases, and those unlabelled cases that are new or changed.

        Args:
            dataset_name_or_id: of a data set in nnUNet_raw that has been planned.
            configuration_name: of the plans.
            plans_identifier: name of the plans file.
            num_processes: of either part.

        Raises:
            UserError: labelled cases with surplus channels, or files whose channel cannot be told; labels that hold
                other values than dataset.json says; and see `nnunetv2_semi.data.preprocessing.prepare_unlabelled`.
        """
        dataset_name = maybe_convert_to_dataset_name(dataset_name_or_id)
        raw_dataset_folder = os.path.join(nnUNet_raw, dataset_name)
        preprocessed_dataset_folder = os.path.join(nnUNet_preprocessed, dataset_name)
        dataset_json_file = os.path.join(preprocessed_dataset_folder, "dataset.json")
        if not os.path.isfile(dataset_json_file):
            raise UserError(f"{dataset_json_file} is missing. Plan the data set first (nnUNetv2_plan_experiment).")
        dataset_json = read_dataset_json(dataset_json_file)
        plans_manager = PlansManager(os.path.join(preprocessed_dataset_folder, plans_identifier + ".json"))
        # cheap checks first: labelled cases may take hours
        unlabelled = check_case_names(raw_dataset_folder, preprocessed_dataset_folder, dataset_json)
        labelled = list_labelled_cases(raw_dataset_folder, dataset_json)
        channels = channels_by_name(labelled, dataset_json, plans_manager.image_reader_writer_class)
        if warning := lacking_warning(channels, dataset_json, "labelled"):
            print(warning)
        check_labels_before_preprocessing(
            plans_manager, dataset_json, num_processes=num_processes, show_progress_bar=self.show_progress_bar
        )
        super().run(dataset_name_or_id, configuration_name, plans_identifier, num_processes)
        if not unlabelled:
            return
        configuration_manager = plans_manager.get_configuration(configuration_name)
        prepare_unlabelled(
            plans_manager,
            configuration_manager,
            dataset_json,
            num_processes=num_processes,
            skip_unreadable=bool(configuration_manager.configuration.get("semi", {}).get("skip_unreadable", False)),
            show_progress_bar=self.show_progress_bar,
            preprocessor_class=type(self),
        )
