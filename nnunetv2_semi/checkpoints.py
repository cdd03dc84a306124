"""Checkpoints: nnU-Net's own format for the deployed network, everything else under one key of ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nnunetv2_semi import __version__
from nnunetv2_semi.data.whole_files import whole_file
from nnunetv2_semi.errors import UserError

KEY = "nnunetv2_semi"


def save_whole(checkpoint: Mapping[str, object], path: str) -> None:
    """``torch.save`` under a temporary name in the same folder, then rename: a kill leaves the older file intact."""
    with whole_file(path) as unfinished:
        torch.save(checkpoint, unfinished)


def snapshot_file(number: int) -> str:
    """Name of the checkpoint kept on the way, counted from 1."""
    return f"checkpoint_snapshot_{number}.pth"


def our_part(method_state: Mapping[str, object], method_name: str, semi: Mapping[str, object],
             optimizer_states: list[dict], unlabelled_foreground: Mapping[str, object]) -> dict[str, object]:
    """What continues a training besides nnU-Net's own entries.

    The random state is not among it: every step's is drawn anew from (seed, step), so the epoch number says it all.
    """
    return {"version": __version__, "method": method_name, "semi": dict(semi), "method_state": dict(method_state),
            "optimizer_states": optimizer_states, "unlabelled_foreground": dict(unlabelled_foreground)}


def read_our_part(checkpoint: Mapping[str, object], method_name: str, path: str) -> dict:
    """Our part of a loaded checkpoint. Raises UserError if another trainer wrote it."""
    ours = checkpoint.get(KEY)
    if not isinstance(ours, dict) or ours["method"] != method_name:
        writer = f"the method {ours['method']}" if isinstance(ours, dict) else "a trainer without unlabelled data"
        raise UserError(f"{path} was written by {writer}, not by {method_name}. To start from its weights use "
                        "nnUNetv2_train ... -pretrained_weights instead of --c.")
    return ours


def changed_settings(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Which settings a continued training has that the interrupted one had not, as 'name: old -> new'."""
    def flat(semi: Mapping[str, object]) -> dict[str, object]:
        nested = {k: v for value in semi.values() if isinstance(value, dict) for k, v in value.items()}
        return {**{k: v for k, v in semi.items() if not isinstance(v, dict)}, **nested}
    old, new = flat(before), flat(now)
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in {**old, **new} if old.get(name) != new.get(name)]
