"""A raw data set of a few tiny cases, with plans that need no planning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

PROJECT = Path(__file__).resolve().parents[2]
DATASET = "Dataset001_Tiny"
SHAPE = (20, 28, 24)
FILE_ENDING = ".nii.gz"


def write_image(path: Path, voxels: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> None:
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def random_image(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Noise within a box, zero outside it, so that there is something to crop and to mask."""
    rng = np.random.default_rng(seed)
    voxels = np.zeros(shape, dtype=np.float32)
    inner = tuple(slice(2, size - 2) for size in shape)
    voxels[inner] = rng.normal(100, 20, voxels[inner].shape)
    return voxels


@dataclass
class TinyDataset:
    """Folders and plans of the data set; `dataset_json` is what dataset.json holds."""

    raw: Path
    preprocessed: Path
    dataset_json: dict = field(default_factory=dict)
    plans: dict = field(default_factory=dict)

    @property
    def raw_folder(self) -> Path:
        return self.raw / DATASET

    @property
    def preprocessed_folder(self) -> Path:
        return self.preprocessed / DATASET

    @property
    def unlabelled_folder(self) -> Path:
        return self.preprocessed_folder / "Plans_3d_fullres_unlabeled"

    def add_unlabelled(self, case: str, seed: int) -> None:
        for channel in range(2):
            path = self.raw_folder / "imagesUn" / f"{case}_{channel:04d}{FILE_ENDING}"
            write_image(path, random_image(seed * 10 + channel))

    def add_labelled(self, case: str, seed: int) -> None:
        for channel in range(2):
            path = self.raw_folder / "imagesTr" / f"{case}_{channel:04d}{FILE_ENDING}"
            write_image(path, random_image(seed * 10 + channel))
        label = np.zeros(SHAPE, dtype=np.uint8)
        label[6:12, 8:16, 8:16] = 1
        write_image(self.raw_folder / "labelsTr" / f"{case}{FILE_ENDING}", label)

    def managers(self, configuration: str = "3d_fullres") -> tuple:
        manager = PlansManager(json.loads(json.dumps(self.plans)))
        return manager, manager.get_configuration(configuration)

    def save(self) -> None:
        """Write dataset.json and the plans where nnU-Net looks for them."""
        for folder in (self.raw_folder, self.preprocessed_folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "dataset.json").write_text(json.dumps(self.dataset_json))
        (self.preprocessed_folder / "Plans.json").write_text(json.dumps(self.plans))


def tiny_plans() -> dict:
    intensities = {"max": 180.0, "mean": 100.0, "median": 100.0, "min": 20.0}
    intensities |= {"percentile_00_5": 50.0, "percentile_99_5": 150.0, "std": 20.0}
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    shared = {
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "normalization_schemes": ["ZScoreNormalization"] * 2,
        "use_mask_for_norm": [False, False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": resampling | {"is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resampling | {"order": 1},
        "architecture": {"network_class_name": "unused", "arch_kwargs": {}, "_kw_requires_import": []},
        "batch_dice": False,
    }
    volume = {"data_identifier": "Plans_3d_fullres", "patch_size": [16, 16, 16], "spacing": [1.0, 1.0, 1.0]}
    slices = {"data_identifier": "Plans_2d", "patch_size": [16, 16], "spacing": [1.0, 1.0]}
    return {
        "dataset_name": DATASET,
        "plans_name": "Plans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensities, "1": intensities},
        "configurations": {"3d_fullres": shared | volume, "2d": shared | slices},
    }


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyDataset:
    """Two labelled and three unlabelled cases, not preprocessed."""
    dataset = TinyDataset(tmp_path / "raw", tmp_path / "preprocessed")
    monkeypatch.setenv("nnUNet_raw", str(dataset.raw))
    monkeypatch.setenv("nnUNet_preprocessed", str(dataset.preprocessed))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    dataset.dataset_json = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "organ": 1},
        "numTraining": 2,
        "file_ending": FILE_ENDING,
    }
    dataset.plans = tiny_plans()
    for index, case in enumerate(("lab_a", "lab_b")):
        dataset.add_labelled(case, 1 + index)
    for index, case in enumerate(("un_a", "un_b", "un_c")):
        dataset.add_unlabelled(case, 11 + index)
    dataset.save()
    return dataset


def process_children(pid: int) -> list[int]:
    """Process ids of the direct children of `pid`."""
    children = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == pid:
                children.append(int(entry.name))
    return children


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


@dataclass
class Processes:
    """Starts python scripts that are killed with all their children when the test ends."""

    folder: Path
    started: list[subprocess.Popen] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    children: Callable[[int], list[int]] = staticmethod(process_children)
    is_running: Callable[[int], bool] = staticmethod(is_running)
    wait_until: Callable[[Callable[[], bool], float], bool] = staticmethod(wait_until)

    def start(self, source: str, name: str = "script.py") -> subprocess.Popen:
        script = self.folder / name
        script.write_text(source)
        environment = dict(os.environ, PYTHONPATH=str(PROJECT), OMP_NUM_THREADS="1")
        process = subprocess.Popen(
            [sys.executable, str(script)],
            env=environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    if not Path("/proc/self/stat").exists():
        pytest.skip("child processes are listed through /proc")
    helper = Processes(tmp_path)
    yield helper
    for process in helper.started:
        helper.seen.update(process_children(process.pid))
        process.kill()
        process.communicate()
    for pid in helper.seen:
        if is_running(pid):
            os.kill(pid, 9)
