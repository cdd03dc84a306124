"""The JSON beside exported networks: all that inference needs besides them, and no PyTorch or nnU-Net to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_semi.data.dataset_settings import named_channels
from nnunetv2_semi.onnx_export.graph import INPUT, OUTPUT
from nnunetv2_semi.present_channels import FILL

FILE = "inference.json"
FORMAT = 1
# nnU-Net's predictor has these as defaults, and no plans file changes them.
_FILLING = ("nnUNetPreprocessorSemi",)  # preprocessors for cases that lack channels
STEP_SIZE, SIGMA, LARGEST_WEIGHT = 0.5, 1 / 8, 10


def description(plans_manager: PlansManager, configuration_manager: ConfigurationManager, dataset_json: dict,
                channels: Sequence[int], mirroring_axes: Sequence[int] | None, files: Mapping[str, str],
                made_from: Mapping[str, object]) -> dict[str, object]:
    """Content of ``inference.json``; docs/onnx.md explains each entry.

    Args:
        plans_manager: of the model.
        configuration_manager: of its configuration.
        dataset_json: of the model.
        channels: of the whole image that the network takes, in order.
        mirroring_axes: spatial axes of a patch, from 0, over whose mirrorings nnU-Net averages; None: none.
        files: fold -> ONNX file.
        made_from: where the networks come from, for the record.
    """
    labels = plans_manager.get_label_manager(dataset_json)
    intensities = plans_manager.foreground_intensity_properties_per_channel
    names = named_channels(dataset_json)
    plan = configuration_manager.configuration
    content = {
        "format": FORMAT,
        "networks": dict(files),
        "input": INPUT,
        "output": OUTPUT,
        "patch_size": configuration_manager.patch_size,
        "channels": [{
            "name": names[str(channel)],
            "normalization": configuration_manager.normalization_schemes[channel],
            "use_mask_for_norm": configuration_manager.use_mask_for_norm[channel],
            "intensities": intensities.get(str(channel), {}),
        } for channel in channels],
        "absent_channel_value": FILL if len(channels) > 1 and plan["preprocessor_name"] in _FILLING else None,
        "labels": dataset_json["labels"],
        "regions_class_order": dataset_json.get("regions_class_order") if labels.has_regions else None,
        "outputs": labels.foreground_regions if labels.has_regions else labels.all_labels,
        "file_ending": dataset_json["file_ending"],
        "image_reader_writer": plans_manager.plans["image_reader_writer"],
        "preprocessor": plan["preprocessor_name"],
        "transpose_forward": plans_manager.transpose_forward,
        "transpose_backward": plans_manager.transpose_backward,
        "spacing": configuration_manager.spacing,
        "resampling": {
            "image": {"function": plan["resampling_fn_data"], **plan["resampling_fn_data_kwargs"]},
            "logits": {"function": plan["resampling_fn_probabilities"], **plan["resampling_fn_probabilities_kwargs"]},
            "anisotropy_threshold": ANISO_THRESHOLD,
        },
        "sliding_window": {"step_size": STEP_SIZE, "gaussian_sigma": SIGMA, "gaussian_maximum": LARGEST_WEIGHT},
        "mirroring_axes": list(mirroring_axes or ()),
        "made_from": dict(made_from),
    }
    return {key: _plain(value) for key, value in content.items()}


def _plain(value: object) -> object:
    """``value`` as JSON has it: no tuples, no numpy numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
