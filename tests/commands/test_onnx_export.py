"""`nnunetv2_semi export --onnx` of networks with the weights they began with, and the runner of docs/onnx.md."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import pkgutil
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from skimage.transform import resize
from torch import nn

from nnunetv2_semi import cli
from nnunetv2_semi.data.phantom import make_phantom_dataset
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods.settings import settings_for_plan, settings_from_plan
from nnunetv2_semi.networks.conventional_and_foundation import ConventionalAndFoundation
from nnunetv2_semi.networks.cross_modal_attention import CrossModalAttention
from nnunetv2_semi.networks.deployment import Deployed
from nnunetv2_semi.networks.modality_branches import ModalityBranches
from nnunetv2_semi.networks.one_modality import OneModality

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from nnunetv2_semi.onnx_export import export, graph, patches  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TRAINERS = "nnunetv2.training.nnUNetTrainer.semi"
OURS = sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(TRAINERS).__path__))
STOCK = "nnUNetTrainer"
CML, MASS, FUSION = "nnUNetTrainerSemiCML", "nnUNetTrainerSemiMASS", "nnUNetTrainerSemiFusion"
SUPERVISED = "nnUNetTrainerSemiSupervised"
MODALITIES = {"T1": [0], "T2": [1]}
INTENSITIES = {"mean": 260.0, "std": 200.0, "percentile_00_5": 10.0, "percentile_99_5": 700.0}


def trainer_class(name):
    module = f"nnunetv2.training.nnUNetTrainer.{name}" if name == STOCK else f"{TRAINERS}.{name}"
    return getattr(importlib.import_module(module), name)


def architecture(axes: int) -> dict:
    strides = [[1] * axes, [2] * axes, [1] * (axes - 2) + [2, 2]]
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3, "features_per_stage": [4, 6, 8], "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
            "kernel_sizes": [[3] * axes] * 3, "strides": strides, "n_conv_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1], "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True}},
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def plans_of(trainer: str, axes: int, channels: int, *, regions: bool = False, transpose: tuple = (0, 1, 2),
             spacing: tuple = (2.0, 2.0, 2.0), schemes: tuple = ("ZScoreNormalization",), masked: bool = False,
             **semi: object) -> dict:
    """A plans file as the planner and the trainer would have written it, of one configuration."""
    resampling = {"is_seg": False, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": f"plans_{axes}", "batch_size": 2, "batch_dice": False, "patch_size": [12, 16, 12][3 - axes:],
        "spacing": list(spacing)[3 - axes:],
        "normalization_schemes": [schemes[c % len(schemes)] for c in range(channels)],
        "use_mask_for_norm": [masked] * channels, "preprocessor_name": "nnUNetPreprocessorSemi",
        "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {**resampling, "order": 3},
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1}, "architecture": architecture(axes)}
    method = getattr(trainer_class(trainer), "method_class", None)
    if method is not None:
        modalities = MODALITIES if channels == 2 else {"T1": [0]}
        semi = {"modalities": modalities, "regions": regions, **semi}
        settings = settings_from_plan(method.Settings, semi, method.name)
        configuration["semi"] = settings_for_plan(settings, method.name)
    return {"dataset_name": "Dataset001_Phantom", "plans_name": "plans", "image_reader_writer": "SimpleITKIO",
            "label_manager": "LabelManager", "transpose_forward": list(transpose),
            "transpose_backward": np.argsort(transpose).tolist(), "experiment_planner_used": "nnUNetPlannerSemi",
            "foreground_intensity_properties_per_channel": {str(c): INTENSITIES for c in range(channels)},
            "configurations": {"3d_fullres" if axes == 3 else "2d": configuration}}


@pytest.fixture(autouse=True)
def _found_by_name(monkeypatch):
    """nnU-Net's own search imports all of its trainers."""
    monkeypatch.setattr(predict_from_raw_data, "recursive_find_trainer_class_by_name", trainer_class)


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    for folder in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(folder, str(tmp_path / folder))
    return tmp_path


@pytest.fixture
def model(workspace):
    """Makes the model folder of a trainer; each fold's weights are its own."""
    def make(trainer: str, axes: int = 2, channels: int = 2, folds: tuple[str, ...] = ("0",),
             dataset_json: dict | None = None, **plan: object) -> Path:
        plans = plans_of(trainer, axes, channels, **plan)
        dataset_json = dataset_json or {
            "channel_names": dict(zip("01", ("T1", "T2")[:channels], strict=False)), "numTraining": 2,
            "labels": {"background": 0, "organ": 1, "lesion": 2}, "file_ending": ".nii.gz"}
        configuration = next(iter(plans["configurations"]))
        folder = workspace / "nnUNet_results" / "Dataset001_Phantom" / f"{trainer}__plans__{configuration}"
        manager = PlansManager(copy.deepcopy(plans))
        heads = manager.get_label_manager(dataset_json).num_segmentation_heads
        for number, fold in enumerate(folds):
            torch.manual_seed(number)
            network = trainer_class(trainer).build_network_architecture(
                manager, manager.get_configuration(configuration), channels, heads, False)
            for module in network.modules():
                if isinstance(module, CrossModalAttention):  # which starts as none
                    nn.init.normal_(module.output.weight)
            (folder / f"fold_{fold}").mkdir(parents=True)
            torch.save({"network_weights": network.state_dict(), "trainer_name": trainer,
                        "init_args": {"configuration": configuration, "plans": plans, "dataset_json": dataset_json},
                        "inference_allowed_mirroring_axes": (0, axes - 1),
                        }, folder / f"fold_{fold}" / "checkpoint_final.pth")
        for name, content in (("plans", plans), ("dataset", dataset_json)):
            (folder / f"{name}.json").write_text(json.dumps(content))
        return folder
    return make


def dataset_json_with(regions: bool) -> dict:
    """Of two channels, with two regions or one label."""
    labels = {"background": 0, "all": [1, 2], "lesion": 2} if regions else {"background": 0, "organ": 1}
    return {"channel_names": {"0": "T1", "1": "T2"}, "labels": labels, "file_ending": ".nii.gz",
            "regions_class_order": [1, 2]}


def exported(folder: Path, output: Path, *arguments: str) -> dict:
    """What the command wrote beside the networks."""
    assert cli.main(["export", "--onnx", "-m", str(folder), "-o", str(output), *arguments]) == 0
    return json.loads((output / "inference.json").read_text())


def onnx_logits(file: Path, images: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(graph.session_of(str(file)).run(None, {"image": images.numpy()})[0])


def torch_network(folder: Path, fold: str = "0") -> nn.Module:
    """The network as nnU-Net's predictor has it."""
    predictor = predict_from_raw_data.nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(folder), (fold,))
    return predictor.network.eval()


@pytest.fixture(scope="module")
def runner():
    """docs/onnx_runner.py"""
    spec = importlib.util.spec_from_file_location("onnx_runner", ROOT / "docs" / "onnx_runner.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# the networks


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("trainer", [*OURS, STOCK])
def test_logits_of_every_trainers_network_are_pytorchs(model, tmp_path, trainer, axes):
    folder = model(trainer, axes)
    exported(folder, tmp_path / "out")
    network = torch_network(folder)
    for images in torch.randn(1, 2, *[12, 16, 12][3 - axes:]), torch.randn(3, 2, *[12, 16, 12][3 - axes:]):
        with torch.no_grad():
            expected = network(images)
        assert (onnx_logits(tmp_path / "out" / "fold_0.onnx", images) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("trainer", [name for name in (CML, MASS, FUSION) if name in OURS])
def test_a_network_goes_without_a_modality_as_in_pytorch(model, tmp_path, trainer, regions):
    folder = model(trainer, regions=regions, dataset_json=dataset_json_with(regions))
    assert str(exported(folder, tmp_path / "out")["absent_channel_value"]) == "-0.0"
    images = torch.randn(4, 2, 16, 12)
    images[0, 0] = images[1, 1] = -0.0
    images[2, 1] = 0.0  # present, of background alone; a constant image, but for one voxel, which norms divide by
    images[2, 1, 3, 4] = 1.0
    with torch.no_grad():
        expected = torch_network(folder)(images)
    found = onnx_logits(tmp_path / "out" / "fold_0.onnx", images)
    assert (found - expected).abs().max() <= 1e-4
    other = images.clone()
    other[0, 0] = torch.randn(16, 12)
    assert (onnx_logits(tmp_path / "out" / "fold_0.onnx", other)[0] - found[0]).abs().max() > 0.01


@pytest.mark.parametrize("regions", [False, True])
def test_confident_networks_are_averaged_as_in_pytorch(model, tmp_path, regions):
    """Logits of trained networks reach 50; a sigmoid of -18 is 0 in ONNX Runtime."""
    folder = model(CML, regions=regions, dataset_json=dataset_json_with(regions))
    file = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    for name, weights in checkpoint["network_weights"].items():
        if "seg_layers" in name:
            weights *= 100
    torch.save(checkpoint, file)
    exported(folder, tmp_path / "out")
    images = torch.randn(2, 2, 16, 12)
    with torch.no_grad():
        expected = torch_network(folder)(images)
    assert expected.abs().max() > 30
    found = onnx_logits(tmp_path / "out" / "fold_0.onnx", images)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("trainer", [CML, MASS])
def test_each_modality_has_a_network_of_its_own_channels(model, tmp_path, trainer):
    folder = model(trainer, schemes=("ZScoreNormalization", "CTNormalization"))
    assert len(exported(folder, tmp_path / "out")["channels"]) == 2
    images, network = torch.randn(2, 2, 16, 12), torch_network(folder)
    for channel, name in enumerate(MODALITIES):
        content = json.loads((tmp_path / "out" / name / "inference.json").read_text())
        assert [(one["name"], one["normalization"]) for one in content["channels"]] == [
            (name, ("ZScoreNormalization", "CTNormalization")[channel])]
        assert content["absent_channel_value"] is None
        alone = torch.full_like(images, -0.0)
        alone[:, channel] = images[:, channel]
        with torch.no_grad():
            expected = network(alone)
        found = onnx_logits(tmp_path / "out" / name / "fold_0.onnx", images[:, [channel]])
        assert (found - expected).abs().max() <= 1e-4
    only = exported(folder, tmp_path / "t2", "--modality", "T2")
    assert only["channels"] == content["channels"] and not (tmp_path / "t2" / "T2").exists()


def test_every_fold_is_a_file_with_weights_of_its_own(model, tmp_path):
    folder = model(SUPERVISED, folds=("0", "2", "all"))
    networks = exported(folder, tmp_path / "out", "-f", "0", "2", "all")["networks"]
    assert networks == {fold: f"fold_{fold}.onnx" for fold in ("0", "2", "all")}
    images = torch.randn(1, 2, 16, 12)
    for fold, file in networks.items():
        with torch.no_grad():
            expected = torch_network(folder, fold)(images)
        assert (onnx_logits(tmp_path / "out" / file, images) - expected).abs().max() <= 1e-4
    assert list(exported(folder, tmp_path / "one", "-f", "2")["networks"]) == ["2"]


def test_a_network_that_predicts_from_atlases_is_left_out_and_named(model, tmp_path, capsys):
    folder = model(MASS, predict="both")
    assert cli.main(["export", "--onnx", "-m", str(folder), "-o", str(tmp_path / "out")]) == 0
    assert 'not exported: it predicts from atlases ("predict": "both")' in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["T1", "T2"]


# the description


def test_the_description_has_what_inference_needs(model, tmp_path):
    folder = model(SUPERVISED, 3, transpose=(2, 0, 1), spacing=(3.0, 1.5, 1.0), masked=True)
    content = exported(folder, tmp_path / "out")
    plan = json.loads((folder / "plans.json").read_text())["configurations"]["3d_fullres"]
    assert content["channels"][1] == {"name": "T2", "normalization": "ZScoreNormalization", "use_mask_for_norm": True,
                                      "intensities": INTENSITIES}
    for key in ("patch_size", "spacing"):
        assert content[key] == plan[key]
    assert content["transpose_forward"] == [2, 0, 1] and content["transpose_backward"] == [1, 2, 0]
    assert content["labels"] == {"background": 0, "organ": 1, "lesion": 2} and content["outputs"] == [0, 1, 2]
    assert content["regions_class_order"] is None and content["mirroring_axes"] == [0, 2]
    assert content["sliding_window"] == {"step_size": 0.5, "gaussian_sigma": 0.125, "gaussian_maximum": 10}
    assert content["resampling"]["image"] == {"function": "resample_data_or_seg_to_shape", "is_seg": False, "order": 3,
                                              "order_z": 0, "force_separate_z": None}
    assert content["resampling"]["logits"]["order"] == 1 and content["file_ending"] == ".nii.gz"
    assert content["made_from"]["trainer"] == SUPERVISED


# what is refused


def test_a_difference_above_the_tolerance_is_refused_and_no_file_is_left(model, tmp_path, capsys):
    folder = model(SUPERVISED)
    arguments = ["export", "--onnx", "-m", str(folder), "-o", str(tmp_path / "out"), "--tolerance", "1e-12"]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert "fold 0: logits of ONNX Runtime differ from PyTorch's by up to" in error and "1e-12" in error
    assert not list(tmp_path.glob("*out*"))


def test_where_a_later_fold_differs_nothing_is_left_either(model, tmp_path, monkeypatch, capsys):
    folder, found = model(CML, folds=("0", "1")), iter([(0.0, 1.0)] * 3 + [(1.0, 1.0)])
    monkeypatch.setattr(export, "largest_difference", lambda *_: next(found))
    assert cli.main(["export", "--onnx", "-m", str(folder), "-o", str(tmp_path / "out")]) == 1
    assert "T1, fold 1: logits of ONNX Runtime differ" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def test_the_largest_difference_is_that_of_all_batches(tmp_path):
    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.factor * image
    file = str(tmp_path / "double.onnx")
    graph.write_graph(Scaled(2.0), (1, 4, 4), file)
    found = [np.full((batch, 1, 4, 4), value, dtype=np.float32) for batch, value in ((1, 3.0), (2, -5.0))]
    assert graph.largest_difference(Scaled(2.5), file, found) == (2.5, 12.5)


def test_logits_of_another_shape_are_refused(tmp_path):
    class Cropped(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image[..., :2]
    file = str(tmp_path / "whole.onnx")
    graph.write_graph(nn.ReLU(), (1, 4, 4), file)
    with pytest.raises(UserError, match=r"ONNX Runtime gives logits \(1, 1, 4, 4\), PyTorch \(1, 1, 4, 2\)"):
        graph.largest_difference(Cropped(), file, [np.zeros((1, 1, 4, 4), np.float32)])


def test_a_network_that_can_be_no_graph_and_has_no_parts_is_refused():
    class Special(Deployed):
        def why_not_exportable(self) -> str:
            return "it calls an operator of its own"
    with pytest.raises(UserError, match="network cannot be exported as ONNX: it calls an operator of its own"):
        export._wanted(SimpleNamespace(network=Special(), parts={}), None)


def write_batch_norm(file: Path, training: bool) -> None:
    node = onnx.helper.make_node("BatchNormalization", ["image", "s", "b", "m", "v"],
                                 ["logits", "m2", "v2"] if training else ["logits"], training_mode=int(training))
    values = [onnx.numpy_helper.from_array(np.ones(1, dtype=np.float32), name) for name in "sbmv"]
    tensors = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1, 4, 4])
               for name in ("image", "logits")]
    graph_of_one = onnx.helper.make_graph([node], "one", tensors[:1], tensors[1:], values)
    onnx.save(onnx.helper.make_model(graph_of_one, opset_imports=[onnx.helper.make_opsetid("", 17)]), file)


def test_a_batch_norm_in_training_mode_is_refused(tmp_path):
    write_batch_norm(tmp_path / "training.onnx", True)
    with pytest.raises(UserError, match="1 BatchNormalization nodes in training mode"):
        graph.check_operators(str(tmp_path / "training.onnx"), 0)
    write_batch_norm(tmp_path / "inference.onnx", False)
    graph.check_operators(str(tmp_path / "inference.onnx"), 0)
    with pytest.raises(UserError, match="wrote 0 InstanceNormalization nodes for 1 such layers"):
        graph.check_operators(str(tmp_path / "inference.onnx"), 1)


def test_every_instance_norm_of_a_network_is_one_of_its_graph(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(graph, "check_operators", lambda file, count: asked.append(count))
    graph.write_graph(nn.Sequential(*[nn.InstanceNorm2d(2, affine=True), nn.ReLU()] * 3).eval(), (2, 4, 4),
                      str(tmp_path / "three.onnx"))
    assert asked == [3]


def test_an_operator_without_a_counterpart_is_named(tmp_path):
    class Special(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.special.i0(image)
    with pytest.raises(UserError, match="cannot export Special as ONNX.*i0"):
        graph.write_graph(Special(), (1, 4, 4), str(tmp_path / "out.onnx"))


def test_where_the_whole_cannot_be_exported_the_networks_within_it_are_named(model, tmp_path, monkeypatch, capsys):
    folder = model(CML)
    monkeypatch.setattr(ModalityBranches, "forward", lambda self, image: torch.special.i0(image))
    assert cli.main(["export", "--onnx", "-m", str(folder), "-o", str(tmp_path / "out")]) == 1
    assert "ask for one: --modality T1" in capsys.readouterr().err
    assert exported(folder, tmp_path / "t1", "--modality", "T1")["networks"] == {"0": "fold_0.onnx"}


@pytest.mark.parametrize("deploy", ["foundation", "ensemble"])
def test_a_network_and_its_foundation_of_any_batch(tmp_path, deploy):
    class Foundation(nn.Conv2d):
        def at_patch_grid(self, logits: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
            return nn.functional.interpolate(logits, size, mode="bilinear")
    network = ConventionalAndFoundation(nn.Conv2d(1, 3, 3, 1, 1), Foundation(1, 3, 2, 2), deploy, False).eval()
    file = str(tmp_path / "both.onnx")
    graph.write_graph(network, (1, 8, 8), file)
    images = [np.random.default_rng(0).random((batch, 1, 8, 8), dtype=np.float32) for batch in (1, 3)]
    assert graph.largest_difference(network, file, images)[0] <= 1e-5


def test_without_the_packages_the_extra_is_named(model, tmp_path, monkeypatch, capsys):
    folder = model(SUPERVISED)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert cli.main(["export", "--onnx", "-m", str(folder), "-o", str(tmp_path / "out")]) == 1
    assert 'pip install "nnunetv2-semi[onnx]"' in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--modality", "PET"], "No network for modality 'PET'. Modalities of this model: T1, T2."),
    (["-f", "3"], "no checkpoint_final.pth for fold 3"),
])
def test_it_says_what_there_is(model, tmp_path, capsys, arguments, message):
    folder = model(CML)
    assert cli.main(["export", "--onnx", "-m", str(folder), "-o", str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_it_never_writes_over_something(model, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert cli.main(["export", "--onnx", "-m", str(model(CML)), "-o", str(tmp_path / "full")]) == 1
    assert "is not empty" in capsys.readouterr().err and len(list((tmp_path / "full").iterdir())) == 1


def test_the_second_stage_of_a_cascade_is_refused(model, tmp_path):
    folder = model(STOCK)
    plans = json.loads((folder / "plans.json").read_text())
    stage = plans["configurations"]["2d"]
    plans["configurations"] = {"first": stage, "2d": {**stage, "previous_stage": "first"}}
    stage["architecture"]["arch_kwargs"]["n_conv_per_stage"] = [1, 1, 1]
    (folder / "plans.json").write_text(json.dumps(plans))
    weights = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(weights, weights_only=False)
    first = checkpoint["network_weights"]["encoder.stages.0.0.convs.0.conv.weight"]
    for key, value in checkpoint["network_weights"].items():
        if value.shape == first.shape and torch.equal(value, first):
            checkpoint["network_weights"][key] = torch.cat([value, value], 1)  # of two labels of the first stage
    torch.save(checkpoint, weights)
    with pytest.raises(UserError, match="second stage of a cascade"):
        export.export_onnx(str(folder), str(tmp_path / "out"), folds=["0"], checkpoint_name="checkpoint_final.pth")


# what is compared on


def test_it_compares_on_preprocessed_cases_or_raw_ones_and_says_where_on_noise(model, workspace, capsys,
                                                                              run_in_this_process):
    folder = model(SUPERVISED, 3)
    exported(folder, workspace / "noise")
    assert "checked with ONNX Runtime on noise, as nnUNet_preprocessed" in capsys.readouterr().out
    make_phantom_dataset(workspace / "nnUNet_raw", labelled=1, unlabelled=0, test=1, shape=(12, 14, 12))
    exported(folder, workspace / "raw")
    assert "checked with ONNX Runtime on raw cases case_0001, case_0000\n" in capsys.readouterr().out
    dataset = workspace / "nnUNet_preprocessed" / "Dataset001_Phantom"
    dataset.mkdir()
    shutil.copy(folder / "plans.json", dataset / "plans.json")
    shutil.copy(workspace / "nnUNet_raw" / "Dataset001_Phantom" / "dataset.json", dataset)
    run_in_this_process(workspace, "nnUNetv2_preprocess", "-d", "1", "-plans_name", "plans", "-c", "3d_fullres", "-np",
                        "1")
    exported(folder, workspace / "preprocessed")
    printed = capsys.readouterr().out
    assert "checked with ONNX Runtime on preprocessed cases case_0000\n" in printed
    assert "fold_0.onnx: logits differ from PyTorch's by at most" in printed


def test_the_patch_in_the_middle_has_the_voxels_of_the_image():
    image = np.arange(2 * 4 * 5 * 3).reshape(2, 4, 5, 3)
    assert np.array_equal(patches.middle(image, (2, 3, 3)), image[:, 1:3, 1:4])
    wider = patches.middle(image, (6, 5, 3))
    assert np.array_equal(wider[:, 1:5], image) and not wider[:, [0, 5]].any()
    assert np.array_equal(patches.middle(image, (5, 3)), image[:, 2])


def test_patches_of_one_value_are_not_compared_on_and_each_modality_is_left_out_once():
    full, empty = np.random.default_rng(0).random((2, 4, 4)), np.zeros((2, 4, 4))
    compared = patches.batches([full, empty, full], [0, 1], [[0], [1]])
    assert [batch.shape for batch in compared] == [(1, 2, 4, 4)] * 2 + [(2, 2, 4, 4)] + [(1, 2, 4, 4)] * 2
    for batch, absent in zip(compared[-2:], (0, 1), strict=True):
        assert np.signbit(batch[0, absent]).all() and np.array_equal(batch[0, 1 - absent], full[1 - absent])
    assert patches.batches([empty], [0, 1]) == []


def test_a_network_of_one_modality_is_compared_on_what_that_modality_holds():
    full = np.random.default_rng(0).random((2, 4, 4))
    without = full * np.array([1, 0]).reshape(2, 1, 1)
    compared = patches.batches([without, full], [0, 1], [[0], [1]], seen=[1])
    assert [batch.shape for batch in compared] == [(1, 2, 4, 4)] * 2
    assert np.array_equal(compared[0][0], full), "the patch that lacks it is not compared on"
    assert np.signbit(compared[1][0, 0]).all() and np.array_equal(compared[1][0, 1], full[1]), "nor one without it"
    assert patches.batches([without], [0, 1], [[0], [1]], seen=[1]) == []
    for network, seen in ((OneModality(nn.Identity(), "T2", [1]), [1]), (nn.Identity(), None)):
        assert export._Model.seen.fget(SimpleNamespace(network=network)) == seen


# whole cases


WHOLE_CASES = {
    "plain 2D, regions, resampled, folds": (SUPERVISED, 2, {"shape": (30, 40), "regions": True}, {
        "spacing": (0, 2.3, 1.7), "schemes": ("CTNormalization", "RescaleTo01Normalization"), "folds": ("0", "1")}),
    "plain 3D, transposed, resampled": (STOCK, 3, {"shape": (14, 24, 18), "spacing": (4.0, 2.0, 2.0)}, {
        "transpose": (1, 0, 2), "spacing": (2.2, 4.0, 2.5), "masked": True}),
    "plain 3D, thick slices": (SUPERVISED, 3, {"shape": (12, 26, 24), "spacing": (8.0, 2.0, 2.0)}, {
        "spacing": (6.0, 2.3, 1.9)}),
    "2D slices of 3D": (SUPERVISED, 2, {"shape": (12, 22, 20)}, {"spacing": (0, 2.5, 2.5)}),
    "Semi-CML 2D": (CML, 2, {"shape": (22, 24)}, {}),
    "Semi-CML 3D": (CML, 3, {"shape": (12, 20, 14)}, {"spacing": (2.0, 2.4, 1.8)}),
    "MASS 2D": (MASS, 2, {"shape": (22, 24), "unpaired": True}, {}),
    "MASS 3D": (MASS, 3, {"shape": (12, 20, 14), "unpaired": True}, {}),
}


@pytest.mark.parametrize("name", WHOLE_CASES)
def test_the_runner_gives_the_labels_of_nnunetv2_predict(model, workspace, runner, run_in_this_process, name):
    trainer, axes, phantom, plan = WHOLE_CASES[name]
    raw = make_phantom_dataset(workspace / "nnUNet_raw", labelled=1, unlabelled=0, test=2, **phantom)
    images = raw / "imagesTs"
    if trainer == CML:
        (images / "case_0002_0001.nii.gz").unlink()  # goes without a modality
    folds = plan.pop("folds", ("0",)) if "folds" in plan else ("0",)
    folder = model(trainer, axes, folds=folds, dataset_json=json.loads((raw / "dataset.json").read_text()),
                   regions=phantom.get("regions", False), **plan)
    run_in_this_process(workspace, "nnUNetv2_predict", "-i", str(images), "-o", str(workspace / "stock"), "-d", "1",
                        "-tr", trainer, "-p", "plans", "-c", folder.name.split("__")[-1], "-f", *folds, "-device",
                        "cpu", "-npp", "0", "-nps", "0", "--disable_progress_bar")
    exported(folder, workspace / "onnx")
    (workspace / "ours").mkdir()
    network = runner.Runner(workspace / "onnx", threads=1)
    cases = runner.cases_in(images, ".nii.gz", 2)
    assert len(cases) == 2
    for case, files in cases.items():
        runner.write_labels(*network.predict(files), workspace / "ours" / f"{case}.nii.gz")
        stock, ours = (sitk.ReadImage(str(workspace / folder / f"{case}.nii.gz")) for folder in ("stock", "ours"))
        labels = sitk.GetArrayFromImage(stock)
        assert len(np.unique(labels)) > 1
        assert np.array_equal(labels, sitk.GetArrayFromImage(ours))
        assert stock.GetSpacing() == ours.GetSpacing() and stock.GetDirection() == ours.GetDirection()


def test_the_runner_is_a_command(model, workspace, runner, monkeypatch, capsys):
    raw = make_phantom_dataset(workspace / "nnUNet_raw", labelled=1, unlabelled=0, test=1, shape=(20, 24))
    exported(model(SUPERVISED, dataset_json=json.loads((raw / "dataset.json").read_text())), workspace / "onnx")
    monkeypatch.setattr(sys, "argv", ["onnx_runner.py", "-m", str(workspace / "onnx"), "-i", str(raw / "imagesTs"),
                                      "-o", str(workspace / "labels"), "--disable_tta", "--threads", "1"])
    runner.main()
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(workspace / "labels" / "case_0001.nii.gz")))
    assert labels.shape == (20, 24) and capsys.readouterr().out.endswith("case_0001\n")


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("old, new", [((7, 9, 11), (12, 9, 5)), ((20, 31), (13, 64)), ((1, 12, 12), (3, 6, 25))])
def test_the_runner_resizes_as_nnunet_does(runner, order, old, new):
    image = np.random.default_rng(0).standard_normal(old)
    expected = resize(image, new, order, mode="edge", anti_aliasing=False)
    assert np.abs(runner.resized(image, new, order) - expected).max() < 1e-12


def test_the_runner_refuses_what_it_cannot_do_as_nnunet_does(model, tmp_path, runner):
    exported(model(SUPERVISED), tmp_path / "out")
    description = tmp_path / "out" / "inference.json"
    content = json.loads(description.read_text())
    for change in ({"image_reader_writer": "NibabelIO"}, {"preprocessor": "Mine"}):
        description.write_text(json.dumps({**content, **change}))
        with pytest.raises(NotImplementedError, match=next(iter(change.values()))):
            runner.Runner(tmp_path / "out")
    with pytest.raises(NotImplementedError, match="order 2"):
        runner.resized(np.zeros((3, 4)), (5, 5), 2)
    with pytest.raises(NotImplementedError, match="Mine"):
        runner.normalised(np.zeros((1, 3, 4)), np.ones((1, 3, 4), bool), {"normalization": "Mine", "intensities": {}})
