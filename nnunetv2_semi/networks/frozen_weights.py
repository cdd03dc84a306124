"""Frozen weights that came from a file: kept in memory once, and never written into checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn


def leave_out_of_state_dict(module: nn.Module, names: Iterable[str]) -> None:
    """Let ``module.state_dict()`` have no entry for the parameters or buffers ``names``, and loading not ask for them.

    A state dict that has them loads as well. Holds for deep copies of ``module``, too.

    Raises:
        KeyError: ``module`` has no parameter or buffer of that name.
    """
    left_out = frozenset(names)
    unknown = left_out - module.state_dict().keys()
    if unknown:
        raise KeyError(f"{type(module).__name__} has no parameter or buffer {', '.join(sorted(unknown))}")
    module._register_state_dict_hook(partial(_remove, left_out))
    module._register_load_state_dict_pre_hook(partial(_complete, left_out), with_module=True)


def shared_when_frozen(module: nn.Module) -> dict[int, Any]:
    """What ``copy.deepcopy(module, memo)`` takes as memo, so that the copy shares the parameters that do not train."""
    return {id(parameter): parameter for parameter in module.parameters() if not parameter.requires_grad}


def _remove(names: frozenset[str], module: nn.Module, state: dict[str, torch.Tensor], prefix: str, _: object) -> None:
    for name in names:
        state.pop(prefix + name, None)


def _complete(names: frozenset[str], module: nn.Module, state: dict[str, torch.Tensor], prefix: str,
              *_: object) -> None:
    """``state`` is torch's own copy of what is loaded; parameters are handed to themselves."""
    own = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    for name in names:
        state.setdefault(prefix + name, own[name].detach())
