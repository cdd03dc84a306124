"""Phantom data sets, planned and preprocessed by nnU-Net, and nnU-Net's commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nnunetv2.training.logging import nnunet_logger

ON_CPU = ("-device", "cpu", "--disable_tta")
ONE_PROCESS = ("-npp", "0", "-nps", "0")
PROCESSES = ("-npp", "1", "-nps", "1")
WORKER = Path(__file__).parent / "ddp_worker.py"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def command(name: str) -> str:
    """An installed console script of this environment."""
    found = Path(sys.executable).parent / name
    return str(found) if found.exists() else shutil.which(name) or pytest.skip(f"{name} is not installed")


def run_command(workspace: Path, name: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run one of nnU-Net's or our commands on the workspace's folders."""
    result = subprocess.run([command(name), *arguments], env=environment(workspace), text=True, timeout=600,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert not check or result.returncode == 0, result.stdout[-3000:]
    return result


def kill_and_continue(run_in_this_process: Callable, workspace: Path, *train: str) -> None:
    """Run a training command of fold 0 and kill it after its first checkpoint; this process continues it with --c."""
    process = subprocess.Popen([command(train[0]), *train[1:]], env=environment(workspace),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    fold = "*/*/fold_0"
    try:
        deadline = time.monotonic() + 240
        while not list((workspace / "nnUNet_results").glob(f"{fold}/checkpoint_latest.pth")):
            assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not list((workspace / "nnUNet_results").glob(f"{fold}/checkpoint_final.pth"))
    run_in_this_process(workspace, *train, "--c")


def environment(workspace: Path) -> dict[str, str]:
    return {**os.environ, **{folder: str(workspace / folder) for folder in FOLDERS}, "nnUNet_def_n_proc": "1"}


def plans_path(workspace: Path) -> Path:
    return next((workspace / "nnUNet_preprocessed").glob("Dataset*/nnUNetSemiCPUPlans.json"))


def set_semi(workspace: Path, **semi: object) -> None:
    """Change the "semi" object of every configuration in the plans file."""
    plans = json.loads(plans_path(workspace).read_text())
    for configuration in plans["configurations"].values():
        if "patch_size" in configuration:
            configuration["semi"] = {**configuration["semi"], **semi}
    plans_path(workspace).write_text(json.dumps(plans))


def prepare(worker_threads: Callable, workspace: Path, configuration: str, monkeypatch: pytest.MonkeyPatch,
            extractor: str = "nnUNetFingerprintExtractorSemi", **phantom: object) -> None:
    """Phantom -> plans and preprocessed cases, in this process, which uses the workspace's folders from here on."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, preprocess_dataset
    from nnunetv2.experiment_planning.semi.nnUNetPlannerSemiCPU import nnUNetPlannerSemiCPU

    from nnunetv2_semi.data.phantom import make_phantom_dataset

    for folder in FOLDERS:
        (workspace / folder).mkdir(parents=True)
        monkeypatch.setenv(folder, str(workspace / folder))
    sizes = {"labelled": 3, "unlabelled": 2, "test": 1, **phantom}
    make_phantom_dataset(workspace / "nnUNet_raw", 1, "Phantom", **sizes)  # type: ignore[arg-type]
    with worker_threads():
        extract_fingerprints([1], extractor, num_processes=1)
        nnUNetPlannerSemiCPU(1).plan_experiment()
        preprocess_dataset(1, "nnUNetSemiCPUPlans", [configuration], num_processes=[1])
    set_semi(workspace, num_epochs=2, num_iterations_per_epoch=2, num_val_iterations_per_epoch=1, save_every=1)


@pytest.fixture(scope="session")
def phantom_workspace(tmp_path_factory: pytest.TempPathFactory, worker_threads: Callable) -> Iterator[Path]:
    """A planned and preprocessed 3D phantom with two modalities."""
    workspace = tmp_path_factory.mktemp("phantom")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        prepare(worker_threads, workspace, "3d_fullres", patch, "DatasetFingerprintExtractor", unlabelled=3,
                shape=(16, 20, 16))
    assert "unlabelled" in printed.getvalue()
    set_semi(workspace, num_epochs=3, num_iterations_per_epoch=3)
    yield workspace
    shutil.rmtree(workspace, ignore_errors=True)


@pytest.fixture
def workspace(phantom_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the prepared phantom, to change at will."""
    copy = tmp_path / "w"
    shutil.copytree(phantom_workspace, copy, ignore=shutil.ignore_patterns("nnUNet_results"))
    for folder in FOLDERS:
        (copy / folder).mkdir(exist_ok=True)
        monkeypatch.setenv(folder, str(copy / folder))
    return copy


def load_checkpoint(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=False)


def make_trainer(workspace: Path, trainer: str, configuration: str = "3d_fullres", fold: int | str = 0,
                 continue_training: bool = False):
    """The trainer object that ``nnUNetv2_train`` would make; nnUNet_* must point to the workspace."""
    from importlib import import_module

    plans = json.loads(plans_path(workspace).read_text())
    plans["continue_training"] = continue_training
    dataset_json = json.loads((plans_path(workspace).parent / "dataset.json").read_text())
    cls = getattr(import_module(f"nnunetv2.training.nnUNetTrainer.semi.{trainer}"), trainer)
    return cls(plans, configuration, fold, dataset_json, torch.device("cpu"))


def predict_without_this_package(workspace: Path, tasks: Sequence[tuple[Path, Path, Path]],
                                 workers: bool = False) -> None:
    """Predict with exported models in a process in which this package cannot be imported.

    tasks: images, output folder and model folder of each. workers: nnU-Net's further processes, in which it cannot be
    imported either, instead of the main process alone, for which that command of nnU-Net's has no option.
    """
    program = """
import importlib.abc, json, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if 'nnunetv2_semi' in name or name.endswith('.semi') or name in ('transformers', 'peft'):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor, predict_entry_point_modelfolder
def alone(self, images, output, save_probabilities, overwrite, **workers):
    self.predict_from_files_sequential(images, output, save_probabilities=save_probabilities, overwrite=overwrite)
if __name__ == '__main__':
    if sys.argv[1] == 'alone':
        nnUNetPredictor.predict_from_files = alone
    for arguments in json.loads(sys.argv[2]):
        sys.argv[1:] = arguments
        predict_entry_point_modelfolder()
"""
    script = workspace / "predict_without_this_package.py"
    script.write_text(program)
    calls = [["-i", str(images), "-o", str(output), "-m", str(model), "-f", "0", *ON_CPU, *PROCESSES,
              "--save_probabilities"] for images, output, model in tasks]
    result = subprocess.run([sys.executable, script, "workers" if workers else "alone", json.dumps(calls)],
                            env=environment(workspace), text=True, timeout=300, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout[-3000:]


def run_workers(works: Sequence[tuple[str, str]], world: int, folder: Path, workspace: Path) -> None:
    """Run ddp_worker.py in ``world`` processes on a workspace's folders; results go to ``folder``.

    works: (name of a function there, kind), one after another.
    """
    together = ",".join(f"{what}:{kind}" for what, kind in works)
    workers = [subprocess.Popen([sys.executable, WORKER, together, str(rank), str(world), folder],
                                env=environment(workspace), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True) for rank in range(world)]
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=300)
            assert worker.returncode == 0, output[-3000:]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def states_equal(first: dict, second: dict, tolerance: float) -> None:
    """Check that two state dicts differ by no more than ``tolerance``."""
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(value.double(), second[key].double(), rtol=0, atol=tolerance), key
        else:
            assert value == second[key], key


@pytest.fixture
def progress_png() -> None:
    """For tests that need what nnU-Net draws after each epoch, which takes most of the time of a short training."""


@pytest.fixture(autouse=True)
def no_progress_png(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "progress_png" not in request.fixturenames:
        monkeypatch.setattr(nnunet_logger.MetaLogger, "plot_progress_png", lambda *arguments: None)


@pytest.fixture(scope="session")
def tools(worker_threads: Callable, run_in_this_process: Callable):
    """The functions above."""
    return SimpleNamespace(run=run_command, call=run_in_this_process,
                           kill_and_continue=partial(kill_and_continue, run_in_this_process), set_semi=set_semi,
                           prepare=partial(prepare, worker_threads), plans_path=plans_path,
                           load=load_checkpoint, trainer=make_trainer, environment=environment, command=command,
                           folders=FOLDERS, on_cpu=ON_CPU, one_process=ONE_PROCESS, processes=PROCESSES,
                           run_workers=run_workers, states_equal=states_equal,
                           predict_without_this_package=predict_without_this_package)
