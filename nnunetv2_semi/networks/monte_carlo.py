"""Several passes of a network that differ by dropout and by noise on the input (Gal and Ghahramani, ICML 2016)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from nnunetv2_semi.losses.predictions import probabilities

Input = TypeVar("Input")


@contextmanager
def dropout_active(network: nn.Module) -> Iterator[None]:
    """Within the block dropout drops; everything else in the network stays as it is."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.modules.dropout._DropoutNd)]
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training


def summed_probabilities(network: nn.Module, images: Iterable[Input], regions: bool) -> torch.Tensor:
    """Sum of the probabilities (B, K, *spatial) that passes with dropout active give, without a graph.

    Args:
        network: gives logits, or a list of them, finest first.
        images: the input of each pass, such as (B, C, *spatial), made when it is its turn; at least one.
        regions: region-based labels.
    """
    total: torch.Tensor | float = 0.0
    with torch.no_grad(), dropout_active(network):
        for image in images:
            total = total + probabilities(network(image), regions)
    assert isinstance(total, torch.Tensor)
    return total
