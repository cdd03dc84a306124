"""Where mixed precision must be off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Within it operations on ``device`` have the precision of their inputs.

    Versions of torch before 2.5 know no mixed precision on MPS, and raise even where it is switched off; there it is
    never on (`nnunetv2_semi.training.step.TrainingStep.autocast`).
    """
    return nullcontext() if device.type == "mps" else torch.autocast(device.type, enabled=False)
