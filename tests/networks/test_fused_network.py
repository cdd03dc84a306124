"""One encoder per modality before one decoder."""

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.networks.fused_network import FusedNetwork, attention_scales


def networks(channels, dims=2, residual=False, deep_supervision=False, strides=None, widths=(4, 6, 8)):
    conv, norm = {2: (nn.Conv2d, nn.InstanceNorm2d), 3: (nn.Conv3d, nn.InstanceNorm3d)}[dims]
    strides = strides or [1, 2, 2]
    torch.manual_seed(0)
    shared = {"conv_bias": True, "norm_op": norm, "norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU,
              "deep_supervision": deep_supervision}
    kind = ResidualEncoderUNet if residual else PlainConvUNet
    return {name: kind(len(own), 3, list(widths), conv, 3, strides, 1, 3, 1, **shared)
            for name, own in channels.items()}


def fused(channels=None, scales=(1, 2), dropout=0.0, **kind):
    channels = channels or {"a": [0], "b": [1]}
    network = FusedNetwork(networks(channels, **kind), channels, scales, 2, dropout)
    for attention in network.core.attention.values():
        nn.init.normal_(attention.output.weight)
    return network.eval()


@pytest.mark.parametrize("kind", [{}, {"dims": 3}, {"residual": True}, {"deep_supervision": True},
                                  {"dims": 3, "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}])
@pytest.mark.parametrize("channels", [{"a": [0], "b": [1]}, {"a": [0, 2], "b": [1]}, {"a": [0], "b": [1], "c": [2, 3]}])
def test_kinds_of_networks_and_numbers_of_modalities(kind, channels):
    network = fused(channels, **kind)
    image = torch.randn(2, sum(map(len, channels.values())), *[16] * kind.get("dims", 2))
    logits, each = network.core(image, each=True)
    finest = logits[0] if kind.get("deep_supervision") else logits
    assert finest.shape == (2, 3, *image.shape[2:])
    again = network(image)
    assert torch.equal(finest, again[0] if kind.get("deep_supervision") else again)
    assert [single.shape for single in each] == [finest.shape] * len(channels)
    torch.stack([single.sum() for single in (*each, *(logits if isinstance(logits, list) else [logits]))]).sum() \
        .backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None]
    assert all("seg_layers" in name for name in idle), "heads of coarser outputs alone have no gradient"


def test_a_missing_modality_changes_nothing_whatever_it_holds():
    """Marked absent: the mean of the features that are there, no attention, and finite."""
    network = fused()
    image = torch.randn(2, 2, 16, 16)
    image[1, 1] = -0.0
    both = network(image)
    assert torch.isfinite(both).all()
    core = network.core
    own = core.encoders[0](image[1:, [0]])
    weights = [fusion.weight.detach().unflatten(1, (2, -1)) for fusion in core.fusions]
    by_hand = [nn.functional.conv2d(features, 2 * weight[:, 0], fusion.bias)
               for features, weight, fusion in zip(own, weights, core.fusions, strict=True)]
    assert torch.allclose(both[1:], core.head(by_hand), atol=1e-5)


def test_fusion_starts_as_the_mean_of_the_modalities():
    network = fused(scales=())
    image = torch.randn(1, 2, 16, 16)
    features, own = network.core.features(image)
    for scale, single in enumerate(features):
        assert torch.allclose(single, (own[0][scale] + own[1][scale]) / 2, atol=1e-5)


def test_a_light_decoder_sees_its_own_modality_alone():
    network = fused()
    image = torch.randn(1, 2, 16, 16)
    changed = image.clone()
    changed[:, 1] += 1
    before, after = (network.core(single, each=True)[1] for single in (image, changed))
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_parts_are_the_light_decoders_at_every_scale_of_the_fused_one():
    network = fused(deep_supervision=True)
    image = torch.randn(1, 2, 16, 16)
    logits, parts = network.with_parts(image)
    assert list(parts) == ["a", "b"]
    for name, part in network.parts().items():
        assert [scale.shape for scale in parts[name]] == [scale.shape for scale in logits]
        assert torch.equal(parts[name][0], part(image))
    present = torch.tensor([[True, False], [True, True]])
    assert network.part_applies("b", present).tolist() == [False, True]
    assert network.stock_networks() == {}


def test_light_decoders_are_light():
    network = fused(scales=(), widths=(16, 32, 64))
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in network.core.named_children()}
    assert count["own_decoders"] < count["head"] / 5


@pytest.mark.parametrize("patch, most, expected", [((64, 64), 2 * 32 * 32, [1, 2]), ((64, 64), 2 * 32 * 32 - 1, [2]),
                                                   ((64, 64, 8), 10 ** 9, [1, 2]), ((64, 64), 0, [2])])
def test_where_attention_fits(patch, most, expected):
    strides = [[1] * len(patch), [2] * len(patch), [2] * len(patch)]
    assert attention_scales(strides, patch, 2, most) == expected


def test_other_architectures_are_refused():
    with pytest.raises(UserError, match="no nnU-Net encoder"):
        FusedNetwork({"a": nn.Conv2d(1, 1, 1)}, {"a": [0]}, [], 2, 0.0)
