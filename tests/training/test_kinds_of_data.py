"""Every trainer trains, validates in training and checkpoints on every kind of data set."""

import json

import numpy as np
import pytest
import torch

KINDS = {
    "two modalities": {},
    "regions": {"regions": True},
    "ignore label": {"ignore_label": True},
    "regions with ignore label": {"regions": True, "ignore_label": True},
    "one channel": {"channels": 1},
    "four channels": {"channels": 4},
    "anisotropic": {"shape": (12, 24, 20), "spacing": (4.0, 1.0, 1.0)},
    "unpaired": {"unpaired": True, "labelled": 4},
}
TRAINERS = ["nnUNetTrainerSemiSupervised", "nnUNetTrainerSemiMeanTeacher", "nnUNetTrainerSemiRCPS",
            "nnUNetTrainerSemiCML"]
BASELINES = ["nnUNetTrainerSemiUAMT", "nnUNetTrainerSemiFixMatch", "nnUNetTrainerSemiCPS", "nnUNetTrainerSemiBCP",
             "nnUNetTrainerSemiMix"]


def train_all(tools, workspace, configuration, **semi):
    dataset_json = json.loads((tools.plans_path(workspace).parent / "dataset.json").read_text())
    train(tools, workspace, configuration, TRAINERS[: 3 if len(dataset_json["channel_names"]) == 1 else 4], **semi)


def train(tools, workspace, configuration, trainers, **semi):
    tools.set_semi(workspace, pictures=1, **semi)
    for name in trainers:
        trainer = tools.trainer(workspace, name, configuration)
        trainer.run_training()
        log = trainer.logger.local_logger.my_fantastic_logging
        assert all(np.isfinite(log["train_losses"])) and len(log["train_losses"]) == 2
        assert log["semi/skipped_steps"] == [0, 0]
        checkpoint = tools.load(f"{trainer.output_folder}/checkpoint_final.pth")
        assert all(torch.isfinite(w).all() for w in checkpoint["network_weights"].values())


@pytest.mark.parametrize("kind", KINDS)
def test_3d(tools, tmp_path, monkeypatch, kind):
    tools.prepare(tmp_path / "w", "3d_fullres", monkeypatch, **{"shape": (16, 16, 16), **KINDS[kind]})
    train_all(tools, tmp_path / "w", "3d_fullres", SemiCML={"prel_start": 0.5})


def test_2d_and_settings_of_the_network(tools, tmp_path, monkeypatch):
    """2D slices of 3D cases; then without deep supervision, with batch size 1, and with the passes joined."""
    workspace = tmp_path / "w"
    tools.prepare(workspace, "2d", monkeypatch, shape=(12, 20, 16))
    train_all(tools, workspace, "2d", SemiCML={"prel_start": 0.5})
    train_all(tools, workspace, "2d", deep_supervision=False)
    train_all(tools, workspace, "2d", arrangement="one_pass", SemiCML={"prel_start": 0.5})
    plans = json.loads(tools.plans_path(workspace).read_text())
    plans["configurations"]["2d"]["batch_size"] = 1
    tools.plans_path(workspace).write_text(json.dumps(plans))
    train_all(tools, workspace, "2d", SemiCML={"prel_start": 0.5}, arrangement="auto")


def test_2d_images(tools, tmp_path, monkeypatch):
    tools.prepare(tmp_path / "w", "2d", monkeypatch, shape=(24, 20), file_ending=".png", channels=2)
    train_all(tools, tmp_path / "w", "2d", SemiCML={"prel_start": 0.5})


@pytest.mark.parametrize("configuration, kind", [
    ("3d_fullres", {"shape": (16, 16, 16), "regions": True, "ignore_label": True}),
    ("2d", {"shape": (12, 20, 16), "channels": 1})])
def test_baselines(tools, tmp_path, monkeypatch, configuration, kind):
    """Two kinds; tests/methods/test_baselines.py has all of them, without the trainer."""
    tools.prepare(tmp_path / "w", configuration, monkeypatch, **kind)
    train(tools, tmp_path / "w", configuration, BASELINES, BCP={"pretrain_fraction": 0.5},
          Mix={"partner": "both", "spatial_view": "affine", "largest_component": None})


@pytest.mark.parametrize("configuration, kind", [
    ("3d_atlas", {"shape": (16, 16, 16), "regions": True, "ignore_label": True, "unpaired": True, "labelled": 4}),
    ("3d_atlas", {"shape": (12, 24, 20), "spacing": (4.0, 1.0, 1.0)}),
    ("2d", {"shape": (12, 20, 16), "unpaired": True, "labelled": 4})])
def test_mass(tools, tmp_path, monkeypatch, configuration, kind):
    tools.prepare(tmp_path / "w", configuration, monkeypatch, **kind)
    train(tools, tmp_path / "w", configuration, ["nnUNetTrainerSemiMASS"], MASS={"align_atlases": True})
    train(tools, tmp_path / "w", configuration, ["nnUNetTrainerSemiMASS"], deep_supervision=False,
          arrangement="one_pass")
    # whole volumes are what registration needs; a slice of one is not
    logs = [log.read_text() for log in (tmp_path / "w").rglob("training_log*.txt")]  # of one second they share a file
    assert logs and all(("show a part of the median image" in log) == (configuration == "2d") for log in logs)
