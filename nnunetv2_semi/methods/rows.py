"""The patches of a batch that a term of the loss applies to, where cases may lack modalities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

import torch

from nnunetv2_semi.losses.predictions import Logits

Patches = TypeVar("Patches", torch.Tensor, list[torch.Tensor], torch.Tensor | list[torch.Tensor], Logits)


@dataclass(frozen=True)
class Rows:
    """Some patches of a batch.

    number: of the patches. index: theirs, on the CPU; None for all of the batch. Where there is no such patch ``of``
    gives all, for a term that does not apply: processes that train together must all compute it, since nnU-Net's loss
    exchanges sums.
    """

    number: int
    index: torch.Tensor | None = None

    @classmethod
    def where(cls, applies: torch.Tensor) -> Rows:
        """The patches of which ``applies``, bool (B,) on the CPU, is true."""
        index = applies.nonzero()[:, 0]
        return cls(len(index), index if 0 < len(index) < len(applies) else None)

    @classmethod
    def with_modality(cls, present: torch.Tensor | None, index: int, patches: int) -> Rows:
        """Of so many patches those whose cases have modality ``index``; present: bool (B, modalities), None: all."""
        return cls(patches) if present is None else cls.where(present[:, index])

    @property
    def empty(self) -> bool:
        """Whether there is no such patch."""
        return self.number == 0

    def of(self, patches: Patches) -> Patches:
        """These rows of a tensor (B, ...), or of each tensor of a list."""
        if self.index is None:
            return patches
        if isinstance(patches, torch.Tensor):
            return patches[self.index.to(patches.device, non_blocking=True)]
        return [self.of(scale) for scale in patches]


def of_patches_with_both(predicted: Sequence[torch.Tensor],
                          present: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Predictions of two modalities for the patches that have both, of all pairs of which there are patches.

    Args:
        predicted: (B, K, *spatial) of each modality.
        present: bool (B, modalities) on the CPU.
    """
    pairs = []
    for first, second in combinations(range(len(predicted)), 2):
        both = Rows.where(present[:, [first, second]].all(1))
        if not both.empty:
            pairs.append((both.of(predicted[first]), both.of(predicted[second])))
    return pairs
