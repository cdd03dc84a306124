"""Low-rank adapters: what trains, what stays, and that merged layers give the same."""

import pytest
import torch
from torch import nn

from nnunetv2_semi.networks.lora import (
    Adapter,
    LoRAConvolution,
    LoRALinear,
    LoRAQueryValue,
    LoRATransposedConvolution,
    adapt_convolutions,
    merge_adapters,
)

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), LoRALinear, (3, 6)),
    "query_value": (lambda: nn.Linear(6, 18), LoRAQueryValue, (2, 4, 6)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, 2, 1), LoRAConvolution, (2, 3, 8, 9)),
    "conv2d_circular": (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), LoRAConvolution, (2, 3, 8, 9)),
    "conv3d": (lambda: nn.Conv3d(3, 5, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False), LoRAConvolution, (2, 3, 4, 6, 6)),
    "conv_dilated": (lambda: nn.Conv2d(3, 5, 3, dilation=2), LoRAConvolution, (2, 3, 8, 8)),
    "transposed2d": (lambda: nn.ConvTranspose2d(5, 3, 2, 2), LoRATransposedConvolution, (2, 5, 4, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(5, 3, [1, 2, 2], [1, 2, 2]), LoRATransposedConvolution,
                     (2, 5, 3, 4, 4)),
    "transposed_padded": (lambda: nn.ConvTranspose2d(5, 3, 3, 2, 1, 1), LoRATransposedConvolution, (2, 5, 4, 4)),
}


def adapted(name, trained=True, **options):
    torch.manual_seed(0)
    make, kind, shape = LAYERS[name]
    adapter = kind(make(), 2, **options)
    if trained:
        for parameter_name, parameter in adapter.named_parameters():
            if "up" in parameter_name:
                nn.init.normal_(parameter)
    return adapter, torch.randn(shape)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_merged_weights_give_the_same(name, alpha):
    adapter, features = adapted(name, alpha=alpha)
    merged = adapter.merged()
    assert type(merged) is type(adapter.base)
    assert (merged(features) - adapter(features)).abs().max() < 1e-6 * max(1, adapter(features).abs().max())
    assert (adapter(features) - adapter.base(features)).abs().max() > 0.01


@pytest.mark.parametrize("name", LAYERS)
def test_starts_as_the_frozen_layer(name):
    adapter, features = adapted(name, trained=False)
    assert torch.equal(adapter(features), adapter.base(features))


@pytest.mark.parametrize("name", LAYERS)
def test_only_the_adapter_gets_gradients(name):
    adapter, features = adapted(name)
    adapter(features).square().sum().backward()
    assert {n for n, p in adapter.named_parameters() if p.grad is not None} == \
        {n for n, _ in adapter.named_parameters() if not n.startswith("base.")}


@pytest.mark.parametrize("name", LAYERS)
def test_the_change_has_the_rank_and_is_scaled_by_alpha_over_rank(name):
    plain, _ = adapted(name)
    scaled, _ = adapted(name, alpha=6.0)
    assert torch.allclose(scaled.weight_change(), 3 * plain.weight_change())
    if name == "linear":
        assert torch.linalg.matrix_rank(plain.weight_change()) == 2
        assert torch.allclose(plain.weight_change(), plain.up.weight @ plain.down.weight)


def test_query_and_value_have_an_adapter_each_and_the_key_is_untouched():
    adapter, features = adapted("query_value")
    before, after = adapter.base(features).split(6, -1), adapter(features).split(6, -1)
    assert torch.equal(after[1], before[1])
    for part, down, up in ((0, adapter.query_down, adapter.query_up), (2, adapter.value_down, adapter.value_up)):
        assert torch.allclose(after[part], before[part] + features @ (up.weight @ down.weight).T, atol=1e-5)
    assert not torch.equal(adapter.query_down.weight, adapter.value_down.weight)
    merged = adapter.merged()
    assert torch.equal(merged.weight[6:12], adapter.base.weight[6:12])


class Twice(nn.Module):
    """Holds its convolution under two names, as nnU-Net's blocks do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.all_modules = nn.Sequential(self.conv, nn.ReLU())
        self.up = nn.ConvTranspose2d(4, 2, 2, 2)
        self.head = nn.Conv2d(2, 2, 1)

    def forward(self, image):
        return self.head(self.up(self.all_modules(image)))


def test_convolutions_of_a_network_are_adapted_once_each_and_merge_back():
    torch.manual_seed(0)
    network, image = Twice(), torch.randn(1, 2, 4, 4)
    names = list(network.state_dict())
    assert adapt_convolutions(network, 2, but=[network.head]) == 2
    assert network.conv is network.all_modules[0] and isinstance(network.conv, LoRAConvolution)
    assert type(network.head) is nn.Conv2d and network.head.weight.requires_grad
    for adapter in (network.conv, network.up):
        nn.init.normal_(adapter.up.weight)
    expected = network(image)
    assert merge_adapters(network) == 2
    assert not any(isinstance(module, Adapter) for module in network.modules())
    assert list(network.state_dict()) == names
    assert torch.allclose(network(image), expected, atol=1e-6)


def test_refuses_what_it_cannot_adapt():
    with pytest.raises(ValueError, match="rank"):
        LoRALinear(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match="groups"):
        LoRAConvolution(nn.Conv2d(4, 4, 3, groups=2), 1)
    with pytest.raises(ValueError, match="three parts"):
        LoRAQueryValue(nn.Linear(2, 4), 1)


def test_adapter_is_of_the_layers_precision():
    adapter = LoRALinear(nn.Linear(2, 2).double(), 1)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float64}
