"""A loss over all of a network's deep-supervision outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def summed_over_scales(weights: Sequence[float], loss: Callable[..., torch.Tensor],
                       *scales: Sequence[torch.Tensor]) -> torch.Tensor:
    """sum_k weights[k] loss(a[k], b[k], ...), a scalar, for ``scales`` a, b, ...

    Args:
        weights: of the outputs, finest first. An output of weight 0 is left out: its loss is not computed.
        loss: of what belongs to one output, a scalar.
        scales: outputs, targets and whatever else the loss takes, each as a list with one item an output.

    Raises:
        ValueError: the lists differ in length.
    """
    losses = [weight * loss(*single) for weight, *single in zip(weights, *scales, strict=True) if weight != 0]
    return torch.stack(losses).sum()
