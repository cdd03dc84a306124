"""Two processes (gloo) do what one process does."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parent / "ddp_worker.py"


def run_workers(tools, what, kind, world, folder, workspace):
    workers = [subprocess.Popen([sys.executable, WORKER, what, kind, str(rank), str(world), folder],
                                env=tools.environment(workspace), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True) for rank in range(world)]
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=300)
            assert worker.returncode == 0, output[-3000:]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def states_equal(first, second, tolerance):
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(value.double(), second[key].double(), rtol=0, atol=tolerance), key
        else:
            assert value == second[key], key


@pytest.mark.parametrize("kind", ["MeanTeacher", "SemiCML", "RCPS"])
def test_two_processes_reach_the_weights_of_one(tools, tmp_path, kind):
    run_workers(tools, "steps", kind, 2, tmp_path, tmp_path)
    run_workers(tools, "steps", kind, 1, tmp_path, tmp_path)
    alone, first, second = (torch.load(tmp_path / f"{kind}_{name}.pt", weights_only=False)["state"]
                            for name in ("1_0", "2_0", "2_1"))
    states_equal(first, second, 0.0)
    states_equal(alone, first, 2e-5)


def test_a_non_finite_term_in_one_process_is_left_out_in_both(tools, tmp_path):
    run_workers(tools, "steps", "nan", 2, tmp_path, tmp_path)
    first, second = (torch.load(tmp_path / f"nan_2_{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first["skipped"] == second["skipped"] == [0, 1, 0, 0]
    states_equal(first["state"], second["state"], 0.0)


def test_a_whole_training_keeps_the_processes_together(tools, tmp_path, phantom_workspace):
    workspace = tmp_path / "w"
    shutil.copytree(phantom_workspace, workspace)
    tools.set_semi(workspace, num_epochs=2, SemiCML={"prel_start": 0.5})
    run_workers(tools, "training", "CML", 2, tmp_path, workspace)
    first, second = (torch.load(tmp_path / f"run_CML_{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first["batch"] == second["batch"] == 1
    states_equal(first["state"], second["state"], 0.0)
