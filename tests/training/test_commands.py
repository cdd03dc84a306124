"""A whole life of a Semi-CML model through the commands that users type; `tools.call` runs them in this process."""

import json
import shutil
import zipfile

import numpy as np
import pytest
import SimpleITK as sitk
import torch

pytestmark = pytest.mark.e2e

TRAIN = ("nnUNetv2_train", "1", "3d_fullres", "0", "-tr", "nnUNetTrainerSemiCML", "-p", "nnUNetSemiCPUPlans",
         "-device", "cpu")
MODEL = ("-d", "1", "-tr", "nnUNetTrainerSemiCML", "-p", "nnUNetSemiCPUPlans", "-c", "3d_fullres")


@pytest.fixture(scope="module")
def trained(phantom_workspace, tools, tmp_path_factory):
    """The phantom's folders with a model that ``nnUNetv2_train`` trained without interruption."""
    workspace = tmp_path_factory.mktemp("commands") / "w"
    shutil.copytree(phantom_workspace, workspace)
    tools.set_semi(workspace, num_epochs=4, num_iterations_per_epoch=4, SemiCML={"prel_start": 0.5})
    (workspace / "printed.txt").write_text(tools.call(workspace, *TRAIN))
    yield workspace
    shutil.rmtree(workspace)


def model_folder(workspace):
    return next((workspace / "nnUNet_results").glob("Dataset001_*/nnUNetTrainerSemiCML__*"))


def modalities(workspace):
    plans = json.loads((model_folder(workspace) / "plans.json").read_text())
    return plans["configurations"]["3d_fullres"]["semi"]["modalities"]


def raw(workspace):
    return next((workspace / "nnUNet_raw").glob("Dataset001_*"))


def test_training_reports_and_validates_every_modality(trained):
    printed = (trained / "printed.txt").read_text()
    fold = model_folder(trained) / "fold_0"
    for name in modalities(trained):
        assert f"validation_dice_{name}" in printed and f"Validation of {name} alone" in printed
        summary = json.loads((fold / name / "validation" / "summary.json").read_text())
        assert 0 <= summary["foreground_mean"]["Dice"] <= 1
    assert "prel_" in printed and "Mean Validation Dice" in printed
    assert (fold / "validation" / "summary.json").is_file()


def test_killed_and_continued_it_ends_with_the_same_weights(trained, tools, tmp_path):
    workspace = tmp_path / "w"
    shutil.copytree(trained, workspace, ignore=shutil.ignore_patterns("nnUNet_results"))
    (workspace / "nnUNet_results").mkdir()
    tools.set_semi(workspace, final_validation=False)
    tools.kill_and_continue(workspace, *TRAIN)
    one, other = (tools.load(model_folder(folder) / "fold_0" / "checkpoint_final.pth")
                  for folder in (trained, workspace))
    assert one["network_weights"].keys() == other["network_weights"].keys()
    assert all(torch.equal(one["network_weights"][k], other["network_weights"][k]) for k in one["network_weights"])
    assert one["current_epoch"] == other["current_epoch"] == 4


def test_best_checkpoint_is_validated(trained, tools):
    printed = tools.call(trained, *TRAIN, "--val", "--val_best")
    assert "Mean Validation Dice" in printed


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_stock_prediction_averages_the_modalities_and_each_is_exported(trained, tools, tmp_path):
    """nnUNetv2_predict with all modalities; export; each exported model alone, with this package out of reach."""
    images = raw(trained) / "imagesTs"
    tools.call(trained, "nnUNetv2_predict", "-i", str(images), "-o", str(tmp_path / "all"), *MODEL, "-f", "0",
               *tools.on_cpu, *tools.one_process, "--save_probabilities")
    together = np.load(next((tmp_path / "all").glob("*.npz")))["probabilities"]
    tools.call(trained, "nnunetv2_semi", "export", *MODEL, "-o", str(tmp_path / "exported"))
    tasks = []
    for name, channels in modalities(trained).items():
        folder = tmp_path / "exported" / name
        assert list(json.loads((folder / "dataset.json").read_text())["channel_names"]) == ["0"]
        assert "semi" not in (folder / "plans.json").read_text().lower().replace("nnunetsemicpuplans", "")
        single_input = tmp_path / f"input_{name}"
        single_input.mkdir()
        for image in images.glob(f"*_{channels[0]:04d}.nii.gz"):
            shutil.copy(image, single_input / image.name.replace(f"_{channels[0]:04d}", "_0000"))
        tasks.append((single_input, tmp_path / f"out_{name}", folder))
    tools.predict_without_this_package(trained, tasks)
    singles = [np.load(next(output.glob("*.npz")))["probabilities"] for _, output, _ in tasks]
    for _, output, _ in tasks:
        assert read(next(output.glob("*.nii.gz"))).shape == read(next(images.iterdir())).shape
    # Together: the mean of the probabilities. nnU-Net averages logits over windows, so near window borders not exactly.
    assert np.abs(together - np.mean(singles, 0)).mean() < 0.02
    assert np.abs(singles[0] - singles[1]).mean() > 1e-3


def test_rcps_trains_and_its_export_predicts_without_this_package(trained, tools, tmp_path):
    workspace = tmp_path / "w"
    shutil.copytree(trained, workspace, ignore=shutil.ignore_patterns("nnUNet_results"))
    (workspace / "nnUNet_results").mkdir()
    tools.set_semi(workspace, num_epochs=1)
    train, model = ([argument.replace("SemiCML", "SemiRCPS") for argument in arguments] for arguments in (TRAIN, MODEL))
    printed = tools.run(workspace, *train).stdout
    assert "pseudo_supervision" in printed and "contrast" in printed and "Mean Validation Dice" in printed
    tools.call(workspace, "nnunetv2_semi", "export", *model, "-o", str(tmp_path / "exported"))
    images = raw(workspace) / "imagesTs"
    tools.predict_without_this_package(workspace, [(images, tmp_path / "alone", tmp_path / "exported")], workers=True)
    folders = "-i", str(images), "-o", str(tmp_path / "with")
    tools.call(workspace, "nnUNetv2_predict", *folders, *model, "-f", "0", *tools.on_cpu, *tools.one_process)
    prediction, = (tmp_path / "alone").glob("*.nii.gz")
    assert np.array_equal(read(prediction), read(tmp_path / "with" / prediction.name))


def test_zip_holds_the_deployed_model(trained, tools, tmp_path):
    target = tmp_path / "model.zip"
    tools.call(trained, "nnUNetv2_export_model_to_zip", *MODEL, "-f", "0", "-o", str(target))
    assert any(name.endswith("fold_0/checkpoint_final.pth") for name in zipfile.ZipFile(target).namelist())
