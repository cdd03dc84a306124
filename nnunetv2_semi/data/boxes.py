"""Random boxes in patches: to cut out, or to paste."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Boxes:
    """One box in each of B patches of shape ``patch``, all of the same size, in voxels.

    first: (B, axes), each box's first voxel along each axis.
    """

    first: torch.Tensor
    size: tuple[int, ...]
    patch: tuple[int, ...]

    @classmethod
    def draw(cls, number: int, patch: Sequence[int], share: float) -> Boxes:
        """Boxes whose sides are ``share`` of the patch's, rounded, anywhere in it with equal probability.

        Draws from torch's global random state of the CPU.
        """
        size = tuple(round(extent * share) for extent in patch)
        first = [torch.randint(extent - side + 1, (number,)) for extent, side in zip(patch, size, strict=True)]
        return cls(torch.stack(first, 1), size, tuple(patch))

    def inside(self, device: torch.device) -> torch.Tensor:
        """Which voxels are in the boxes, (B, 1, *spatial) bool."""
        inside = torch.ones((), dtype=torch.bool, device=device)
        axes = len(self.patch)
        for axis, (extent, side) in enumerate(zip(self.patch, self.size, strict=True)):
            offset = torch.arange(extent, device=device) - self.first[:, axis, None].to(device)
            shape = [len(self.first), 1, *(extent if other == axis else 1 for other in range(axes))]
            inside = inside & ((offset >= 0) & (offset < side)).view(shape)
        return inside
