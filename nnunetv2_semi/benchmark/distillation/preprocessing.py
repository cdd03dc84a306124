"""Whether two plans make the same of an image: patches of one can be shown to a model of the other."""

from __future__ import annotations

from collections.abc import Mapping

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_semi.data.dataset_settings import named_channels

# Of nnU-Net, those that look at the image alone and not at intensities of the data set.
_OF_THE_IMAGE_ALONE = ("ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization")
_STATISTICS = ("mean", "std", "percentile_00_5", "percentile_99_5")


def preprocessing_facts(plans: PlansManager, configuration: ConfigurationManager,
                        dataset_json: dict) -> Mapping[str, object]:
    """What decides how an image becomes a patch and what its labels are: names for messages, and values to compare."""
    content = configuration.configuration
    name = configuration.preprocessor_name
    return {
        "channels": list(named_channels(dataset_json).values()),
        "labels": dataset_json["labels"],
        "order of regions": dataset_json.get("regions_class_order"),
        "image reader": plans.plans["image_reader_writer"],
        "order of axes": list(plans.transpose_forward),
        "spacing in mm": [round(float(step), 4) for step in configuration.spacing],
        "normalisation": list(configuration.normalization_schemes),
        "normalisation within the mask": list(configuration.use_mask_for_norm),
        "intensities for normalisation": _intensities(plans, configuration),
        "resampling": [content.get("resampling_fn_data"), content.get("resampling_fn_data_kwargs")],
        # Ours does what nnU-Net's does, for cases that lack channels too.
        "preprocessor": "DefaultPreprocessor" if name.startswith("nnUNetPreprocessorSemi") else name,
    }


def differences(teacher: Mapping[str, object], student: Mapping[str, object]) -> list[str]:
    """What differs between the `preprocessing_facts` of two models, in words."""
    return [f"{name} ({teacher[name]} of the teacher, {student[name]} of the student)" for name in teacher
            if teacher[name] != student[name]]


def _intensities(plans: PlansManager, configuration: ConfigurationManager) -> Mapping[str, Mapping[str, float]]:
    """Of the channels whose normalisation takes them from the plans; rounded, as a fingerprint draws voxels."""
    known = plans.foreground_intensity_properties_per_channel
    return {str(channel): {name: float(f"{known[str(channel)][name]:.2g}") for name in _STATISTICS}
            for channel, scheme in enumerate(configuration.normalization_schemes) if scheme not in _OF_THE_IMAGE_ALONE}
