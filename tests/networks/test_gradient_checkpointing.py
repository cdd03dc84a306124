from copy import deepcopy

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunetv2_semi.networks.decoder_features import ProjectedFeatures
from nnunetv2_semi.networks.gradient_checkpointing import checkpoint_stages
from nnunetv2_semi.networks.modality_encoders import ModalityEncoders


def network(cls):
    torch.manual_seed(0)
    return cls(1, 3, [4, 8, 8], nn.Conv3d, 3, [1, 2, 2], [1, 1, 1], 3, [1, 1], True, nn.InstanceNorm3d,
               {"affine": True}, nonlin=nn.LeakyReLU, deep_supervision=True)


def saved_bytes(run, image):
    """Bytes that autograd keeps for the backward pass, each storage once."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs, features = run(image)
        total = sum(output.square().mean() for output in outputs) + features.square().mean()
    size = sum(kept.values())
    total.backward()
    return size


@pytest.mark.parametrize("cls", [PlainConvUNet, ResidualEncoderUNet])
def test_same_gradients_and_weights_with_less_kept(cls):
    plain, saving = network(cls), network(cls)
    assert checkpoint_stages(saving) == 3 + 2
    image = torch.randn(2, 1, 16, 16, 16)
    projected = [ProjectedFeatures(n, 2, 4) for n in (plain, saving)]
    projected[1].load_state_dict(projected[0].state_dict())
    kept = [saved_bytes(run, image) for run in projected]
    assert kept[1] < 0.7 * kept[0]
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name
    assert plain.state_dict().keys() == saving.state_dict().keys()


def test_modality_encoders_and_their_decoder_too():
    names = {"CT": [0], "MR": [1]}
    assert checkpoint_stages(ModalityEncoders({name: network(PlainConvUNet) for name in names}, names)) == 3 + 3 + 2


def test_a_copy_recomputes_its_own_stages():
    original = network(PlainConvUNet)
    checkpoint_stages(original)
    copied = deepcopy(original)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    image = torch.randn(1, 1, 16, 16, 16)
    assert copied(image)[0].abs().max() == 0 and original(image)[0].abs().max() > 0
