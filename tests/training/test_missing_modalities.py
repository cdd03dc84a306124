"""Cases that have one modality each, or some of them, through the commands that users type.

`tools.call` runs them in this process.
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from nnunetv2_semi.data.phantom import make_phantom_dataset

pytestmark = pytest.mark.e2e

CONFIGURATIONS = {"SemiCML": "3d_fullres", "SemiMASS": "3d_atlas", "SemiMeanTeacher": "3d_fullres",
                  "SemiMix": "3d_fullres"}
ONE_NETWORK = ("SemiMeanTeacher", "SemiMix")


@pytest.fixture(scope="module")
def unpaired(tools, tmp_path_factory):
    """A phantom, planned and preprocessed by nnU-Net's command, of which each case has one of two modalities."""
    workspace = tmp_path_factory.mktemp("unpaired") / "w"
    for folder in tools.folders:
        (workspace / folder).mkdir(parents=True)
    make_phantom_dataset(workspace / "nnUNet_raw", 1, "Phantom", labelled=4, unlabelled=4, test=2, shape=(16, 20, 16),
                         unpaired=True)
    printed = tools.call(workspace, "nnUNetv2_plan_and_preprocess", "-d", "1", "-pl", "nnUNetPlannerSemiCPU", "-fpe",
                         "nnUNetFingerprintExtractorSemi", "-c", "3d_fullres", "3d_atlas", "-np", "1", "1", "-npfp",
                         "1")
    assert "lack channels" in printed
    tools.set_semi(workspace, num_epochs=2, num_iterations_per_epoch=3, num_val_iterations_per_epoch=1, save_every=1)
    yield workspace
    shutil.rmtree(workspace)


def model(trainer):
    return ("-d", "1", "-tr", f"nnUNetTrainer{trainer}", "-p", "nnUNetSemiCPUPlans", "-c", CONFIGURATIONS[trainer])


def model_folder(workspace, trainer):
    return next((workspace / "nnUNet_results").glob(f"*/nnUNetTrainer{trainer}__*__{CONFIGURATIONS[trainer]}"))


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def trained(request, unpaired, tools):
    """Name of a trainer that was trained, and what was printed."""
    trainer = request.param
    printed = tools.call(unpaired, "nnUNetv2_train", "1", CONFIGURATIONS[trainer], "0", "-tr",
                         f"nnUNetTrainer{trainer}", "-p", "nnUNetSemiCPUPlans", "-device", "cpu")
    return trainer, printed


def images(workspace):
    return next((workspace / "nnUNet_raw").iterdir()) / "imagesTs"


def predict(tools, workspace, trainer, output):
    arguments = ("nnUNetv2_predict", "-i", str(images(workspace)), "-o", str(output), *model(trainer), "-f", "0",
                 *tools.on_cpu, "--save_probabilities")
    if trainer == "SemiMeanTeacher":
        tools.run(workspace, *arguments, *tools.processes)
    else:
        tools.call(workspace, *arguments, *tools.one_process)
    return {file.stem: np.load(file)["probabilities"] for file in output.glob("*.npz")}


@pytest.fixture(scope="module")
def predicted(trained, unpaired, tools, tmp_path_factory):
    """Case -> what stock prediction gives with the whole model."""
    return predict(tools, unpaired, trained[0], tmp_path_factory.mktemp("predicted") / "out")


def test_a_training_goes_through_and_stock_prediction_takes_any_modality(trained, unpaired, predicted):
    _, printed = trained
    assert "Mean Validation Dice" in printed
    names = {file.name.removesuffix(".nii.gz")[:-5] for file in images(unpaired).iterdir()}
    assert len(predicted) == len(names) == 2
    assert all(np.isfinite(probability).all() for probability in predicted.values())


def test_an_exported_modality_predicts_what_the_whole_model_does_of_it(trained, unpaired, predicted, tools, tmp_path):
    """The predictions of images that have one modality are those of that modality's own model."""
    trainer, _ = trained
    if trainer in ONE_NETWORK:
        pytest.skip("one network for all modalities")
    tools.call(unpaired, "nnunetv2_semi", "export", *model(trainer), "-o", str(tmp_path / "exported"))
    semi = json.loads((model_folder(unpaired, trainer) / "plans.json").read_text())["configurations"]
    modalities = semi[CONFIGURATIONS[trainer]]["semi"]["modalities"]
    assert len(list((tmp_path / "exported").iterdir())) == 2
    tasks = []
    for name, (channel,) in modalities.items():
        single = tmp_path / f"input_{name}"
        single.mkdir()
        for image in images(unpaired).glob(f"*_{channel:04d}.nii.gz"):
            shutil.copy(image, single / image.name.replace(f"_{channel:04d}", "_0000"))
        tasks.append((single, tmp_path / f"out_{name}", tmp_path / "exported" / name))
    tools.predict_without_this_package(unpaired, tasks)
    for _, output, _ in tasks:
        found, = output.glob("*.npz")
        assert np.allclose(np.load(found)["probabilities"], predicted[found.stem], atol=2e-3)


def test_a_modality_is_validated_on_the_cases_that_have_it(trained, unpaired):
    trainer, printed = trained
    if trainer != "SemiCML":
        pytest.skip("the other trainers have no modalities to validate by themselves")
    fold = model_folder(unpaired, trainer) / "fold_0"
    validated = {path.parent.parent.name: json.loads(path.read_text())["metric_per_case"]
                 for path in fold.glob("*/validation/summary.json")}
    split = json.loads((unpaired / "nnUNet_preprocessed" / "Dataset001_Phantom" / "splits_final.json").read_text())[0]
    assert sum(map(len, validated.values())) == len(split["val"])
    assert "no validation case has that modality" in printed


def test_mass_predicts_as_its_plans_say(unpaired, predicted, tools, tmp_path, trained):
    trainer, _ = trained
    if trainer != "SemiMASS":
        pytest.skip("MASS alone has atlases")
    plans_file = model_folder(unpaired, trainer) / "plans.json"
    plans = json.loads(plans_file.read_text())
    try:
        semi = plans["configurations"]["3d_atlas"]["semi"]
        changed = {**plans, "configurations": {**plans["configurations"], "3d_atlas": {
            **plans["configurations"]["3d_atlas"], "semi": {**semi, "MASS": {**semi["MASS"], "predict": "atlas"}}}}}
        plans_file.write_text(json.dumps(changed))
        after = predict(tools, unpaired, trainer, tmp_path / "atlas")
    finally:
        plans_file.write_text(json.dumps(plans))
    assert predicted.keys() == after.keys()
    assert all(np.abs(predicted[case] - after[case]).mean() > 1e-3 for case in predicted)
    assert all(np.isfinite(probability).all() for probability in after.values())


@pytest.fixture(scope="module")
def of_two_processes(unpaired, tools, tmp_path_factory):
    """The folder with what trainings by two processes with one patch each end with."""
    folder = tmp_path_factory.mktemp("processes")
    workspace = folder / "w"
    shutil.copytree(unpaired, workspace, ignore=shutil.ignore_patterns("nnUNet_results"))
    (workspace / "nnUNet_results").mkdir()
    plans = json.loads(tools.plans_path(workspace).read_text())
    plans["configurations"]["3d_fullres"]["batch_dice"] = True  # exchanges sums between processes
    tools.plans_path(workspace).write_text(json.dumps(plans))
    tools.set_semi(workspace, final_validation=False, SemiCML={"prel_start": 0.5}, drop_modality=0.5)
    tools.run_workers([("training", "CML"), ("training", "MASS")], 2, folder, workspace)
    return folder


@pytest.mark.parametrize("kind", ["CML", "MASS"])
def test_processes_with_different_modalities_stay_together(of_two_processes, tools, kind):
    """Terms apply on the one and not on the other."""
    first, second = (torch.load(of_two_processes / f"run_{kind}_{rank}.pt", weights_only=False) for rank in (0, 1))
    tools.states_equal(first["state"], second["state"], 0.0)


@pytest.mark.parametrize("name", ["nnUNetTrainerSemiCML", "nnUNetTrainerSemiMASS"])
def test_continued_training_ends_with_the_same_weights(unpaired, tools, tmp_path, monkeypatch, name):
    workspace = tmp_path / "w"
    shutil.copytree(unpaired, workspace, ignore=shutil.ignore_patterns("nnUNet_results"))
    for folder in tools.folders:
        (workspace / folder).mkdir(exist_ok=True)
        monkeypatch.setenv(folder, str(workspace / folder))
    tools.set_semi(workspace, final_validation=False, SemiCML={"prel_start": 0.5}, drop_modality=0.5, snapshots=2)
    whole = tools.trainer(workspace, name)
    whole.run_training()
    wanted = {key: value.clone() for key, value in whole.method.state_dict().items() if isinstance(value, torch.Tensor)}
    continued = tools.trainer(workspace, name, continue_training=True)
    continued.load_checkpoint(os.path.join(whole.output_folder, "checkpoint_snapshot_1.pth"))
    assert continued.current_epoch == 1
    continued.run_training()
    reached = continued.method.state_dict()
    assert all(torch.equal(value, reached[key]) for key, value in wanted.items())
