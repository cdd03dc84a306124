"""What depends on how far a training is: pure functions. Progress is a fraction from 0 (first step) to 1 (last)."""

from __future__ import annotations

import math


def sigmoid_ramp_up(progress: float, ramp_fraction: float = 1.0, power: int = 2) -> float:
    """Weight of an unlabelled term: exp(-5 (1 - t)^power), t = progress / ramp_fraction, 1 from there on.

    Raises ValueError if ``ramp_fraction`` is negative. Source: Laine and Aila, ICLR 2017, "Temporal ensembling", with
    power 2.
    """
    if ramp_fraction < 0:
        raise ValueError(f"ramp_fraction must not be negative, got {ramp_fraction}")
    if progress >= ramp_fraction:
        return 1.0
    return math.exp(-5.0 * (1.0 - max(progress, 0.0) / ramp_fraction) ** power)


def rising_threshold(progress: float, start: float, warmup: float) -> float:
    """Confidence threshold start + (1 - start) min(0.9, progress / warmup); without a warm-up it is risen at once."""
    risen = 0.9 if warmup <= 0 else min(0.9, max(progress, 0.0) / warmup)
    return start + (1.0 - start) * risen


def warmed_up_poly(step: int, warmup: int, steps: int, exponent: float = 0.9) -> float:
    """Share of the initial learning rate at step number ``step`` of ``steps``, both from 0.

    It rises linearly over the first ``warmup`` steps, then falls as nnU-Net's: (1 - t)^exponent, t from 0 to 1.
    """
    if step < warmup:
        return (step + 1) / warmup
    return max(1.0 - (step - warmup) / max(steps - warmup, 1), 0.0) ** exponent


def warmed_up_decay(updates: int, decay: float) -> float:
    """EMA decay after ``updates`` earlier updates: min(1 - 1 / (t + 1), decay), so that the first update copies."""
    return min(1.0 - 1.0 / (updates + 1), decay)


def decay_for_length(steps: int) -> float:
    """EMA decay for a training of so many steps: the teacher averages the last fiftieth of it, 10 to 1000 steps.

    0.99 for 5000 steps, 0.999 from 50 000 steps on. A fixed 0.99 averages a quarter of a training of 400 steps, and of
    nnU-Net's 250 000 no more than the optimiser's momentum does.
    """
    return 1.0 - 1.0 / min(max(steps / 50, 10), 1000)


def snapshot_after(epochs: int, num_epochs: int, snapshots: int) -> int | None:
    """Number (from 1) of the snapshot due after so many epochs, None if none is.

    ``snapshots`` of them and the end of training divide it into equal parts.
    """
    for number in range(1, snapshots + 1):
        if epochs == round(num_epochs * number / (snapshots + 1)) and epochs < num_epochs:
            return number
    return None
