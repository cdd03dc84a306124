"""The planners as the source tree has them; nnU-Net itself finds them only once they are installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

PROJECT = Path(__file__).resolve().parents[2]
if str(PROJECT) not in sys.path:
    sys.path.insert(0, str(PROJECT))

DATASET = "Dataset002_Planned"
CHANNELS = {"0": "T1", "1": "T2"}
BUILT: dict[str, nn.Module] = {}


def network_of(*architecture: object, **options: object) -> nn.Module:
    """`get_network_from_plans` for planners, which ask how large feature maps are: no weights, and each built once."""
    key = repr((architecture, options))
    if key not in BUILT:
        with torch.device("meta"):
            BUILT[key] = get_network_from_plans(*architecture, **options)  # type: ignore[arg-type]
    return BUILT[key]


@pytest.fixture(autouse=True)
def planning_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks as above, and threads for nnU-Net's list of files, for which every planner starts twelve processes."""
    monkeypatch.setattr(default_experiment_planner, "get_network_from_plans", network_of)
    monkeypatch.setattr("planners.nnUNetPlannerSemi.get_network_from_plans", network_of)
    monkeypatch.setattr("nnunetv2.utilities.utils.Pool", ThreadPool)


def write_tiny_case(folder: Path, images: str, case: str, shape: tuple[int, ...], seed: int, spacing=(1.0, 1.0, 1.0)):
    rng = np.random.default_rng(seed)
    for channel in range(2):
        voxels = rng.normal(100, 20, shape).astype(np.float32)
        voxels[:2] = 0  # cropped
        image = sitk.GetImageFromArray(voxels)
        image.SetSpacing(spacing)
        (folder / images).mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(folder / images / f"{case}_{channel:04d}.nii.gz"))
    if images == "imagesTr":
        label = np.zeros(shape, dtype=np.uint8)
        label[5:10, 6:12, 6:12] = 1
        image = sitk.GetImageFromArray(label)
        image.SetSpacing(spacing)
        (folder / "labelsTr").mkdir(exist_ok=True)
        sitk.WriteImage(image, str(folder / "labelsTr" / f"{case}.nii.gz"))


@pytest.fixture
def write_case() -> Callable[..., None]:
    return write_tiny_case


@pytest.fixture
def raw_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes raw data set 2 with a fingerprint of the given size, and returns its raw folder."""

    def make(shape=(160, 180, 170), spacing=(1.0, 1.0, 1.0), semi: dict | None = None) -> Path:
        for name in ("raw", "preprocessed", "results"):
            monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
        folder = tmp_path / "raw" / DATASET
        for index in range(2):
            write_tiny_case(folder, "imagesTr", f"lab_{index}", (24, 28, 20), index)
        dataset_json = {
            "channel_names": CHANNELS,
            "labels": {"background": 0, "organ": 1},
            "numTraining": 2,
            "file_ending": ".nii.gz",
        }
        if semi is not None:
            dataset_json["semi"] = semi
        (folder / "dataset.json").write_text(json.dumps(dataset_json))
        intensities = {"max": 180.0, "mean": 100.0, "median": 100.0, "min": 20.0}
        intensities |= {"percentile_00_5": 50.0, "percentile_99_5": 150.0, "std": 20.0}
        fingerprint = {
            "spacings": [list(spacing)] * 2,
            "shapes_after_crop": [list(shape)] * 2,
            "foreground_intensity_properties_per_channel": {"0": intensities, "1": intensities},
            "median_relative_size_after_cropping": 1.0,
        }
        preprocessed = tmp_path / "preprocessed" / DATASET
        preprocessed.mkdir(parents=True, exist_ok=True)
        (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
        return folder

    return make
