"""Fingerprint extractor for data sets with unlabelled cases, and with labelled cases that lack channels."""

from __future__ import annotations

import os

from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunetv2_semi.data.atomic_files import write_json_whole
from nnunetv2_semi.data.case_channels import channels_by_name, lacking_channels
from nnunetv2_semi.data.dataset_json import read_dataset_json
from nnunetv2_semi.data.raw_checks import check_case_names
from nnunetv2_semi.planning.fingerprint import check_statistics, fingerprint_of_present_channels


class nnUNetFingerprintExtractorSemi(DatasetFingerprintExtractor):
    """nnU-Net's fingerprint of the labelled cases, after a check of dataset.json and of the names of all files.

    Where cases lack channels, which nnU-Net's own extractor cannot read, each channel's intensity statistics are those
    of the cases that have it.

    Args:
        dataset_name_or_id: as for nnU-Net's extractor.
        num_processes: of the extraction.
        verbose: as for nnU-Net's extractor.

    Raises:
        UserError: mistakes in dataset.json, or images or names of cases that cannot be used (see `check_case_names`).
    """

    def __init__(self, dataset_name_or_id: str | int, num_processes: int = 8, verbose: bool = False) -> None:
        raw_dataset_folder = os.path.join(nnUNet_raw, maybe_convert_to_dataset_name(dataset_name_or_id))
        dataset_json = read_dataset_json(os.path.join(raw_dataset_folder, "dataset.json"))
        preprocessed_dataset_folder = os.path.join(nnUNet_preprocessed, os.path.basename(raw_dataset_folder))
        check_case_names(raw_dataset_folder, preprocessed_dataset_folder, dataset_json)
        super().__init__(dataset_name_or_id, num_processes, verbose)

    def run(self, overwrite_existing: bool = False) -> dict:
        """Write dataset_fingerprint.json into the data set's folder of preprocessed data, and return its content.

        Args:
            overwrite_existing: extract it again where the file is there.

        Raises:
            UserError: surplus channels, files whose channel cannot be told, or a CT channel that no labelled case has.
        """
        file = os.path.join(nnUNet_preprocessed, self.dataset_name, "dataset_fingerprint.json")
        if os.path.isfile(file) and not overwrite_existing:
            return super().run(overwrite_existing)
        cases = {str(case): entry["images"] for case, entry in self.dataset.items()}
        example = next((images[0] for images in cases.values() if images), None)
        reader = determine_reader_writer_from_dataset_json(self.dataset_json, example, verbose=False)
        channels = channels_by_name(cases, self.dataset_json, reader)
        if not lacking_channels(channels, self.dataset_json):
            return super().run(overwrite_existing)
        check_statistics({channel for present in channels.values() for channel in present}, self.dataset_json)
        fingerprint = fingerprint_of_present_channels(
            {str(case): entry for case, entry in self.dataset.items()},
            self.dataset_json,
            reader,
            samples_per_case=int(self.num_foreground_voxels_for_intensitystats // len(self.dataset)),
            num_processes=self.num_processes,
            show_progress_bar=self.show_progress_bar,
        )
        write_json_whole(file, fingerprint)
        return fingerprint
