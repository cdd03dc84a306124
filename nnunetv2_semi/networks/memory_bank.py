"""Negatives of earlier steps."""

from __future__ import annotations

from collections import deque

import torch
from torch import nn

from nnunetv2_semi.losses.voxel_contrast import Voxels, most_confident_per_class


class VoxelBank(nn.Module):
    """Voxels of the last ``steps`` steps, detached, in the checkpoint.

    Of each step and class the ``per_class`` most confident voxels: no loss with so many negatives would choose others.
    """

    def __init__(self, steps: int, per_class: int) -> None:
        super().__init__()
        self.per_class = per_class
        self._held: deque[Voxels] = deque(maxlen=steps)

    def add(self, voxels: Voxels) -> None:
        """Hold what is finite of ``voxels``, and forget the oldest step's if there are too many."""
        voxels = Voxels(voxels.features.detach(), voxels.classes, voxels.confidence.detach())
        finite = voxels.features.isfinite().all(1) & voxels.confidence.isfinite()
        voxels = voxels.chosen(finite.nonzero().squeeze(1))
        self._held.append(voxels.chosen(most_confident_per_class(voxels, self.per_class)))

    def joined_with(self, voxels: Voxels) -> Voxels:
        """``voxels`` and all that are held."""
        return Voxels.joined([voxels, *self._held])

    def __len__(self) -> int:
        return sum(len(voxels) for voxels in self._held)

    def get_extra_state(self) -> list[tuple[torch.Tensor, ...]]:
        return [(voxels.features, voxels.classes, voxels.confidence) for voxels in self._held]

    def set_extra_state(self, state: list[tuple[torch.Tensor, ...]]) -> None:
        self._held.clear()
        self._held.extend(Voxels(*tensors) for tensors in state)
