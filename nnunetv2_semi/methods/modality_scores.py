"""Which modality is better, by its Dice on labelled training patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nnunetv2_semi.distributed import sum_over_processes
from nnunetv2_semi.losses.predictions import Logits, confusion_counts, dice_from_counts, probabilities
from nnunetv2_semi.methods.contract import Target
from nnunetv2_semi.methods.rows import Rows

_MEMORY = 0.99  # of the counts, per step


class ModalityScores(nn.Module):
    """Smoothed Dice of each modality on the labelled patches it was trained with; its state goes into checkpoints.

    names: of the modalities. regions: region-based labels. ignore_label: of the targets.
    """

    counts: torch.Tensor

    def __init__(self, names: Sequence[str], regions: bool, ignore_label: int | None) -> None:
        super().__init__()
        self.names, self.regions, self.ignore_label = tuple(names), regions, ignore_label
        self.best = self.names[0]
        # (modality, true positive / false positive / false negative, foreground class), decayed sums over steps
        self.register_buffer("counts", torch.zeros(len(self.names), 3, 0))
        self._step: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def count(self, name: str, output: Logits, target: Target, rows: Rows) -> None:
        """Note this step's prediction by modality ``name`` of those labelled patches, ``rows``, that have it."""
        finest = target if isinstance(target, torch.Tensor) else target[0]
        predicted = probabilities(output, self.regions)
        self._step[name] = confusion_counts(predicted, finest, self.regions, self.ignore_label) * (not rows.empty)

    def after_step(self) -> None:
        """Add this step's counts, of all processes."""
        counts = sum_over_processes(torch.stack([self._step[name] for name in self.names]))
        if self.counts.shape[-1] == 0:
            self.counts = torch.zeros_like(counts)
        self.counts.mul_(_MEMORY).add_(counts)

    def dice(self) -> torch.Tensor:
        """Of each modality, in the order of ``names``; 0 where nothing was counted."""
        return torch.nan_to_num(dice_from_counts(self.counts))

    def choose(self) -> None:
        """Set ``best`` to the modality with the highest Dice."""
        dice = self.dice().tolist()
        self.best = self.names[dice.index(max(dice))]

    def get_extra_state(self) -> str:
        return self.best

    def set_extra_state(self, state: str) -> None:
        self.best = state

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        self.counts = torch.zeros_like(state_dict[prefix + "counts"], device=self.counts.device)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
