"""nnU-Net's fingerprint of a data set in which some labelled cases lack channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

from nnunetv2_semi.data.case_channels import channels_of_case
from nnunetv2_semi.data.dataset_settings import named_channels, num_channels
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.processes.pool import results_in_parallel

_STATISTICS = ("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5")
_PERCENTILES = (0.5, 50.0, 99.5)


def fingerprint_of_present_channels(
    dataset: Mapping[str, Mapping],
    dataset_json: dict,
    reader: type[BaseReaderWriter],
    *,
    samples_per_case: int,
    num_processes: int,
    show_progress_bar: bool = True,
) -> dict[str, object]:
    """What nnU-Net's extractor writes into dataset_fingerprint.json, each channel's statistics from the cases it has.

    Cases are cropped to where any channel that they have is not zero. Where no case lacks a channel, the numbers are
    nnU-Net's. A channel without labelled foreground has the statistics None: no normalisation of nnU-Net's but that of
    CT needs any.

    Args:
        dataset: case name to its "images" and "label", as nnU-Net lists them.
        dataset_json: content of dataset.json.
        reader: nnU-Net's.
        samples_per_case: foreground voxels of each channel, drawn with replacement.
        num_processes: of the reading.
        show_progress_bar: one step per case.

    Raises:
        UserError: see `channels_of_case` and `check_statistics`.
    """
    results = dict(
        results_in_parallel(
            partial(_analyse, reader=reader, samples_per_case=samples_per_case, dataset_json=dataset_json),
            [(case, tuple(entry["images"]), entry["label"]) for case, entry in dataset.items()],
            num_processes=num_processes,
            description="Extracting dataset fingerprint",
            show_progress_bar=show_progress_bar,
        )
    )
    # in the order of the cases, not of completion
    cases = [results[case, tuple(entry["images"]), entry["label"]] for case, entry in dataset.items()]
    intensities = [
        [case["intensities"][channel] for case in cases if len(case["intensities"].get(channel, ()))]
        for channel in range(num_channels(dataset_json))
    ]
    check_statistics([channel for channel, samples in enumerate(intensities) if samples], dataset_json)
    return {
        "spacings": [case["spacing"] for case in cases],
        "shapes_after_crop": [case["shape"] for case in cases],
        "foreground_intensity_properties_per_channel": {
            str(channel): _statistics(np.concatenate(samples)) if samples else dict.fromkeys(_STATISTICS)
            for channel, samples in enumerate(intensities)
        },
        "median_relative_size_after_cropping": float(np.median([case["relative_size"] for case in cases])),
    }


def check_statistics(channels: Iterable[int], dataset_json: dict) -> None:
    """Refuse a data set in which the intensity statistics of a CT channel are wanted, and no labelled case has it.

    Args:
        channels: that labelled cases have.
        dataset_json: content of dataset.json.

    Raises:
        UserError: names the channels.
    """
    found = set(channels)
    without = [
        f"{index} ({name})"
        for index, name in named_channels(dataset_json).items()
        if int(index) not in found and issubclass(get_normalization_scheme(name), CTNormalization)
    ]
    if without:
        raise UserError(
            f"No labelled case has foreground in channel {', '.join(without)}, whose normalisation needs its "
            f"intensities there. Label a case that has it; or give the channel another name than CT in dataset.json, "
            f"which z-scores each image by itself."
        )


def _analyse(
    task: tuple[str, tuple[str, ...], str], reader: type[BaseReaderWriter], samples_per_case: int, dataset_json: dict
) -> dict:
    """Shape and spacing of one case, and foreground intensities by channel."""
    _, images, label = task
    shape, spacing, intensities, _, relative_size = DatasetFingerprintExtractor.analyze_case(
        list(images), label, reader, samples_per_case
    )
    channels = channels_of_case(images, len(intensities), dataset_json)
    return {
        "shape": [int(size) for size in shape],
        "spacing": [float(size) for size in spacing],
        "intensities": dict(zip(channels, intensities, strict=True)),
        "relative_size": float(relative_size),
    }


def _statistics(intensities: np.ndarray) -> dict[str, float]:
    lowest, median, highest = np.percentile(intensities, _PERCENTILES)
    values = (
        np.mean(intensities), median, np.std(intensities), np.min(intensities), np.max(intensities), highest, lowest
    )
    return {name: float(value) for name, value in zip(_STATISTICS, values, strict=True)}
