"""Two processes (gloo) do what one process does."""

import shutil

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.e2e

METHODS = ["MeanTeacher", "SemiCML", "RCPS", "Mix", "batch_dice", "Fusion", "SynFoC", "SemiCML_missing",
           "Fusion_missing"]
TRAINERS = ["CML", "Mix"]


@pytest.fixture(scope="module")
def results(tools, tmp_path_factory, phantom_workspace):
    """The folder with what the processes wrote: steps and whole trainings of two, and the same steps of one."""
    folder = tmp_path_factory.mktemp("ddp")
    shutil.copytree(phantom_workspace, folder / "w")
    tools.set_semi(folder / "w", num_epochs=2, SemiCML={"prel_start": 0.5}, Mix={"unlabelled_foreground": 0.5})
    steps, trainings = ([(what, kind) for kind in kinds]
                        for what, kinds in (("steps", METHODS), ("training", TRAINERS)))
    losses = [("uneven", "dice"), ("absent", "loss")]
    tools.run_workers([*steps, *losses, ("steps", "nan"), *trainings, ("patience", "first")], 2, folder, folder / "w")
    tools.run_workers([*steps, *losses], 1, folder, folder / "w")
    return folder


@pytest.mark.parametrize("kind", METHODS)
def test_two_processes_reach_the_weights_of_one(tools, results, kind):
    alone, first, second = (torch.load(results / f"{kind}_{name}.pt", weights_only=False)["state"]
                            for name in ("1_0", "2_0", "2_1"))
    tools.states_equal(first, second, 0.0)
    tools.states_equal(alone, first, 2e-5)


def test_a_non_finite_term_in_one_process_is_left_out_in_both(tools, results):
    first, second = (torch.load(results / f"nan_2_{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first["skipped"] == second["skipped"] == [0, 1, 0, 0]
    tools.states_equal(first["state"], second["state"], 0.0)


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_whole_training_keeps_the_processes_together(tools, results, kind):
    first, second = (torch.load(results / f"run_{kind}_{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first["batch"] == second["batch"] == 1
    tools.states_equal(first["state"], second["state"], 0.0)
    assert first["foreground"].keys() == second["foreground"].keys()
    assert bool(first["foreground"]) == (kind == "Mix")
    for case, voxels in first["foreground"].items():
        assert all(np.array_equal(rows, second["foreground"][case][label]) for label, rows in voxels.items())


def test_processes_may_have_different_numbers_of_patches(results):
    """nnU-Net's own gathering needs equally many: it hangs or fails."""
    alone, first, second = (torch.load(results / f"dice_{name}.pt", weights_only=False)
                            for name in ("1_0", "2_0", "2_1"))
    assert torch.equal(first["value"], second["value"])
    assert (first["value"] - alone["value"]).abs() < 1e-6
    assert (torch.cat([first["gradient"], second["gradient"]]) - alone["gradient"]).abs().max() < 1e-7


def test_a_process_without_a_patch_that_counts_changes_no_loss_and_gets_no_gradient(results):
    alone, first, second = (torch.load(results / f"loss_{name}.pt", weights_only=False)
                            for name in ("1_0", "2_0", "2_1"))
    assert (first["value"] - alone["value"]).abs() < 1e-6
    assert (first["gradient"] - alone["gradient"]).abs().max() < 1e-6 < alone["gradient"].abs().max()
    assert not second["gradient"].any()


def test_processes_wait_for_the_first_one_however_long_it_works(results):
    assert [torch.load(results / f"first_2_{rank}.pt", weights_only=False) for rank in (0, 1)] == ["done", "done"]
