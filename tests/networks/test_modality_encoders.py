import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.networks.modality_encoders import ModalityEncoders
from nnunetv2_semi.present_channels import fill_absent

CHANNELS = {"CT": [1], "MR": [0, 2]}
OWN = torch.tensor([[False, True, False], [True, False, True]])


def network(channels, deep_supervision=False, kind=PlainConvUNet):
    return kind(channels, 3, [4, 8, 12], nn.Conv2d, 3, [1, 2, 2], 1, 3, 1, norm_op=nn.InstanceNorm2d,
                nonlin=nn.LeakyReLU, deep_supervision=deep_supervision)


def make(deep_supervision=False, kind=PlainConvUNet):
    torch.manual_seed(0)
    networks = {name: network(len(own), deep_supervision, kind) for name, own in CHANNELS.items()}
    return ModalityEncoders(networks, CHANNELS), networks


def image_of(modalities):
    torch.manual_seed(1)
    return fill_absent(torch.randn(len(modalities), 3, 8, 12), OWN[list(modalities)])


@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_a_modality_goes_through_its_encoder_and_the_shared_decoder(kind, deep_supervision):
    encoders, networks = make(deep_supervision, kind)
    image = image_of([1])
    logits, _ = encoders(image)
    expected = networks["CT"].decoder(networks["MR"].encoder(image[:, [0, 2]]))
    expected = expected if deep_supervision else [expected]
    assert len(logits) == len(expected)
    for a, b in zip(logits, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_patches_of_several_modalities_come_back_in_their_order():
    encoders, _ = make()
    order = [1, 0, 1, 0]
    image = image_of(order)
    logits, pyramid = encoders(image)
    assert encoders.modality(image).tolist() == order
    for row in range(4):
        alone, its = encoders(image[row:row + 1])
        assert torch.allclose(logits[0][row:row + 1], alone[0], atol=1e-5)
        for stage, single in zip(pyramid, its, strict=True):
            assert torch.allclose(stage[row:row + 1], single, atol=1e-5)
    assert [stage.shape[1] for stage in pyramid] == encoders.widths == [8, 4]


def test_an_encoder_learns_from_its_modality_alone_and_the_decoder_from_all():
    encoders, _ = make()
    encoders(image_of([1, 1]))[0][0].square().mean().backward()
    assert all(p.grad is None for p in encoders.encoders[0].parameters())
    assert any(p.grad.abs().sum() > 0 for p in encoders.encoders[1].parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoders.decoder.parameters())


def test_weights_are_saved_once():
    encoders, _ = make()
    assert not any(".encoder." in name for name in encoders.state_dict())


def test_another_kind_of_network_is_refused():
    with pytest.raises(UserError, match="share a decoder"):
        ModalityEncoders({"CT": nn.Conv2d(1, 1, 1), "MR": nn.Conv2d(2, 1, 1)}, CHANNELS)
