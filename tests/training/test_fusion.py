"""Fusion on kinds of data, and its network behind nnU-Net's predictor."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch

TRAINER = "nnUNetTrainerSemiFusion"
MODEL = ("-d", "1", "-tr", TRAINER, "-p", "nnUNetSemiCPUPlans")
KINDS = {"3d, regions, ignore label": ("3d_fullres", {"regions": True, "ignore_label": True}),
         "3d, one modality a case": ("3d_fullres", {"unpaired": True, "labelled": 4}),
         "3d, anisotropic": ("3d_fullres", {"shape": (12, 24, 20), "spacing": (4.0, 1.0, 1.0)}),
         "2d, four modalities": ("2d", {"channels": 4})}


def trained(tools, workspace, configuration, **semi):
    tools.set_semi(workspace, pictures=1, Fusion={"threshold": 0.0}, **semi)
    trainer = tools.trainer(workspace, TRAINER, configuration)
    trainer.run_training()
    log = trainer.logger.local_logger.my_fantastic_logging
    assert all(np.isfinite(log["train_losses"])) and log["semi/skipped_steps"] == [0, 0]
    assert all(np.isfinite(log["semi/threshold"])) and all(value > 0 for value in log["semi/unlabelled_voxels_used"])
    checkpoint = tools.load(f"{trainer.output_folder}/checkpoint_final.pth")
    assert all(torch.isfinite(w).all() for w in checkpoint["network_weights"].values())
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_trains(tools, tmp_path, monkeypatch, kind):
    configuration, phantom = KINDS[kind]
    tools.prepare(tmp_path / "w", configuration, monkeypatch, **{"shape": (12, 20, 16), **phantom})
    trained(tools, tmp_path / "w", configuration)
    trained(tools, tmp_path / "w", configuration, arrangement="one_pass", deep_supervision=False)


@pytest.mark.e2e
def test_predicts_with_all_modalities_and_with_one_and_is_not_stock(tools, tmp_path, monkeypatch):
    workspace = tmp_path / "w"
    tools.prepare(workspace, "3d_fullres", monkeypatch, shape=(12, 20, 16))
    trained(tools, workspace, "3d_fullres")
    images = next((workspace / "nnUNet_raw").glob("Dataset001_*")) / "imagesTs"
    single = tmp_path / "single"
    single.mkdir()
    for image in images.glob("*_0001.nii.gz"):
        (single / image.name).write_bytes(image.read_bytes())
    found = []
    for source, name in ((images, "both"), (single, "one")):
        tools.call(workspace, "nnUNetv2_predict", "-i", str(source), "-o", str(tmp_path / name), *MODEL, "-c",
                   "3d_fullres", "-f", "0", *tools.on_cpu, *tools.one_process)
        prediction, = (tmp_path / name).glob("*.nii.gz")
        found.append(sitk.GetArrayFromImage(sitk.ReadImage(str(prediction))))
    assert found[0].shape == found[1].shape and not np.array_equal(*found)
    refused = tools.run(workspace, "nnunetv2_semi", "export", *MODEL, "-c", "3d_fullres", "-o",
                        str(tmp_path / "exported"), check=False)
    assert refused.returncode == 1 and "not nnU-Net's own" in refused.stdout
