"""Two processes (gloo) do what one process does."""

import shutil

import numpy as np
import pytest
import torch


@pytest.mark.parametrize("kind", ["MeanTeacher", "SemiCML", "RCPS", "Mix"])
def test_two_processes_reach_the_weights_of_one(tools, tmp_path, kind):
    tools.run_workers("steps", kind, 2, tmp_path, tmp_path)
    tools.run_workers("steps", kind, 1, tmp_path, tmp_path)
    alone, first, second = (torch.load(tmp_path / f"{kind}_{name}.pt", weights_only=False)["state"]
                            for name in ("1_0", "2_0", "2_1"))
    tools.states_equal(first, second, 0.0)
    tools.states_equal(alone, first, 2e-5)


def test_a_non_finite_term_in_one_process_is_left_out_in_both(tools, tmp_path):
    tools.run_workers("steps", "nan", 2, tmp_path, tmp_path)
    first, second = (torch.load(tmp_path / f"nan_2_{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first["skipped"] == second["skipped"] == [0, 1, 0, 0]
    tools.states_equal(first["state"], second["state"], 0.0)


@pytest.mark.parametrize("kind", ["CML", "Mix"])
def test_a_whole_training_keeps_the_processes_together(tools, tmp_path, phantom_workspace, kind):
    workspace = tmp_path / "w"
    shutil.copytree(phantom_workspace, workspace)
    tools.set_semi(workspace, num_epochs=2, SemiCML={"prel_start": 0.5}, Mix={"unlabelled_foreground": 0.5})
    tools.run_workers("training", kind, 2, tmp_path, workspace)
    first, second = (torch.load(tmp_path / f"run_{kind}_{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first["batch"] == second["batch"] == 1
    tools.states_equal(first["state"], second["state"], 0.0)
    assert first["foreground"].keys() == second["foreground"].keys()
    assert bool(first["foreground"]) == (kind == "Mix")
    for case, voxels in first["foreground"].items():
        assert all(np.array_equal(rows, second["foreground"][case][label]) for label, rows in voxels.items())
