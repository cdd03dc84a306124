"""Patches mirrored on the training device, with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Flips:
    """Along which axes each patch of a batch is mirrored.

    mirrored: bool (B, axes), on the CPU. axes: spatial axes of a patch that may be mirrored, from 0.
    """

    mirrored: torch.Tensor
    axes: tuple[int, ...]

    @classmethod
    def draw(cls, number: int, axes: Sequence[int]) -> Flips:
        """Each axis of each of ``number`` patches with probability 1/2, from torch's global random state of the CPU."""
        return cls(torch.rand(number, len(axes)) < 0.5, tuple(axes))

    def of(self, patches: torch.Tensor) -> torch.Tensor:
        """``patches`` (B, C, *spatial), mirrored."""
        for column, axis in enumerate(self.axes):
            rows = self.mirrored[:, column].to(patches.device).view(-1, *[1] * (patches.ndim - 1))
            patches = torch.where(rows, patches.flip(axis + 2), patches)
        return patches
