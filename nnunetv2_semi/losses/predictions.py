"""From logits to probabilities and hard decisions, for softmax labels and for region-based (sigmoid) labels alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Logits = torch.Tensor | Sequence[torch.Tensor]


def full_resolution(output: Logits) -> torch.Tensor:
    """The finest of a network's deep-supervision outputs, or the output itself."""
    return output if isinstance(output, torch.Tensor) else output[0]


def all_scales(output: Logits) -> list[torch.Tensor]:
    """All of a network's deep-supervision outputs, finest first, or the output itself, as a list."""
    return [output] if isinstance(output, torch.Tensor) else list(output)


def single_precision(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in float32 if it is of half precision, else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def probabilities(output: Logits, regions: bool) -> torch.Tensor:
    """Float32 (or float64) probabilities (B, K, *spatial) of the finest output: sigmoid for regions, else softmax."""
    logits = single_precision(full_resolution(output))
    return logits.sigmoid() if regions else logits.softmax(1)


def foreground(probability: torch.Tensor, regions: bool) -> torch.Tensor:
    """Foreground channels of (B, K, *spatial): all K for regions, all but the background channel 0 otherwise."""
    return probability if regions else probability[:, 1:]


def hard_foreground(probability: torch.Tensor, regions: bool) -> torch.Tensor:
    """Boolean foreground decisions (B, K_foreground, *spatial): > 0.5 per region, else argmax over classes."""
    if regions:
        return probability > 0.5
    winner = probability.argmax(1, keepdim=True)
    classes = torch.arange(1, probability.shape[1], device=probability.device)
    return winner == classes.view(1, -1, *[1] * (probability.ndim - 2))


def agreement(first: torch.Tensor, second: torch.Tensor, regions: bool) -> torch.Tensor:
    """Share of voxels (fraction, scalar) at which two probability maps (B, K, *spatial) decide the same."""
    if regions:
        return ((first > 0.5) == (second > 0.5)).all(1).float().mean()
    return (first.argmax(1) == second.argmax(1)).float().mean()


def decision_dice(first: torch.Tensor, second: torch.Tensor, regions: bool) -> torch.Tensor:
    """Dice of what two probability maps (B, K, *spatial) decide, (B,), the mean over foreground classes.

    A class that neither of the two predicts is left out; where both predict no foreground at all the Dice is 1.
    """
    ours, theirs = (hard_foreground(p, regions).flatten(2) for p in (first, second))
    both, together = (ours & theirs).sum(2), ours.sum(2) + theirs.sum(2)
    return (2 * both / together).nanmean(1).nan_to_num(1.0)


def class_codes(probability: torch.Tensor, regions: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The decided class (B, *spatial) integer of each voxel of (B, K, *spatial), and its probability (B, *spatial).

    For regions every combination of regions is a class; its number has bit k set where region k is predicted (K <= 62),
    and its probability is the product over regions.
    """
    if not regions:
        confidence, classes = probability.max(1)
        return classes, confidence
    bits = 1 << torch.arange(probability.shape[1], device=probability.device)
    predicted = probability > 0.5
    codes = (predicted * bits.view(1, -1, *[1] * (probability.ndim - 2))).sum(1)
    return codes, torch.maximum(probability, 1 - probability).prod(1)


def confusion_counts(
    probability: torch.Tensor, target: torch.Tensor, regions: bool, ignore_label: int | None
) -> torch.Tensor:
    """True positives, false positives, false negatives per foreground class: (3, K_foreground), float64 on the CPU's
    or GPU's own device (float32 on MPS, which has no float64).

    target: nnU-Net's full-resolution target, labels (B, 1, *spatial), or for regions one channel a region with the
    ignore channel last if there is an ignore label. Ignored voxels count nowhere.
    """
    predicted = hard_foreground(probability, regions)
    if regions:
        keep = target[:, -1:] == 0 if ignore_label is not None else None
        truth = target[:, : predicted.shape[1]] > 0
    else:
        keep = target != ignore_label if ignore_label is not None else None
        classes = torch.arange(1, probability.shape[1], device=target.device)
        truth = target == classes.view(1, -1, *[1] * (target.ndim - 2))
    hit, false_alarm, miss = predicted & truth, predicted & ~truth, ~predicted & truth
    if keep is not None:
        hit, false_alarm, miss = hit & keep, false_alarm & keep, miss & keep
    dtype = torch.float32 if probability.device.type == "mps" else torch.float64
    axes = [0, *range(2, probability.ndim)]
    return torch.stack([counted.sum(axes) for counted in (hit, false_alarm, miss)]).to(dtype)


def dice_from_counts(counts: torch.Tensor) -> torch.Tensor:
    """Mean Dice over foreground classes from (..., 3, K) counts; classes never seen nor predicted are left out (nan
    where none is left)."""
    hits, false_alarms, misses = counts.unbind(-2)
    return (2 * hits / (2 * hits + false_alarms + misses)).nanmean(-1)
