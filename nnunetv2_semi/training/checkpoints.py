"""Checkpoints: nnU-Net's own format for the deployed network, everything else under one key of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from nnunetv2_semi import __version__
from nnunetv2_semi.data.atomic_files import whole_file
from nnunetv2_semi.errors import UserError

if TYPE_CHECKING:
    from nnunetv2_semi.trainer import nnUNetTrainerSemi

KEY = "nnunetv2_semi"


def save_whole(checkpoint: Mapping[str, object], path: str) -> None:
    """``torch.save`` under a temporary name in the same folder, then rename: a kill leaves the older file intact."""
    with whole_file(path) as unfinished:
        torch.save(checkpoint, unfinished)


def snapshot_file(number: int) -> str:
    """Name of the checkpoint kept on the way, counted from 1."""
    return f"checkpoint_snapshot_{number}.pth"


def contents(trainer: nnUNetTrainerSemi) -> dict[str, object]:
    """What a checkpoint holds: nnU-Net's own entries, and under one key of ours what continues the training.

    The random state is not among it: every step's is drawn anew from (seed, step), so the epoch number says it all.
    """
    scaler, further = trainer.grad_scaler, trainer.optimizations[1:]
    return {
        "network_weights": trainer.method.deployable().state_dict(),
        "optimizer_state": trainer.optimizer.state_dict(),
        "grad_scaler_state": scaler.state_dict() if scaler is not None else None,
        "logging": trainer.logger.get_checkpoint(),
        "_best_ema": trainer._best_ema,
        "current_epoch": trainer.current_epoch + 1,
        "init_args": trainer.my_init_kwargs,
        "trainer_name": type(trainer).__name__,
        "inference_allowed_mirroring_axes": trainer.inference_allowed_mirroring_axes,
        KEY: {
            "version": __version__, "method": trainer.method.name, "semi": dict(trainer.semi),
            "method_state": trainer.method.state_dict(),
            "optimizer_states": [optimization.state_dict() for optimization in further],
            "unlabelled_foreground": trainer.foreground,
        },
    }


def restore(trainer: nnUNetTrainerSemi, checkpoint: Mapping[str, Any], path: str) -> None:
    """Give a trainer what `contents` wrote; ``path`` is for messages.

    Raises UserError if another trainer wrote it, or one whose settings make other networks.
    """
    ours = read_our_part(checkpoint, trainer.method.name, path)
    changes = changed_settings(ours["semi"], trainer.semi)
    for change in changes:
        trainer.print_to_log_file(f"WARNING: the checkpoint was made with another setting, {change}")
    states = [{"optimizer": checkpoint["optimizer_state"]}, *ours["optimizer_states"]]
    try:
        trainer.method.load_state_dict(ours["method_state"])
        for optimization, state in zip(trainer.optimizations, states, strict=True):
            optimization.load_state_dict(state)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        if not changes or isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise UserError(f"{path} does not fit the settings, which have changed since it was written: "
                        f"{'; '.join(changes)}. Set them back, or train anew, without --c.") from error
    trainer.my_init_kwargs = checkpoint["init_args"]
    trainer.current_epoch = checkpoint["current_epoch"]
    trainer.logger.load_checkpoint(checkpoint["logging"])
    trainer._best_ema = checkpoint["_best_ema"]
    trainer.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
    trainer.foreground = ours.get("unlabelled_foreground", {})
    if trainer.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
        trainer.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])


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
