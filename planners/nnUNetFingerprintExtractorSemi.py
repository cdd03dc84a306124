"""Fingerprint extractor that tells where images without a label belong."""

from __future__ import annotations

import os

from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunetv2_semi.data.raw_cases import check_labelled_images_have_labels
from nnunetv2_semi.data.whole_files import read_json_object
from nnunetv2_semi.errors import UserError


class nnUNetFingerprintExtractorSemi(DatasetFingerprintExtractor):
    """nnU-Net's fingerprint of the labelled cases, after a check that all images in imagesTr have a label.

    Args:
        dataset_name_or_id: as for nnU-Net's extractor.
        num_processes: of the extraction.
        verbose: as for nnU-Net's extractor.

    Raises:
        UserError: names the images without a label, and says where to move them.
    """

    def __init__(self, dataset_name_or_id: str | int, num_processes: int = 8, verbose: bool = False) -> None:
        raw_dataset_folder = os.path.join(nnUNet_raw, maybe_convert_to_dataset_name(dataset_name_or_id))
        dataset_json = read_json_object(os.path.join(raw_dataset_folder, "dataset.json"))
        if dataset_json is None:
            raise UserError(f"{raw_dataset_folder}/dataset.json is missing or is not a JSON object.")
        check_labelled_images_have_labels(raw_dataset_folder, dataset_json)
        super().__init__(dataset_name_or_id, num_processes, verbose)
