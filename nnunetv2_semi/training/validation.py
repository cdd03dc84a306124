"""What lets nnU-Net's validation step take predictions that were made before, and be asked of some patches alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunetv2_semi.distributed import sum_over_processes
from nnunetv2_semi.losses.predictions import Logits, dice_from_counts
from nnunetv2_semi.methods.rows import Rows


@contextmanager
def without_loss(trainer: nnUNetTrainer) -> Iterator[None]:
    """Within the block nnU-Net's validation step computes counts alone.

    Its loss exchanges sums between processes, which may have different numbers of some patches.
    """
    loss, trainer.loss = trainer.loss, lambda output, target: torch.zeros(())
    try:
        yield
    finally:
        trainer.loss = loss


COUNTS = ("tp_hard", "fp_hard", "fn_hard")  # what nnU-Net's validation step returns


class Predicted(nn.Module):
    """Gives logits that were predicted before."""

    def __init__(self, logits: Logits) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, image: torch.Tensor) -> Logits:
        return self.logits


def rows_with_own_target(batch: dict, rows: Rows) -> dict:
    """Some patches; nnU-Net's validation step writes into the target where there is an ignore label, so they get one of
    their own."""
    target = rows.of(batch["target"])
    return {"data": rows.of(batch["data"]),
            "target": [t.clone() for t in target] if isinstance(target, list) else target.clone()}


def dice_by_name(outputs: Sequence[Mapping[str, np.ndarray]], device: torch.device) -> dict[str, float]:
    """"validation_dice_<name>" of an epoch, for each name that stands behind "/" in the keys of validation steps."""
    dice = {}
    for name in dict.fromkeys(key.partition("/")[2] for key in outputs[0] if "/" in key):
        counts = np.stack([np.sum([output[f"{count}/{name}"] for output in outputs], 0) for count in COUNTS])
        summed = sum_over_processes(torch.from_numpy(counts.astype(np.float32)).to(device))
        dice[f"validation_dice_{name}"] = float(dice_from_counts(summed))
    return dice
