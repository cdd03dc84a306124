"""Low-rank adapters (LoRA): frozen layers that learn a change of low rank to their weight.

Source: Hu et al., "LoRA: Low-rank adaptation of large language models", ICLR 2022.

An adapted layer computes W x + s B A x, where A maps to ``rank`` channels, B maps back, and s = alpha / rank. A starts
as PyTorch starts such a layer (Kaiming uniform), B at zero, so that the adapted layer starts as the frozen one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

_CONVOLUTION: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class Adapter(nn.Module, ABC):
    """A layer ``base``, frozen, beside which a low-rank change of its weight trains.

    Args:
        base: taken over, not copied.
        rank: at least 1.
        alpha: the change is scaled by alpha / rank; None: not scaled.
    """

    base: nn.Linear | nn.modules.conv._ConvNd

    def __init__(self, base: nn.Linear | nn.modules.conv._ConvNd, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.base = base.requires_grad_(False)
        self.scaling = 1.0 if alpha is None else alpha / rank

    @abstractmethod
    def weight_change(self) -> torch.Tensor:
        """s B A, of the shape of the base's weight."""

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A plain layer, frozen, that gives what this one gives: its weight is W + s B A."""
        layer = deepcopy(self.base)
        layer.weight.add_(self.weight_change())
        return layer


class LoRALinear(Adapter):
    """Of a linear layer, (..., in) -> (..., out)."""

    base: nn.Linear

    def __init__(self, base: nn.Linear, rank: int, alpha: float | None = None) -> None:
        super().__init__(base, rank, alpha)
        self.down, self.up = _linear_pair(base.weight, base.out_features, rank)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.base(features) + self.scaling * self.up(self.down(features))

    def weight_change(self) -> torch.Tensor:
        return self.scaling * self.up.weight @ self.down.weight


class LoRAQueryValue(Adapter):
    """Of the fused query, key and value projection of an attention layer, (..., dim) -> (..., 3 dim).

    Query and value have an adapter each. The key is the frozen layer's, to the bit. An ordinary adapter of the fused
    layer, which is what a library that adapts layers by their name would put here, would change the key too and make
    all three share A.
    """

    base: nn.Linear

    def __init__(self, base: nn.Linear, rank: int, alpha: float | None = None) -> None:
        super().__init__(base, rank, alpha)
        dim, remainder = divmod(base.out_features, 3)
        if remainder:
            raise ValueError(f"a fused projection has three parts, got {base.out_features} outputs")
        self.query_down, self.query_up = _linear_pair(base.weight, dim, rank)
        self.value_down, self.value_up = _linear_pair(base.weight, dim, rank)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        query, key, value = self.base(features).chunk(3, -1)
        return torch.cat([query + self.scaling * self.query_up(self.query_down(features)), key,
                          value + self.scaling * self.value_up(self.value_down(features))], -1)

    def weight_change(self) -> torch.Tensor:
        query, value = self.query_up.weight @ self.query_down.weight, self.value_up.weight @ self.value_down.weight
        return self.scaling * torch.cat([query, torch.zeros_like(query), value])


class LoRAConvolution(Adapter):
    """Of a convolution without groups: A is a convolution of the same kernel to ``rank`` channels, B one of size 1."""

    base: nn.modules.conv._ConvNd

    def __init__(self, base: nn.modules.conv._ConvNd, rank: int, alpha: float | None = None) -> None:
        super().__init__(base, rank, alpha)
        _refuse_groups(base)
        kind = _CONVOLUTION[base.weight.ndim - 2]
        self.down = kind(base.in_channels, rank, base.kernel_size, base.stride, base.padding, base.dilation, bias=False,
                         padding_mode=base.padding_mode).to(base.weight)
        self.up = kind(rank, base.out_channels, 1, bias=False).to(base.weight)
        nn.init.zeros_(self.up.weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.base(features) + self.scaling * self.up(self.down(features))

    def weight_change(self) -> torch.Tensor:
        # o: output, r: rank, i: input channels; the kernel's axes follow
        return self.scaling * torch.einsum("or,ri...->oi...", self.up.weight.flatten(1), self.down.weight)


class LoRATransposedConvolution(Adapter):
    """Of a transposed convolution without groups: A is of size 1, B a transposed convolution of the same kernel."""

    base: nn.modules.conv._ConvTransposeNd

    def __init__(self, base: nn.modules.conv._ConvTransposeNd, rank: int, alpha: float | None = None) -> None:
        super().__init__(base, rank, alpha)
        _refuse_groups(base)
        dims = base.weight.ndim - 2
        self.down = _CONVOLUTION[dims](base.in_channels, rank, 1, bias=False).to(base.weight)
        self.up = _TRANSPOSED[dims](rank, base.out_channels, base.kernel_size, base.stride, base.padding,
                                    base.output_padding, bias=False, dilation=base.dilation).to(base.weight)
        nn.init.zeros_(self.up.weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.base(features) + self.scaling * self.up(self.down(features))

    def weight_change(self) -> torch.Tensor:
        # a transposed convolution's weight has its input channels first
        return self.scaling * torch.einsum("ri,ro...->io...", self.down.weight.flatten(1), self.up.weight)


def adapt_convolutions(network: nn.Module, rank: int, alpha: float | None = None,
                       but: Iterable[nn.Module] = ()) -> int:
    """Put an adapter in the place of every convolution of ``network``, plain or transposed, except those in ``but``.

    A layer that the network holds at several places has one adapter. Returns the number of adapters.
    """
    kept = {id(layer) for layer in but}
    adapters: dict[nn.Module, nn.Module] = {}
    for layer in list(network.modules()):
        if id(layer) in kept:
            continue
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            adapters[layer] = LoRATransposedConvolution(layer, rank, alpha)
        elif isinstance(layer, nn.modules.conv._ConvNd):
            adapters[layer] = LoRAConvolution(layer, rank, alpha)
    replace_layers(network, adapters)
    return len(adapters)


def merge_adapters(network: nn.Module) -> int:
    """Put the plain layer with the same output in the place of every adapter in ``network``; returns their number."""
    adapters: dict[nn.Module, nn.Module] = {layer: layer.merged() for layer in network.modules()
                                            if isinstance(layer, Adapter)}
    replace_layers(network, adapters)
    return len(adapters)


def replace_layers(network: nn.Module, by: Mapping[nn.Module, nn.Module]) -> None:
    """Replace each layer that ``by`` has as a key, wherever ``network`` holds it, by that key's value."""
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in by:
                parent._modules[name] = by[child]


def _linear_pair(weight: torch.Tensor, out_features: int, rank: int) -> tuple[nn.Linear, nn.Linear]:
    """A and B for a linear layer with such a ``weight`` (out, in), of which ``out_features`` outputs change."""
    down = nn.Linear(weight.shape[1], rank, bias=False).to(weight)
    up = nn.Linear(rank, out_features, bias=False).to(weight)
    nn.init.zeros_(up.weight)
    return down, up


def _refuse_groups(layer: nn.modules.conv._ConvNd) -> None:
    if layer.groups != 1:
        raise ValueError(f"a convolution with {layer.groups} groups has no adapter here")
