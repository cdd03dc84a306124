"""nnU-Net's preprocessor for cases that lack channels."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_semi.data.case_channels import PRESENT_CHANNELS, channels_of_case, lacking_warning
from nnunetv2_semi.data.dataset_settings import num_channels
from nnunetv2_semi.data.file_integrity import check_file_complete
from nnunetv2_semi.errors import UserError, one_line
from nnunetv2_semi.present_channels import FILL

_REMEDY = (
    "Replace or remove it, and start again (prediction with --continue_prediction, which keeps what is done). "
    "`nnunetv2_semi predict`, with the arguments of nnUNetv2_predict, leaves such cases out and predicts the others."
)

Case = tuple[np.ndarray, np.ndarray, dict]


class FillingPreprocessor(DefaultPreprocessor):
    """nnU-Net's default preprocessor, that fills the channels a case lacks and records which are there.

    The channels that are there come out as if the data set had no others: cropped, normalised (each with the scheme,
    mask and intensity statistics of its own channel) and resampled by nnU-Net. The others hold `FILL` everywhere, and
    `properties["present_channels"]` lists those that are there, in ascending order. Cases that lack nothing have no
    such key and are what nnU-Net makes of them, except that minus zero, the mark of an absent channel, becomes zero.
    """

    _names_absent = True

    def run_case_save(self, *arguments: object) -> None:
        """nnU-Net's, of training cases: which of these lack channels is said once of all."""
        self._names_absent = False
        super().run_case_save(*arguments)  # type: ignore[arg-type]

    def run_case(
        self,
        image_files: list[str],
        seg_file: str | None,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        dataset_json: dict | str,
    ) -> Case:
        """Read and preprocess one case, for training or prediction; there, what it lacks is printed.

        Args:
            image_files: one per channel that is there, the channel's number in the name; or one with all channels.
            seg_file: label; None where there is none.
            plans_manager: of the data set.
            configuration_manager: of the configuration.
            dataset_json: content or path of dataset.json.

        Returns:
            Image (C, *spatial) with all channels of the data set, segmentation (1, *spatial), and properties.

        Raises:
            UserError: a file that is damaged, which readers fill up with zeros, or holds no numbers; see also
                `nnunetv2_semi.data.case_channels.channels_of_case`.
        """
        content: dict = load_json(dataset_json) if isinstance(dataset_json, str) else dataset_json
        for file in (*image_files, *([seg_file] if seg_file is not None else [])):
            _refuse_damaged(file)
        if not image_files:
            channels_of_case(image_files, 0, content)  # raises: readers want a file
        reader = plans_manager.image_reader_writer_class()
        data, properties = reader.read_images(image_files)
        seg = None if seg_file is None else reader.read_seg(seg_file)[0]
        if not np.isfinite(data).all():
            raise UserError(
                f"{', '.join(image_files)}: there are voxels that are not finite numbers (NaN or infinity). {_REMEDY}"
            )
        present = channels_of_case(image_files, len(data), content)
        if len(present) < num_channels(content):
            if self._names_absent and seg_file is None:
                print(lacking_warning({os.path.basename(image_files[0]): present}, content, "predicted"))
            data = data[np.argsort(present)]
            properties[PRESENT_CHANNELS] = sorted(present)
        return self.run_case_npy(data, seg, properties, plans_manager, configuration_manager, content)

    def run_case_npy(
        self,
        data: np.ndarray,
        seg: np.ndarray | None,
        properties: dict,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        dataset_json: dict,
    ) -> Case:
        """Preprocess one case.

        Args:
            data: (channels that are there, *spatial): all, or those in `properties["present_channels"]`, in order.
            seg: (1, *spatial); None where there is none.
            properties: of the case, as nnU-Net's readers give them.
            plans_manager: of the data set.
            configuration_manager: of the configuration.
            dataset_json: content of dataset.json.

        Returns:
            As `run_case`.

        Raises:
            UserError: the number of channels in `data` is not what the data set or `properties` says.
        """
        total = num_channels(dataset_json)
        present = properties.get(PRESENT_CHANNELS, list(range(total)))
        if len(data) != len(present):
            raise UserError(
                f"An image of {len(data)} channel(s) was given where {len(present)} were expected. A case that lacks "
                f'some of the {total} channels needs properties["{PRESENT_CHANNELS}"], the list of those it has.'
            )
        if len(present) < total:
            plans_manager = _plans_of_channels(plans_manager, present)
            configuration_manager = _configuration_of_channels(configuration_manager, present)
        data, seg, properties = super().run_case_npy(
            data, seg, properties, plans_manager, configuration_manager, dataset_json
        )
        data += 0.0  # minus zero becomes zero
        if len(present) < total:
            filled = np.full((total, *data.shape[1:]), FILL, dtype=data.dtype)
            filled[present] = data
            data = filled
        return data, seg, properties


def _refuse_damaged(file: str) -> None:
    try:
        check_file_complete(file)
    except Exception as error:  # whatever the libraries raise that decompress and read
        raise UserError(f"{file} is damaged: {one_line(error)}. {_REMEDY}") from error


def _plans_of_channels(plans_manager: PlansManager, channels: Sequence[int]) -> PlansManager:
    """Plans in which channel i is the i-th of `channels`."""
    intensities = plans_manager.foreground_intensity_properties_per_channel
    chosen = {str(position): intensities[str(channel)] for position, channel in enumerate(channels)}
    return PlansManager({**plans_manager.plans, "foreground_intensity_properties_per_channel": chosen})


def _configuration_of_channels(
    configuration_manager: ConfigurationManager, channels: Sequence[int]
) -> ConfigurationManager:
    """A configuration in which channel i is the i-th of `channels`."""
    lists = {
        key: [configuration_manager.configuration[key][channel] for channel in channels]
        for key in ("normalization_schemes", "use_mask_for_norm")
    }
    return ConfigurationManager({**configuration_manager.configuration, **lists})
