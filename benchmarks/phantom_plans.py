"""A phantom data set in temporary folders, its plans, and trainers on them, as the benchmarks need them."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, preprocess_dataset
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semi.data.phantom import make_phantom_dataset
from nnunetv2_semi.methods.base import Method
from nnunetv2_semi.methods.contract import WholeCase
from nnunetv2_semi.trainer import nnUNetTrainerSemi

CONFIGURATION = "3d_fullres"
_DATASET_ID = 1


@dataclass(frozen=True)
class Phantom:
    """A raw data set with nnU-Net's fingerprint; ``dataset_json`` is what its dataset.json holds.

    configuration: the one that trainers train.
    """

    raw: Path
    preprocessed: Path
    dataset_json: dict
    configuration: str = CONFIGURATION

    def plan(self, planner_class: type[ExperimentPlanner], gpu_memory_gb: float = 8.0,
             base_features: int | None = None, image_shape: tuple[int, ...] | None = None) -> dict:
        """The plans. base_features: of the first stage, the limit of the deepest in proportion; None for the planner's.

        image_shape: voxels per axis to plan for in place of the phantom's own.
        """
        # nnU-Net's planner takes this number of loader processes for its number of threads, and fails with 0
        with _quiet(), mock.patch.dict(os.environ, {"nnUNet_n_proc_DA": "1"}):
            planner = planner_class(_DATASET_ID, gpu_memory_target_in_gb=gpu_memory_gb)
            if base_features is not None:
                scale = base_features / planner.UNet_base_num_features
                planner.UNet_base_num_features = base_features
                planner.UNet_max_features_3d = int(planner.UNet_max_features_3d * scale)
            if image_shape is not None:
                fingerprint = planner.dataset_fingerprint
                fingerprint["shapes_after_crop"] = [list(image_shape)] * len(fingerprint["shapes_after_crop"])
            planner.plan_experiment()
        file = self.preprocessed / f"{planner.plans_identifier}.json"
        plans = json.loads(file.read_text())
        # nnU-Net finds our preprocessor only where the plug-in is installed; labelled cases come out the same
        plans["configurations"][self.configuration]["preprocessor_name"] = "DefaultPreprocessor"
        file.write_text(json.dumps(plans))
        return plans

    def preprocess(self, plans: dict) -> None:
        """Preprocess the labelled cases for ``plans`` (those of the last ``plan``)."""
        with _quiet(), _threads_for_processes():
            preprocess_dataset(_DATASET_ID, plans["plans_name"], [self.configuration], num_processes=[1])

    def trainer(self, method: type[Method] | None, plans: dict, semi: Mapping[str, object] | None = None,
                device: str = "cpu") -> nnUNetTrainer:
        """nnU-Net's own trainer (``method`` None) or ours, not initialized; ``semi`` extends the plans' object."""
        plans = {**deepcopy(plans), "continue_training": False}
        configuration = plans["configurations"][self.configuration]
        configuration["semi"] = {**configuration.get("semi", {}), **(semi or {})}
        trainer_class = nnUNetTrainer if method is None else type(method.__name__ + "Trainer", (nnUNetTrainerSemi,),
                                                                  {"method_class": method})
        with _quiet():
            return trainer_class(plans, self.configuration, 0, self.dataset_json, torch.device(device))

    def loaders(self, method: type[Method], plans: dict) -> dict[str, nnUNetDataLoader]:
        """The loaders of training batches that our trainer of ``method`` uses."""
        trainer = self.trainer(method, plans)
        with _quiet():
            trainer.initialize()
            training, validation = trainer.get_dataloaders()
        validation.close()
        training.close()
        return training.batches.loaders


@contextmanager
def _quiet() -> Iterator[None]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def _threads_for_processes() -> AbstractContextManager:
    """Within the block nnU-Net's worker processes are threads: for a few tiny cases starting processes takes longer."""
    return mock.patch("multiprocessing.get_context", lambda method=None: SimpleNamespace(Pool=ThreadPool))


@contextmanager
def phantom(labelled: int, unlabelled: int, shape: tuple[int, ...], seed: int,
            plan_joined_passes: bool = False, configuration: str = CONFIGURATION) -> Iterator[Phantom]:
    """Make a two-modality phantom with its fingerprint; nnU-Net's folders point to it within the block.

    plan_joined_passes: as in the object "semi" of dataset.json. configuration: as in `Phantom`.
    """
    with tempfile.TemporaryDirectory(prefix="nnunetv2_semi_benchmark_") as folder:
        folders = {f"nnUNet_{name}": str(Path(folder) / name) for name in ("raw", "preprocessed", "results")}
        with mock.patch.dict(os.environ, {**folders, "nnUNet_compile": "f", "nnUNet_n_proc_DA": "0"}):
            raw = make_phantom_dataset(Path(folders["nnUNet_raw"]), _DATASET_ID, labelled=labelled,
                                       unlabelled=unlabelled, test=0, shape=shape, seed=seed)
            dataset_json = json.loads((raw / "dataset.json").read_text())
            dataset_json["semi"]["plan_joined_passes"] = plan_joined_passes
            (raw / "dataset.json").write_text(json.dumps(dataset_json))
            with _quiet(), _threads_for_processes():
                extract_fingerprints([_DATASET_ID], num_processes=1)
            preprocessed = Path(folders["nnUNet_preprocessed"]) / raw.name
            yield Phantom(raw, preprocessed, dataset_json, configuration)


def ready(trainer: nnUNetTrainer, patch_size: tuple[int, ...] | None = None) -> nnUNetTrainer:
    """The trainer, initialized, as its first step finds it; without preprocessed cases, which no step here needs.

    patch_size: of that step's patches, if not the plan's.
    """
    cases = Path(trainer.preprocessed_dataset_folder)
    cases.mkdir(exist_ok=True)
    (cases / "none.b2nd").touch()  # nnU-Net tells the storage format by the files it finds
    with _quiet():
        trainer.initialize()
    start(trainer, patch_size or tuple(trainer.configuration_manager.patch_size))
    return trainer


def start(trainer: nnUNetTrainer, patch_size: tuple[int, ...]) -> None:
    """What precedes the first step with patches of this size, with noise for the labelled cases."""
    if isinstance(trainer, nnUNetTrainerSemi):
        trainer.method.context = replace(trainer.method.context, training_cases=lambda: _noise(trainer, patch_size))
        trainer.method.on_start()
        trainer.method.train()
    else:
        trainer.network.train()


def _noise(trainer: nnUNetTrainerSemi, patch_size: tuple[int, ...]) -> Iterator[WholeCase]:
    for index in range(len(trainer.modalities)):
        labels = torch.randint(trainer.label_manager.num_segmentation_heads, (1, *patch_size))
        yield WholeCase(f"noise_{index}", torch.randn(trainer.num_input_channels, *patch_size), labels, [index])


def random_batch(trainer: nnUNetTrainer, patch_size: tuple[int, ...], seed: int) -> dict:
    """A batch as the trainer's ``train_step`` takes it: noise, and labels at random.

    What a step costs depends on shapes alone.
    """
    generator = torch.Generator().manual_seed(seed)
    size = trainer.configuration_manager.batch_size
    channels = len(trainer.dataset_json["channel_names"])
    images = [torch.randn(size, channels, *patch_size, generator=generator) for _ in range(2)]
    labels = torch.randint(trainer.label_manager.num_segmentation_heads, (size, 1, *patch_size), generator=generator)
    target = [torch.nn.functional.interpolate(labels.float(), scale_factor=tuple(scale), mode="nearest")
              for scale in trainer._get_deep_supervision_scales()]
    labelled = {"data": images[0], "target": target}
    if isinstance(trainer, nnUNetTrainerSemi):
        return {"labelled": labelled, "unlabelled": {"data": images[1]}}
    return labelled
