"""SynFoC with a tiny SAM: every kind of data, and a whole life through the commands that users type."""

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
import torch

transformers = pytest.importorskip("transformers")

TRAINER = "nnUNetTrainerSemiSynFoC"
TRAIN = ("nnUNetv2_train", "1", "2d", "0", "-tr", TRAINER, "-p", "nnUNetSemiCPUPlans", "-device", "cpu")
MODEL = ("-d", "1", "-tr", TRAINER, "-p", "nnUNetSemiCPUPlans", "-c", "2d")


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """A folder with a random SAM of two layers for 64 pixels."""
    folder = tmp_path_factory.mktemp("sam")
    torch.manual_seed(5)
    config = transformers.SamConfig(
        vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64,
                       "image_size": 64, "patch_size": 16, "output_channels": 32, "window_size": 2,
                       "global_attn_indexes": [1], "num_pos_feats": 16, "initializer_range": 0.02},
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32})
    transformers.SamModel(config).save_pretrained(folder)
    return folder


def settings_of(sam, **own):
    return {"pictures": 1, "SynFoC": {"weights": str(sam), "image_size": 64, "warmup_steps": 2, **own}}


KINDS = [{}, {"regions": True, "ignore_label": True}, {"channels": 1}, {"channels": 4}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_data(tools, sam, tmp_path, monkeypatch, kind):
    workspace = tmp_path / "w"
    tools.prepare(workspace, "2d", monkeypatch, **{"shape": (12, 20, 28), **kind})
    for further in ({}, {"arrangement": "one_pass", "deep_supervision": False, "gradient_checkpointing": True}):
        tools.set_semi(workspace, **{**settings_of(sam), **further})
        if further:
            plans = json.loads(tools.plans_path(workspace).read_text())
            plans["configurations"]["2d"]["batch_size"] = 1
            tools.plans_path(workspace).write_text(json.dumps(plans))
        trainer = tools.trainer(workspace, TRAINER, "2d")
        trainer.run_training()
        log = trainer.logger.local_logger.my_fantastic_logging
        assert all(np.isfinite(log["train_losses"])) and log["semi/skipped_steps"] == [0, 0]
        assert all(0 <= alpha <= 1 for alpha in log["semi/alpha"])
        checkpoint = tools.load(f"{trainer.output_folder}/checkpoint_final.pth")
        assert all(torch.isfinite(w).all() for w in checkpoint["network_weights"].values())


@pytest.fixture(scope="module")
def trained(tools, sam, tmp_path_factory):
    """A 2D phantom with a model that ``nnUNetv2_train`` trained without interruption."""
    workspace = tmp_path_factory.mktemp("synfoc") / "w"
    with pytest.MonkeyPatch.context() as patch:
        tools.prepare(workspace, "2d", patch, shape=(12, 20, 28), channels=1)
    path = tools.plans_path(workspace).parent / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "semi": {"domains": {"a": "*"}}}))
    tools.set_semi(workspace, num_epochs=4, num_iterations_per_epoch=4, **settings_of(sam))
    (workspace / "printed.txt").write_text(tools.run(workspace, *TRAIN).stdout)
    yield workspace
    shutil.rmtree(workspace)


def model_folder(workspace):
    return next((workspace / "nnUNet_results").glob(f"Dataset001_*/{TRAINER}__*"))


def copy_without_results(trained, workspace):
    shutil.copytree(trained, workspace, ignore=shutil.ignore_patterns("nnUNet_results"))
    (workspace / "nnUNet_results").mkdir()


@pytest.mark.e2e
def test_the_digest_of_the_weights_travels_and_the_frozen_encoder_does_not(trained, tools, sam):
    printed = (trained / "printed.txt").read_text()
    assert "mask tokens" in printed
    assert "validation_dice_domain_a" in printed and "Mean Validation Dice of domain a: " in printed
    folder = model_folder(trained)
    own = json.loads((folder / "plans.json").read_text())["configurations"]["2d"]["semi"]["SynFoC"]
    assert len(own["weights_sha256"]) == 64
    state = tools.load(folder / "fold_0" / "checkpoint_final.pth")["nnunetv2_semi"]["method_state"]
    encoder = [name for name in state if "vision_encoder" in name]
    assert encoder and all("query_" in name or "value_" in name for name in encoder)
    assert any("foundation_teacher" in name for name in encoder)


@pytest.mark.e2e
def test_killed_and_continued_it_ends_with_the_same_weights(trained, tools, tmp_path):
    workspace = tmp_path / "w"
    copy_without_results(trained, workspace)
    tools.set_semi(workspace, final_validation=False)
    tools.kill_and_continue(workspace, *TRAIN)
    one, other = (tools.load(model_folder(folder) / "fold_0" / "checkpoint_final.pth")
                  for folder in (trained, workspace))
    tools.states_equal(one["network_weights"], other["network_weights"], 0)
    tools.states_equal(one["nnunetv2_semi"]["method_state"], other["nnunetv2_semi"]["method_state"], 0)


@pytest.mark.e2e
def test_predicted_exported_and_predicted_without_the_package_and_the_extra(trained, tools, tmp_path):
    images = next((trained / "nnUNet_raw").glob("Dataset001_*")) / "imagesTs"
    tools.run(trained, "nnUNetv2_predict", "-i", str(images), "-o", str(tmp_path / "with"), *MODEL, "-f", "0",
              *tools.on_cpu, *tools.processes)
    tools.call(trained, "nnunetv2_semi", "export", *MODEL, "-o", str(tmp_path / "exported"))
    tools.predict_without_this_package(trained, [(images, tmp_path / "alone", tmp_path / "exported")])
    prediction, = (tmp_path / "alone").glob("*.nii.gz")
    first, second = (sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
                     for path in (prediction, tmp_path / "with" / prediction.name))
    assert np.array_equal(first, second)


@pytest.mark.e2e
@pytest.mark.parametrize("deploy", ["foundation", "ensemble"])
def test_the_foundation_model_is_predicted_with_by_stock_commands(trained, tools, tmp_path, deploy):
    workspace = tmp_path / "w"
    copy_without_results(trained, workspace)
    own = json.loads(tools.plans_path(workspace).read_text())["configurations"]["2d"]["semi"]["SynFoC"]
    tools.set_semi(workspace, num_epochs=1, SynFoC={**own, "deploy": deploy})
    printed = tools.call(workspace, *TRAIN)
    assert "validation_dice_conventional" in printed and "validation_dice_foundation" in printed
    images = next((workspace / "nnUNet_raw").glob("Dataset001_*")) / "imagesTs"
    tools.call(workspace, "nnUNetv2_predict", "-i", str(images), "-o", str(tmp_path / "out"), *MODEL, "-f", "0",
               *tools.on_cpu, *tools.one_process)
    assert list((tmp_path / "out").glob("*.nii.gz"))
    tools.call(workspace, "nnunetv2_semi", "export", *MODEL, "-o", str(tmp_path / "exported"))
    assert list((tmp_path / "exported").rglob("checkpoint_final.pth"))
