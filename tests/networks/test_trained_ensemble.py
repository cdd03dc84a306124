"""Trained models as teachers: what they give, and what they are no part of."""

from __future__ import annotations

import copy
import importlib
import json

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities import find_objects
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.networks.trained_ensemble import TrainedEnsemble, TrainedModel

STOCK, CML = "nnUNetTrainer", "nnUNetTrainerSemiCML"
MODALITIES = {"CT": [0], "MR": [1]}
PLANS = {
    "dataset_name": "Dataset001_Tiny", "plans_name": "plans", "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2], "label_manager": "LabelManager",
    "configurations": {"2d": {
        "data_identifier": "plans_2d", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": [16, 16], "spacing": [1.0, 1.0],
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {"n_stages": 3, "features_per_stage": [2, 4, 4], "conv_op": "torch.nn.modules.conv.Conv2d",
                            "kernel_sizes": [[3, 3]] * 3, "strides": [[1, 1], [2, 2], [1, 2]],
                            "n_conv_per_stage": [1, 1, 1], "n_conv_per_stage_decoder": [1, 1], "conv_bias": True,
                            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
                            "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None,
                            "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
                            "nonlin_kwargs": {"inplace": True}},
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"]},
        "semi": {"modalities": MODALITIES, "regions": False}}},
}
LABELS = {"background": 0, "organ": 1, "lesion": 2}
REGIONS = {"background": 0, "whole": [1, 2], "lesion": [2]}


def class_of(name):
    where = "nnUNetTrainer" if name == STOCK else f"semi.{name}"
    return getattr(importlib.import_module(f"nnunetv2.training.nnUNetTrainer.{where}"), name)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Makes a model folder, each fold with weights of its own."""
    monkeypatch.setattr(find_objects, "recursive_find_trainer_class_by_name", class_of)
    monkeypatch.setattr("nnunetv2.inference.predict_from_raw_data.recursive_find_trainer_class_by_name", class_of)

    def make(trainer=STOCK, folds=("0",), regions=False, **configuration):
        folder, plans = tmp_path / f"{trainer}__plans__2d", copy.deepcopy(PLANS)
        plans["configurations"]["2d"].update(configuration)
        plans["configurations"]["2d"]["semi"]["regions"] = regions
        dataset_json = {"channel_names": {"0": "CT", "1": "MR"}, "labels": REGIONS if regions else LABELS,
                        "regions_class_order": [1, 2], "file_ending": ".nii.gz"}
        for number, fold in enumerate(folds):
            torch.manual_seed(number)
            manager = PlansManager(copy.deepcopy(plans))
            network = class_of(trainer).build_network_architecture(manager, manager.get_configuration("2d"), 2,
                                                                   2 if regions else 3, False)
            (folder / f"fold_{fold}").mkdir(parents=True)
            torch.save({"network_weights": network.state_dict(), "trainer_name": trainer,
                        "init_args": {"configuration": "2d"}}, folder / f"fold_{fold}" / "checkpoint_final.pth")
        for name, content in (("plans", plans), ("dataset", dataset_json)):
            (folder / f"{name}.json").write_text(json.dumps(content))
        return folder
    return make


def predictors_logits(folder, image, fold):
    """Of the deployed network, as nnUNetv2_predict builds it."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), [fold], "checkpoint_final.pth")
    with torch.no_grad():
        return predictor.network.eval()(image)


@pytest.mark.parametrize("trainer", [STOCK, CML])
def test_one_fold_gives_what_the_deployed_network_predicts(model, trainer):
    folder, image = model(trainer), torch.randn(2, 2, 16, 16)
    teacher = TrainedModel.checked(folder, ["0"], "checkpoint_final.pth").ensemble()
    assert torch.equal(teacher(image), predictors_logits(folder, image, 0))


@pytest.mark.parametrize("regions", [False, True])
def test_several_folds_give_the_mean_probability(model, regions):
    folder, image = model(folds=("0", "1", "all"), regions=regions), torch.randn(2, 2, 16, 16)
    logits = TrainedModel.checked(folder, ["0", "1", "all"], "checkpoint_final.pth").ensemble()(image)
    each = [predictors_logits(folder, image, fold) for fold in (0, 1, "all")]
    if regions:
        assert torch.allclose(logits.sigmoid(), sum(z.sigmoid() for z in each) / 3, atol=1e-6)
    else:
        assert torch.allclose(logits.softmax(1), sum(z.softmax(1) for z in each) / 3, atol=1e-6)
    assert not torch.allclose(each[0], each[1], atol=1e-2)


def test_a_patch_that_strides_do_not_divide_is_padded_and_its_logits_cropped(model):
    folder, image = model(), torch.randn(1, 2, 11, 13)
    found = TrainedModel.checked(folder, ["0"], "checkpoint_final.pth")
    assert found.strides == (2, 4)
    padded = torch.zeros(1, 2, 12, 16)
    padded[:, :, :11, :13] = image
    assert torch.equal(found.ensemble()(image), predictors_logits(folder, padded, 0)[:, :, :11, :13])


def test_it_goes_where_its_owner_goes_and_is_no_part_of_it():
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Dropout(0.5))
    owner = nn.Module()
    owner.teacher = TrainedEnsemble([network], regions=False)
    assert not list(owner.parameters()) and not owner.state_dict() and network not in owner.modules()
    owner.double()
    assert next(network.parameters()).dtype == torch.float64
    owner.train()
    image = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(owner.teacher(image), network[0](image)) and not owner.teacher(image).requires_grad
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("change, folds, message", [
    ({}, ["0", "3"], r"no checkpoint_final.pth for fold 3. Folds that have it: 0"),
    ({"previous_stage": "3d_lowres"}, ["0"], "second stage of a cascade"),
])
def test_what_cannot_teach_is_refused(model, change, folds, message):
    with pytest.raises(UserError, match=message):
        TrainedModel.checked(model(**change), folds, "checkpoint_final.pth")


def test_a_folder_without_a_model_and_weights_that_do_not_fit_are_refused(model, tmp_path):
    with pytest.raises(UserError, match="is no trained model: it has no plans.json"):
        TrainedModel.checked(tmp_path, ["0"], "checkpoint_final.pth")
    folder = model()
    file = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    checkpoint["network_weights"].popitem()
    torch.save(checkpoint, file)
    with pytest.raises(UserError, match="do not fit the plans beside them"):
        TrainedModel.checked(folder, ["0"], "checkpoint_final.pth").ensemble()
    torch.save({"epoch": 3}, file)
    with pytest.raises(UserError, match="is no checkpoint of nnU-Net: it has no network_weights, init_args, "):
        TrainedModel.checked(folder, ["0"], "checkpoint_final.pth")
    file.write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        TrainedModel.checked(folder, ["0"], "checkpoint_final.pth")
    (folder / "plans.json").write_text("{")
    with pytest.raises(UserError, match="plans.json is not valid JSON"):
        TrainedModel.checked(folder, ["0"], "checkpoint_final.pth")


def test_a_trainer_that_nnunet_does_not_find_is_named(model, monkeypatch):
    teacher = TrainedModel.checked(model(), ["0"], "checkpoint_final.pth")
    monkeypatch.setattr(find_objects, "recursive_find_trainer_class_by_name", lambda name: None)
    with pytest.raises(UserError, match="cannot be built: nnU-Net finds no trainer nnUNetTrainer.*doctor") as error:
        teacher.ensemble()
    assert str(teacher.folder) in str(error.value)
