"""Random boxes in patches: to cut out, or to paste."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Boxes:
    """One box in each of B patches of shape ``patch``, in voxels.

    first, size: (B, axes), each box's first voxel and number of voxels along each axis.
    """

    first: torch.Tensor
    size: torch.Tensor
    patch: tuple[int, ...]

    @classmethod
    def draw(cls, number: int, patch: Sequence[int], share: float) -> Boxes:
        """Boxes whose sides are ``share`` of the patch's, rounded, anywhere in it with equal probability.

        Draws from torch's global random state of the CPU.
        """
        size = [round(extent * share) for extent in patch]
        first = [torch.randint(extent - side + 1, (number,)) for extent, side in zip(patch, size, strict=True)]
        return cls(torch.stack(first, 1), torch.tensor([size] * number).reshape(number, len(patch)), tuple(patch))

    @classmethod
    def draw_areas(cls, number: int, patch: Sequence[int], smallest: float, largest: float,
                   aspect: float = 10 / 3) -> Boxes:
        """Boxes of random size and shape, anywhere in the patch with equal probability.

        Draws from torch's global random state of the CPU.

        Args:
            number: of boxes.
            patch: voxels per axis.
            smallest, largest: share of the patch's area (of its volume in 3D) that a box covers, drawn uniformly.
            aspect: a box's last side is up to so many times as long, or as short, as the one before, both as shares of
                the patch's; sides end at the patch.
        """
        axes = len(patch)
        area = torch.empty(number).uniform_(smallest, largest)
        ratio = torch.empty(number).uniform_(1 / aspect, aspect).sqrt()
        shares = area.pow(1 / axes)[:, None].repeat(1, axes)
        shares[:, -2] = shares[:, -2] / ratio
        shares[:, -1] = shares[:, -1] * ratio
        extents = torch.tensor(patch)
        size = (shares.clamp_max(1) * extents).round().long()
        first = (torch.rand(number, axes) * (extents - size + 1)).long()
        return cls(first, size, tuple(patch))

    def inside(self, device: torch.device) -> torch.Tensor:
        """Which voxels are in the boxes, (B, 1, *spatial) bool."""
        inside = torch.ones((), dtype=torch.bool, device=device)
        axes = len(self.patch)
        for axis, extent in enumerate(self.patch):
            offset = torch.arange(extent, device=device) - self.first[:, axis, None].to(device)
            side = self.size[:, axis, None].to(device)
            shape = [len(self.first), 1, *(extent if other == axis else 1 for other in range(axes))]
            inside = inside & ((offset >= 0) & (offset < side)).view(shape)
        return inside
