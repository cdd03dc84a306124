"""Gradient checkpointing of nnU-Net's networks, stage by stage."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_stages(module: nn.Module) -> int:
    """Let every stage of nnU-Net's encoders and decoders in ``module`` keep its input and output alone.

    What is within a stage is computed again for its gradient: less memory, about a third more time. Weights and
    results stay as they are. Returns the number of stages.
    """
    lists = [getattr(part, "stages", None) for part in module.modules()]
    stages = [stage for found in lists if isinstance(found, nn.Sequential | nn.ModuleList) for stage in found]
    keep_inputs_alone(stages)
    return len(stages)


def keep_inputs_alone(layers: Iterable[nn.Module]) -> None:
    """Let each of ``layers`` keep its input alone; what is within is computed again for its gradient."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
