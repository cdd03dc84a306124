"""A trained nnU-Net as foundation model: its checkpoint, other classes and channels, adapters, padding."""

import json
import re

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.networks.frozen_weights import leave_out_of_state_dict
from nnunetv2_semi.networks.gradient_checkpointing import checkpoint_stages
from nnunetv2_semi.networks.lora import LoRAConvolution, LoRATransposedConvolution, merge_adapters
from nnunetv2_semi.networks.nnunet_foundation import NnUNetFoundation
from nnunetv2_semi.teachers import EMATeacher

KINDS = ["PlainConvUNet", "ResidualEncoderUNet"]


def plans(kind, dims):
    blocks = "n_conv_per_stage" if kind == "PlainConvUNet" else "n_blocks_per_stage"
    architecture = {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
        "arch_kwargs": {
            "n_stages": 3, "features_per_stage": [4, 6, 8], "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "kernel_sizes": [[3] * dims] * 3, "strides": [[1] * dims, [2] * dims, [1] * (dims - 1) + [2]],
            blocks: [1, 1, 1], "n_conv_per_stage_decoder": [1, 1], "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True}},
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"]}
    return {"dataset_name": "Dataset001_Other", "plans_name": "nnUNetPlans",
            "configurations": {"own": {"architecture": architecture}}}


def saved(folder, kind="PlainConvUNet", dims=2, channels=1, classes=3, *, plans_inside=True, prefix="", change=None):
    """A model folder with one fold; the network in it."""
    torch.manual_seed(0)
    manager = PlansManager(plans(kind, dims))
    configuration = manager.get_configuration("own")
    network = nnUNetTrainer.build_network_architecture(manager, configuration, channels, classes, True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = {prefix + name: value for name, value in network.state_dict().items()}
    if change is not None:
        change(weights)
    fold = folder / "fold_0"
    fold.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans(kind, dims)))
    arguments = {"configuration": "own", "fold": 0} | ({"plans": plans(kind, dims)} if plans_inside else {})
    torch.save({"network_weights": weights, "init_args": arguments, "trainer_name": "nnUNetTrainer",
                "_best_ema": np.float64(0.5)}, fold / "checkpoint_final.pth")
    network.decoder.deep_supervision = False
    return network


def foundation(folder, channels=1, classes=3, dims=2, **options):
    file = folder / "fold_0" / "checkpoint_final.pth"
    return NnUNetFoundation.from_weights(str(file), channels, classes, dims, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("rank", [0, 2])
def test_starts_as_the_trained_network(tmp_path, kind, dims, rank):
    network = saved(tmp_path, kind, dims)
    model, image = foundation(tmp_path, dims=dims, rank=rank), torch.randn(2, 1, *[8] * dims)
    assert model.notes == ["The segmentation heads of the foundation model are the file's, which has 3 classes too."]
    assert torch.allclose(model(image), network(image), atol=1e-6)


@pytest.mark.parametrize("variant", [{"plans_inside": False}, {"prefix": "module."}, {"prefix": "_orig_mod."}])
def test_plans_beside_the_fold_and_wrapped_networks_are_read_too(tmp_path, variant):
    network, image = saved(tmp_path, **variant), torch.randn(1, 1, 8, 8)
    assert torch.allclose(foundation(tmp_path)(image), network(image), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_and_the_finest_head_train_and_nothing_else(tmp_path, kind, dims, checkpointing):
    saved(tmp_path, kind, dims)
    model = foundation(tmp_path, dims=dims, rank=2)
    if checkpointing:
        checkpoint_stages(model)
    adapters = [m for m in model.modules() if isinstance(m, LoRAConvolution | LoRATransposedConvolution)]
    for adapter in adapters:
        torch.nn.init.normal_(adapter.up.weight, std=0.1)
    model(torch.randn(2, 1, *[8] * dims)).square().mean().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".down." in name or ".up." in name or "decoder.seg_layers.1." in name for name in with_gradient)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.modules.conv._ConvNd)]
    assert len(convolutions) == 3 * len(adapters) + 2, "each has an adapter of two, but for the two heads"


def test_without_adapters_everything_trains_but_heads_that_are_not_used(tmp_path):
    saved(tmp_path)
    model = foundation(tmp_path, rank=0)
    model(torch.randn(2, 1, 8, 8)).square().mean().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"network.decoder.seg_layers.0.weight", "network.decoder.seg_layers.0.bias"}
    assert without == {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_adapters_give_a_plain_network_with_the_same_output(tmp_path, kind):
    network = saved(tmp_path, kind)
    model, image = foundation(tmp_path, rank=2), torch.randn(2, 1, 8, 8)
    for name, parameter in model.named_parameters():
        if ".up." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = model(image)
    assert (expected - network(image)).abs().max() > 0.01
    merge_adapters(model.network)
    network.load_state_dict(model.network.state_dict())
    assert torch.allclose(network(image), expected, atol=1e-5)


def test_a_file_without_heads_gets_new_ones(tmp_path):
    """As one that was trained without labels."""
    def without_heads(weights):
        for name in [name for name in weights if "seg_layers" in name]:
            del weights[name]
    saved(tmp_path, change=without_heads)
    assert foundation(tmp_path).notes == ["The segmentation heads of the foundation model start anew, for 3 classes."]


def test_other_classes_get_new_heads(tmp_path):
    network = saved(tmp_path)
    model = foundation(tmp_path, classes=5)
    assert model(torch.randn(1, 1, 8, 8)).shape == (1, 5, 8, 8)
    assert model.notes == ["The segmentation heads of the foundation model start anew, for 5 classes."]
    assert not any("seg_layers" in name for name in model.frozen_names())
    base = model.network.encoder.stages[0][0].convs[0].conv.base
    assert torch.equal(base.weight, network.encoder.stages[0][0].convs[0].conv.weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("have", "need"), [(1, 3), (4, 1), (2, 3)])
def test_other_channels_keep_the_output_where_all_show_the_same(tmp_path, kind, have, need):
    network, image = saved(tmp_path, kind, channels=have), torch.randn(2, 1, 8, 8)
    model = foundation(tmp_path, need)
    assert torch.allclose(model(image.expand(-1, need, -1, -1)), network(image.expand(-1, have, -1, -1)), atol=1e-5)
    assert model.notes == [
        "The segmentation heads of the foundation model are the file's, which has 3 classes too.",
        f"The first convolution of the foundation model, of {have} channels, is averaged for {need}."]
    changed = [name for name, p in model.named_parameters()
               if p.ndim == 4 and p.shape[:2] == (4, need) and p.requires_grad]
    assert changed and not set(changed) & set(model.frozen_names()), "it trains, as it is not the file's"


@pytest.mark.parametrize("spatial", [(8, 8), (7, 9), (1, 5), (13, 30)])
def test_patches_that_the_strides_do_not_divide_are_padded_and_cropped(tmp_path, spatial):
    network = saved(tmp_path)
    model, image = foundation(tmp_path), torch.randn(2, 1, *spatial)
    assert model.stride == (2, 4)
    logits = model(image)
    assert logits.shape == (2, 3, *spatial)
    height, width = max(4, -(-spatial[0] // 2) * 2), max(8, -(-spatial[1] // 4) * 4)
    padded = torch.zeros(2, 1, height, width)
    padded[:, :, :spatial[0], :spatial[1]] = image
    assert torch.allclose(logits, network(padded)[:, :, :spatial[0], :spatial[1]], atol=1e-6)


def test_a_checkpoint_can_do_without_the_frozen_weights(tmp_path):
    saved(tmp_path)
    model, other = foundation(tmp_path), foundation(tmp_path)
    for network in (model, other):
        leave_out_of_state_dict(network, network.frozen_names())
    state = model.state_dict()
    assert not [name for name in state if re.search(r"\.base\.|norm|seg_layers\.0", name)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    other.load_state_dict(model.state_dict())
    image = torch.randn(1, 1, 8, 8)
    assert torch.equal(other(image), model(image))


def test_a_teacher_shares_the_frozen_weights(tmp_path):
    saved(tmp_path)
    model = foundation(tmp_path)
    teacher, image = EMATeacher(model), torch.randn(1, 1, 8, 8)
    assert {id(p) for p in teacher.network.parameters()} & {id(p) for p in model.parameters()} == \
        {id(p) for p in model.parameters() if not p.requires_grad}
    assert torch.allclose(teacher(image), model(image), atol=1e-6)


def remove(name):
    return lambda weights: [weights.pop(key) for key in list(weights) if key.endswith(name)]


@pytest.mark.parametrize(("change", "named"), [
    (remove("encoder.stages.1.0.convs.0.norm.weight"), r"encoder\.stages\.1\.0\.convs\.0\.norm\.weight"),
    (lambda weights: weights.update({"extra.weight": torch.ones(1)}), r"1 are not known \(extra\.weight\)"),
    (lambda weights: weights.update({"decoder.transpconvs.0.bias": torch.ones(9)}),
     r"decoder\.transpconvs\.0\.bias is \(9,\), must be \(6,\)"),
])
def test_weights_that_do_not_fit_are_named(tmp_path, change, named):
    saved(tmp_path, change=change)
    with pytest.raises(UserError, match=named):
        foundation(tmp_path)


def test_what_is_no_checkpoint_or_of_another_dimension_is_refused(tmp_path):
    saved(tmp_path / "model", dims=3)
    with pytest.raises(UserError, match="is 3D, what is trained 2D"):
        foundation(tmp_path / "model")
    with pytest.raises(UserError, match="is a folder"):
        NnUNetFoundation.from_weights(str(tmp_path), 1, 2, 2)
    with pytest.raises(UserError, match="random"):
        NnUNetFoundation.from_weights("random", 1, 2, 2)
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="lacks network_weights"):
        NnUNetFoundation.from_weights(str(tmp_path / "a.pth"), 1, 2, 2)
    torch.save({"network_weights": {}, "init_args": {"plans": {}}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="lacks network_weights, init_args or the name of a configuration"):
        NnUNetFoundation.from_weights(str(tmp_path / "a.pth"), 1, 2, 2)
    (tmp_path / "b.pth").write_text("text")
    with pytest.raises(UserError, match="cannot be read"):
        NnUNetFoundation.from_weights(str(tmp_path / "b.pth"), 1, 2, 2)
    with pytest.raises(UserError, match="Linear is no U-Net"):
        NnUNetFoundation(torch.nn.Linear(1, 1))


def test_missing_plans_are_named(tmp_path):
    saved(tmp_path, plans_inside=False)
    (tmp_path / "plans.json").unlink()
    with pytest.raises(UserError, match=r"holds no plans, and there is no .*plans\.json"):
        foundation(tmp_path)
