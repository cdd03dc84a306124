"""`nnunetv2_semi export` of models that were never trained: networks with the weights they began with."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities import find_objects
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_semi import cli
from nnunetv2_semi.commands import export
from nnunetv2_semi.commands.export import export_model
from nnunetv2_semi.errors import UserError

CML, MEAN_TEACHER = "nnUNetTrainerSemiCML", "nnUNetTrainerSemiMeanTeacher"
CHANNELS = {"0": "CT", "1": "T1", "2": "T2"}
MODALITIES = {"CT": [0], "MR both": [1, 2]}
INTENSITIES = {channel: {"mean": 10.0 * int(channel)} for channel in CHANNELS}
PLANS = {
    "dataset_name": "Dataset001_Tiny", "plans_name": "nnUNetSemiPlans", "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2], "label_manager": "LabelManager",
    "experiment_planner_used": "nnUNetPlannerSemi", "foreground_intensity_properties_per_channel": INTENSITIES,
    "configurations": {"2d": {
        "data_identifier": "nnUNetSemiPlans_2d", "preprocessor_name": "nnUNetPreprocessorSemi", "batch_size": 2,
        "patch_size": [16, 16], "spacing": [1.0, 1.0], "batch_dice": False, "use_mask_for_norm": [False, True, False],
        "normalization_schemes": ["CTNormalization", "ZScoreNormalization", "NoNormalization"],
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {"n_stages": 2, "features_per_stage": [2, 4], "conv_op": "torch.nn.modules.conv.Conv2d",
                            "kernel_sizes": [[3, 3]] * 2, "strides": [[1, 1], [2, 2]], "n_conv_per_stage": [1, 1],
                            "n_conv_per_stage_decoder": [1], "conv_bias": True, "norm_op": None, "norm_op_kwargs": None,
                            "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
                            "nonlin_kwargs": {"inplace": True}},
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"]},
        "semi": {"modalities": MODALITIES, "regions": False, "seed": 3}}},
}
DATASET_JSON = {"channel_names": CHANNELS, "labels": {"background": 0, "organ": 1}, "numTraining": 2,
                "file_ending": ".nii.gz", "semi": {"modalities": MODALITIES}}


def ours(name):
    return getattr(importlib.import_module(f"nnunetv2.training.nnUNetTrainer.semi.{name}"), name)


@pytest.fixture(autouse=True)
def _found_by_name(monkeypatch):
    """nnU-Net's own search imports all of its trainers."""
    def find(name):
        if name == "nnUNetTrainer":
            return importlib.import_module("nnunetv2.training.nnUNetTrainer.nnUNetTrainer").nnUNetTrainer
        return ours(name)
    monkeypatch.setattr(find_objects, "recursive_find_trainer_class_by_name", find)


@pytest.fixture
def model(tmp_path):
    """Makes the model folder of a trainer; each fold's weights are its own."""
    def make(trainer: str, folds: tuple[str, ...] = ("0",)) -> tuple[Path, dict]:
        folder, networks = tmp_path / f"{trainer}__nnUNetSemiPlans__2d", {}
        for fold in folds:
            torch.manual_seed(len(networks))
            manager = PlansManager(copy.deepcopy(PLANS))
            network = ours(trainer).build_network_architecture(manager, manager.get_configuration("2d"), 3, 2, False)
            networks[fold] = network
            (folder / f"fold_{fold}").mkdir(parents=True)
            torch.save({
                "network_weights": network.state_dict(), "trainer_name": trainer, "current_epoch": 7,
                "inference_allowed_mirroring_axes": (0, 1), "optimizer_state": {}, "nnunetv2_semi": {"method": "any"},
                "init_args": {"configuration": "2d", "fold": 9, "plans": PLANS, "dataset_json": DATASET_JSON},
            }, folder / f"fold_{fold}" / "checkpoint_final.pth")  # fmt: skip
        fingerprint = {"spacings": [[1.0, 1.0, 1.0]], "foreground_intensity_properties_per_channel": INTENSITIES}
        for name, content in (("plans", PLANS), ("dataset", DATASET_JSON), ("dataset_fingerprint", fingerprint)):
            (folder / f"{name}.json").write_text(json.dumps(content))
        return folder, networks
    return make


def read(folder, name):
    return json.loads((Path(folder) / f"{name}.json").read_text())


def checkpoint_of(folder, fold="0"):
    return torch.load(Path(folder) / f"fold_{fold}" / "checkpoint_final.pth", weights_only=False)


def logits(folder, image, fold=0):
    """What nnU-Net's predictor makes of an image with the network of a model folder."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), [fold], "checkpoint_final.pth")
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    with torch.no_grad():
        return predictor.network(image)


def test_each_modality_is_a_stock_model_of_its_own_channels(model, tmp_path):
    folder, networks = model(CML)
    written = export_model(str(folder), str(tmp_path / "out"))
    assert set(written) == set(MODALITIES) and len(set(written.values())) == 2
    image = torch.randn(1, 3, 16, 16)
    for name, channels in MODALITIES.items():
        plans, configuration = read(written[name], "plans"), read(written[name], "plans")["configurations"]["2d"]
        original = PLANS["configurations"]["2d"]
        for key in ("normalization_schemes", "use_mask_for_norm"):
            assert configuration[key] == [original[key][channel] for channel in channels]
        expected = {str(new): INTENSITIES[str(old)] for new, old in enumerate(channels)}
        assert plans["foreground_intensity_properties_per_channel"] == expected
        assert read(written[name], "dataset_fingerprint") == {
            "spacings": [[1.0, 1.0, 1.0]], "foreground_intensity_properties_per_channel": expected}
        assert read(written[name], "dataset")["channel_names"] == {
            str(new): CHANNELS[str(old)] for new, old in enumerate(channels)}
        found = logits(written[name], image[:, channels])
        assert torch.equal(found, networks["0"].branch(name)(image[:, channels]))


def test_nothing_in_it_needs_this_package(model, tmp_path):
    folder, _ = model(CML)
    for written in export_model(str(folder), str(tmp_path / "out")).values():
        plans, dataset, checkpoint = read(written, "plans"), read(written, "dataset"), checkpoint_of(written)
        assert plans["experiment_planner_used"] == "ExperimentPlanner"
        assert plans["configurations"]["2d"]["preprocessor_name"] == "DefaultPreprocessor"
        assert "semi" not in plans["configurations"]["2d"] and "semi" not in dataset
        assert checkpoint["trainer_name"] == "nnUNetTrainer"
        assert set(checkpoint) == {"network_weights", "init_args", "trainer_name", "current_epoch",
                                   "inference_allowed_mirroring_axes"}
        assert checkpoint["init_args"] == {"configuration": "2d", "fold": 0, "plans": plans, "dataset_json": dataset}
        assert checkpoint["inference_allowed_mirroring_axes"] == (0, 1) and checkpoint["current_epoch"] == 7
    assert read(folder, "plans") == PLANS and read(folder, "dataset") == DATASET_JSON


@pytest.mark.parametrize("trainer", [MEAN_TEACHER, "nnUNetTrainerSemiStock"])
def test_a_network_for_all_channels_is_exported_straight_into_the_folder(model, tmp_path, trainer):
    folder, networks = model(trainer)
    assert export_model(str(folder), str(tmp_path / "out")) == {"": str(tmp_path / "out")}
    assert read(tmp_path / "out", "dataset")["channel_names"] == CHANNELS
    assert read(tmp_path / "out", "dataset_fingerprint") == read(folder, "dataset_fingerprint")
    image = torch.randn(1, 3, 16, 16)
    assert torch.equal(logits(tmp_path / "out", image), networks["0"](image))


def test_one_modality_goes_straight_into_the_folder(model, tmp_path):
    folder, networks = model(CML)
    assert export_model(str(folder), str(tmp_path / "out"), modality="MR both") == {"MR both": str(tmp_path / "out")}
    image = torch.randn(1, 3, 16, 16)
    assert torch.equal(logits(tmp_path / "out", image[:, 1:]), networks["0"].branch("MR both")(image[:, 1:]))


def test_a_checkpoint_is_no_larger_than_its_network(model, tmp_path):
    """A part of a larger storage would be saved with all of it."""
    folder, _ = model(CML)
    file = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    weights, storage = checkpoint["network_weights"], torch.zeros(1_000_000)
    for key, value in weights.items():
        weights[key] = storage[:value.numel()].view_as(value).copy_(value)
    torch.save(checkpoint, file)
    for written in export_model(str(folder), str(tmp_path / "out")).values():
        assert (Path(written) / "fold_0" / "checkpoint_final.pth").stat().st_size < 100_000


def test_all_trained_folds_or_those_asked_for_are_exported_with_weights_of_their_own(model, tmp_path):
    folder, networks = model(MEAN_TEACHER, ("0", "2", "all"))
    (folder / "fold_1").mkdir()  # begun, not trained
    export_model(str(folder), str(tmp_path / "numbered"))
    assert sorted(path.name for path in (tmp_path / "numbered").glob("fold_*")) == ["fold_0", "fold_2"]
    export_model(str(folder), str(tmp_path / "every"), folds=["0", "2", "all"])
    assert sorted(path.name for path in (tmp_path / "every").glob("fold_*")) == ["fold_0", "fold_2", "fold_all"]
    for fold, network in networks.items():
        checkpoint = checkpoint_of(tmp_path / "every", fold)
        assert checkpoint["init_args"]["fold"] == (fold if fold == "all" else int(fold))
        expected = network.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in checkpoint["network_weights"].items())
    export_model(str(folder), str(tmp_path / "some"), folds=["2"])
    assert [path.name for path in (tmp_path / "some").glob("fold_*")] == ["fold_2"]


def test_the_command_says_how_to_predict_with_what_it_wrote(model, tmp_path, capsys):
    folder, _ = model(CML)
    assert cli.main(["export", "-m", str(folder), "-o", str(tmp_path / "out"), "--modality", "MR both"]) == 0
    printed = capsys.readouterr().out
    assert f"MR both: {tmp_path / 'out'}" in printed and "_0000 = T1, _0001 = T2" in printed
    assert f"nnUNetv2_predict_from_modelfolder -i IMAGES -o PREDICTIONS -m {tmp_path / 'out'} -f 0 -chk" in printed


@pytest.mark.parametrize("trainer, arguments, message", [
    (CML, ["--modality", "PET"], "No network for modality 'PET'. Modalities of this model: CT, MR both."),
    (MEAN_TEACHER, ["--modality", "PET"], "none: nnUNetTrainerSemiMeanTeacher trains one network for all channels"),
    (CML, ["-f", "3"], "no checkpoint_final.pth for fold 3. Folds that have it: 0."),
    (CML, ["-chk", "checkpoint_best.pth"], "no checkpoint_best.pth for fold (any). Folds that have it: none."),
])
def test_it_says_what_there_is(model, tmp_path, capsys, trainer, arguments, message):
    folder, _ = model(trainer)
    assert cli.main(["export", "-m", str(folder), "-o", str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, message", [
    (["-m", "nowhere"], "nowhere is no trained model"),
    (["-d", "1"], "Name the trained model: -d DATASET -tr TRAINER"),
])
def test_a_call_that_names_no_model_is_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", *arguments, "-o", "out"]) == 1
    assert message in capsys.readouterr().err


def test_mistakes_in_dataset_json_are_named(model, tmp_path):
    folder, _ = model(CML)
    content = {("modality" if key == "channel_names" else key): value for key, value in DATASET_JSON.items()}
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r'dataset\.json is not as.*"modality" is the old name of "channel_names"'):
        export_model(str(folder), str(tmp_path / "out"))


def test_it_never_writes_over_something(model, tmp_path, capsys):
    folder, _ = model(CML)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert cli.main(["export", "-m", str(folder), "-o", str(tmp_path / "full"), "--modality", "CT"]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_a_stock_trainers_model_needs_no_export(model, tmp_path):
    folder, _ = model(MEAN_TEACHER)
    file = folder / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(file, weights_only=False), "trainer_name": "nnUNetTrainer"}, file)
    with pytest.raises(UserError, match="trained with nnUNetTrainer, which is not a trainer of this package"):
        export_model(str(folder), str(tmp_path / "out"))


@pytest.mark.parametrize("change", ["class", "outputs", "activation"])
def test_a_network_that_is_not_nnunets_is_refused(model, tmp_path, monkeypatch, change):
    method = ours(MEAN_TEACHER).method_class
    nnunets = method.build_student

    def build(plans_manager, configuration_manager, channels, outputs, deep_supervision):
        network = nnunets(plans_manager, configuration_manager, channels, outputs + (change == "outputs"),
                          deep_supervision)
        if change == "class":
            network.__class__ = type("OwnNetwork", (type(network),), {})
        for module in network.modules() if change == "activation" else ():
            if isinstance(module, torch.nn.LeakyReLU):
                module.negative_slope = 0.3
        return network

    monkeypatch.setattr(method, "build_student", build)
    folder, _ = model(MEAN_TEACHER)
    with pytest.raises(UserError, match="MeanTeacher deploys is not nnU-Net's own"):
        export_model(str(folder), str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["BCP", "CML", "CPS", "Distill", "FixMatch", "Fusion", "MeanTeacher", "Mix", "RCPS",
                                  "Supervised", "SynFoC", "UAMT"])
def test_a_network_can_be_built_without_memory(name):
    """As `benchmark run` does, to compare the networks of trainings before it starts them."""
    manager = PlansManager(copy.deepcopy(PLANS))
    with torch.device("meta"):
        network = ours(f"nnUNetTrainerSemi{name}").build_network_architecture(
            manager, manager.get_configuration("2d"), 3, 2, False)
    assert all(weights.is_meta for weights in network.parameters()) and list(network.parameters())


def test_where_it_fails_on_the_way_nothing_is_left(model, tmp_path, monkeypatch):
    folder, _ = model(CML)
    saved = []

    def full_disk(*arguments):
        saved.append(arguments)
        if len(saved) == 2:
            raise OSError("No space left on device")
        save(*arguments)
    save = export._save_checkpoint
    monkeypatch.setattr(export, "_save_checkpoint", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_model(str(folder), str(tmp_path / "out"))
    assert len(saved) == 2 and not list(tmp_path.glob("*out*"))
