from copy import deepcopy

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn
from torch.utils.checkpoint import checkpoint

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.networks.decoder_features import ProjectedFeatures, cumulative_strides, level_of_resolution

STRIDES = [1, 2, 2, 2]


def network(cls=PlainConvUNet, dims=3, strides=STRIDES, deep_supervision=True):
    conv, norm = {2: (nn.Conv2d, nn.InstanceNorm2d), 3: (nn.Conv3d, nn.InstanceNorm3d)}[dims]
    stages = len(strides)
    return cls(1, stages, list(range(4, 4 + stages)), conv, 3, strides, [1] * stages, 3, [1] * (stages - 1), True, norm,
               {"affine": True}, nonlin=nn.LeakyReLU, deep_supervision=deep_supervision)


@pytest.mark.parametrize("cls", [PlainConvUNet, ResidualEncoderUNet])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("deep_supervision", [True, False])
def test_logits_are_the_networks_own_and_features_have_a_quarter_of_its_resolution(cls, dims, deep_supervision):
    unet = network(cls, dims, deep_supervision=deep_supervision)
    projected = ProjectedFeatures(unet, channels=5)
    image = torch.randn(2, 1, *[16] * dims)
    logits, features = projected(image)
    plain = unet(image)
    for a, b in zip(logits, plain, strict=True) if deep_supervision else [(logits, plain)]:
        assert torch.equal(a, b)
    assert features.shape == (2, 5, *[4] * dims)


@pytest.mark.parametrize("strides, resolution, level", [
    ([1, 2, 2, 2, 2], 4, 2), ([1, 2, 2, 2, 2], 2, 1), ([1, 2, 2, 2, 2], 1, 0),
    ([(1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2)], 4, 2), ([(1, 1, 1), (1, 4, 4), (2, 2, 2)], 4, 1),
    ([1, 2, 2], 4, 1), ([1, 8, 2], 4, 0)])
def test_the_level_is_the_coarsest_one_that_is_fine_enough_on_every_axis(strides, resolution, level):
    assert level_of_resolution(cumulative_strides(strides, 3), resolution) == level


def test_features_have_a_gradient_into_the_network_also_through_a_checkpoint():
    unet = network()
    projected = ProjectedFeatures(unet, channels=5)
    image = torch.randn(1, 1, 16, 16, 16)
    gradients = []
    for run in (projected, lambda x: checkpoint(projected, x, use_reentrant=False)):
        unet.zero_grad()
        run(image)[1].square().mean().backward()
        gradients.append(unet.encoder.stages[0][0].convs[0].conv.weight.grad.clone())
    assert gradients[0].abs().max() > 0 and torch.allclose(*gradients)


def test_only_the_head_is_its_own_and_nothing_is_kept_after_a_call():
    unet = network()
    projected = ProjectedFeatures(unet, channels=5)
    assert {name.split(".")[0] for name, _ in projected.named_parameters()} == {"head"}
    unet(torch.randn(1, 1, 16, 16, 16))
    assert projected._features is None
    copied = deepcopy(unet)
    copied(torch.randn(1, 1, 16, 16, 16))
    assert projected._features is None and unet.state_dict().keys() == copied.state_dict().keys()


def test_a_network_built_otherwise_is_refused():
    with pytest.raises(UserError, match="contrast"):
        ProjectedFeatures(nn.Conv3d(1, 2, 1))
