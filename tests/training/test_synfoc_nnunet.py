"""SynFoC with a trained nnU-Net as foundation model, in 3D and without the extra."""

import json
import shutil

import pytest

TRAINER = "nnUNetTrainerSemiSynFoC"
TRAIN = ("nnUNetv2_train", "1", "3d_fullres", "0", "-tr", TRAINER, "-p", "nnUNetSemiCPUPlans", "-device", "cpu")
MODEL = ("-d", "1", "-tr", TRAINER, "-p", "nnUNetSemiCPUPlans", "-c", "3d_fullres", "-f", "0")


def folder_of(workspace):
    return next((workspace / "nnUNet_results").glob(f"Dataset001_*/{TRAINER}__*")) / "fold_0"


def log_of(folder):
    return "".join(path.read_text() for path in folder.glob("training_log_*.txt"))


@pytest.mark.e2e
def test_it_trains_beside_nnunets_network_is_continued_after_a_kill_and_predicts(workspace, tools, tmp_path):
    tools.set_semi(workspace, num_epochs=1, final_validation=False)
    supervised = [*TRAIN]
    supervised[5] = "nnUNetTrainerSemiSupervised"
    tools.call(workspace, *supervised)
    checkpoint, = (workspace / "nnUNet_results").glob("*/nnUNetTrainerSemiSupervised__*/fold_0/checkpoint_final.pth")
    pretrained = shutil.copy(checkpoint, tmp_path / "pretrained.pth")
    tools.set_semi(workspace, num_epochs=4, num_iterations_per_epoch=4, gradient_checkpointing=True,
                   SynFoC={"foundation": "nnunet", "weights": str(pretrained), "warmup_steps": 2,
                           "deploy": "ensemble"})
    killed = tmp_path / "killed"
    shutil.copytree(workspace, killed, ignore=shutil.ignore_patterns("nnUNet_results"))
    (killed / "nnUNet_results").mkdir()
    tools.call(workspace, *TRAIN)
    tools.kill_and_continue(killed, *TRAIN)
    one, other = (tools.load(folder_of(folder) / "checkpoint_final.pth") for folder in (workspace, killed))
    tools.states_equal(one["network_weights"], other["network_weights"], 0)
    tools.states_equal(one["nnunetv2_semi"]["method_state"], other["nnunetv2_semi"]["method_state"], 0)

    log = log_of(folder_of(workspace))
    assert "The segmentation heads of the foundation model are the file's" in log and "alpha" in log
    own = json.loads((folder_of(workspace).parent / "plans.json").read_text())
    assert len(own["configurations"]["3d_fullres"]["semi"]["SynFoC"]["weights_sha256"]) == 64
    state = one["nnunetv2_semi"]["method_state"]
    trained = [name for name in state if name.startswith("foundation.")]
    assert any(".up." in name for name in trained) and not any(name.endswith("base.weight") for name in trained)

    images = next((workspace / "nnUNet_raw").glob("Dataset001_*")) / "imagesTs"
    tools.call(workspace, "nnUNetv2_predict", "-i", str(images), "-o", str(tmp_path / "out"), *MODEL, *tools.on_cpu,
               *tools.one_process)
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 1
