"""Settings for all tests: few threads and processes, and the package found whether or not it is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.machinery import ModuleSpec
from io import StringIO
from multiprocessing.context import BaseContext
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

# Before torch and nnunetv2 are imported, which read them once.
os.environ["nnUNet_n_proc_DA"] = "0"
os.environ["nnUNet_compile"] = "f"
os.environ.setdefault("nnUNet_def_n_proc", "2")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep instead of keeping others from the cores
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("MATPLOTLIBRC", str(Path(__file__).parent / "matplotlibrc"))
os.environ["TQDM_DISABLE"] = "1"

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("nnunetv2_semi") is None:
    sys.path.insert(0, str(ROOT))

import nnunetv2_semi  # noqa: E402
from nnunetv2_semi.installation import CLASS_FOLDERS  # noqa: E402


class SourceTreeFinder:
    """Imports our folders under their nnunetv2 names from the source tree, where neither pip nor `link` put them."""

    folders = {
        "nnunetv2." + ".".join(folder.inside_nnunet.parts): ROOT / folder.in_source_tree for folder in CLASS_FOLDERS
    }

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder = cls.folders.get(name)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


# Last, so that an installed package is preferred.
sys.meta_path.append(SourceTreeFinder)


def naive_weighted_dice_ce(outputs: Sequence[torch.Tensor], labels: torch.Tensor, weight: torch.Tensor, regions: bool,
                           scale_weights: Sequence[float] = (1.0,), batch_dice: bool = False) -> torch.Tensor:
    """nnU-Net's Dice and cross-entropy, voxel by voxel, of labels (B, 1 or K, *spatial) that each have a weight."""
    total = outputs[0].new_zeros(())
    for share, output in zip(scale_weights, outputs, strict=True):
        patches, heads = output.shape[:2]
        y, w = labels, weight
        for axis, size in enumerate(output.shape[2:], 2):
            chosen = [int((index + 0.5) * labels.shape[axis] / size) for index in range(size)]
            y, w = y[(slice(None),) * axis + (chosen,)], w[(slice(None),) * axis + (chosen,)]
        z, y, w = output.flatten(2), y.flatten(2), w.flatten(2)
        classes = range(heads) if regions else range(1, heads)
        entropy, counted, sums = 0.0, 0.0, [[[0.0, 0.0, 0.0] for _ in classes] for _ in range(patches)]
        for b in range(patches):
            for v in range(z.shape[2]):
                p = 1 / (1 + (-z[b, :, v]).exp()) if regions else z[b, :, v].exp() / z[b, :, v].exp().sum()
                weights = [float(w[b, min(c, w.shape[1] - 1), v]) for c in range(heads)]
                if not any(weights):
                    continue
                for row, c in enumerate(classes):
                    true = int(y[b, c, v] > 0) if regions else int(y[b, 0, v] == c)
                    for column, value in enumerate((p[c] * true, p[c], true)):
                        sums[b][row][column] += weights[c] * value
                    if regions and weights[c]:
                        entropy = entropy - weights[c] * (p[c] if true else 1 - p[c]).log()
                        counted += weights[c]
                if not regions:
                    entropy, counted = entropy - weights[0] * p[int(y[b, 0, v])].log(), counted + weights[0]
        if batch_dice:
            sums = [[[sum(patch[row][column] for patch in sums) for column in range(3)] for row in range(len(classes))]]
        dice = [(2 * both + 1e-5) / (p + true + 1e-5) for patch in sums for both, p, true in patch]
        total = total + share * ((entropy / counted if counted else 0.0) - sum(dice) / len(dice))
    return total


@pytest.fixture(name="naive_weighted_dice_ce")
def _naive_weighted_dice_ce():
    return naive_weighted_dice_ce


class ThreadContext:
    """A context of `multiprocessing` whose pools have threads; all else is that of spawned processes."""

    def __init__(self, spawning: BaseContext) -> None:
        self.spawning, self.Pool = spawning, ThreadPool

    def __getattr__(self, name: str) -> object:
        return getattr(self.spawning, name)


@contextmanager
def fingerprints_of_few_voxels() -> Iterator[None]:
    """Few voxels for the intensities of a data set; nnU-Net draws 10^8, with replacement, however few there are."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    stock = DatasetFingerprintExtractor.__init__

    def of_few_voxels(self: DatasetFingerprintExtractor, *args: object, **kwargs: object) -> None:
        stock(self, *args, **kwargs)  # type: ignore[arg-type]
        self.num_foreground_voxels_for_intensitystats = 1e5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DatasetFingerprintExtractor, "__init__", of_few_voxels)
        yield


@contextmanager
def worker_threads() -> Iterator[None]:
    """Threads where nnU-Net starts worker processes, each of which imports torch; fingerprints of few voxels."""
    with fingerprints_of_few_voxels(), pytest.MonkeyPatch.context() as patch:
        context = ThreadContext(multiprocessing.get_context("spawn"))
        patch.setattr(multiprocessing, "get_context", lambda method=None: context)
        patch.setattr("nnunetv2.utilities.utils.Pool", ThreadPool)  # of twelve, to list the files of a data set
        yield


def run_in_this_process(workspace: Path, name: str, *arguments: str) -> str:
    """What a command of nnU-Net's or ours prints when it runs on the workspace's folders, in this process.

    It does what a process of its own would do, but for the seconds that such a process takes to import torch.
    """
    import torch

    found = list(importlib.metadata.entry_points(group="console_scripts", name=name))
    if not found:
        pytest.skip(f"{name} is not installed")
    with worker_threads(), pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        for folder in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(folder, str(workspace / folder))
        patch.setattr(sys, "argv", [name, *arguments])
        patch.setattr(torch, "set_num_interop_threads", lambda number: None)  # which can be set only once
        threads = torch.get_num_threads()
        try:
            status = found[0].load()()
        finally:
            torch.set_num_threads(threads)
    assert not status, printed.getvalue()[-3000:]
    return printed.getvalue()


@pytest.fixture(name="fingerprints_of_few_voxels")
def _fingerprints_of_few_voxels():
    with fingerprints_of_few_voxels():
        yield


@pytest.fixture(scope="session", name="worker_threads")
def _worker_threads():
    return worker_threads


@pytest.fixture(scope="session", name="run_in_this_process")
def _run_in_this_process():
    return run_in_this_process


@pytest.fixture
def dataset(healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The raw data set that a test file calls ``healthy``, copied into nnU-Net's folders of one's own, to damage."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return Path(shutil.copytree(healthy, tmp_path / "nnUNet_raw" / healthy.name))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with whole trainings first: begun last, one would keep one process busy while the others wait."""
    long = {item.path for item in items if item.get_closest_marker("e2e") or "training" in item.path.parts}
    items.sort(key=lambda item: item.path not in long)


def pytest_report_header() -> str:
    return f"nnunetv2_semi under test: {Path(nnunetv2_semi.__file__).parent}"
