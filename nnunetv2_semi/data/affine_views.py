"""Patches turned and scaled on the training device, with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import log
from typing import Literal

import torch
from torch.nn import functional as F

from nnunetv2_semi.precision import without_autocast
from nnunetv2_semi.present_channels import fill_absent, present_channels


@dataclass(frozen=True)
class AffineViews:
    """How each patch of a batch is turned and scaled, about its centre.

    matrices: (B, n, n), float32: where a voxel of the view comes from, in voxels from the centre of the patch, in the
    order of its n = 2 or 3 spatial axes. They are on the device of the patches. shape: of a patch, voxels per axis.
    """

    matrices: torch.Tensor
    shape: tuple[int, ...]

    @classmethod
    def draw(cls, patches: torch.Tensor, spacing: Sequence[float], rotation: float, in_plane: bool,
             scale: tuple[float, float]) -> AffineViews:
        """Views of ``patches`` (B, C, *spatial), from torch's global random state of the CPU.

        spacing: mm per axis, so that what is turned keeps its shape. rotation: largest angle about each axis, radians,
        drawn evenly. in_plane: in 3D turn and scale within the last two axes alone. scale: smallest and largest size,
        relative; its logarithm is drawn evenly.
        """
        number, axes = len(patches), len(spacing)
        moved = range(1 if in_plane and axes == 3 else 0, axes)
        matrices = torch.eye(axes).repeat(number, 1, 1)
        for first, second in combinations(moved, 2):
            angle = rotation * (2 * torch.rand(number) - 1)
            turn = torch.eye(axes).repeat(number, 1, 1)
            turn[:, first, first] = turn[:, second, second] = angle.cos()
            turn[:, first, second] = -angle.sin()
            turn[:, second, first] = angle.sin()
            matrices = matrices @ turn
        smallest, largest = map(log, scale)
        size = torch.exp(smallest + (largest - smallest) * torch.rand(number))
        matrices[:, moved] /= size.view(-1, 1, 1)
        mm = torch.tensor([float(side) for side in spacing])
        return cls((matrices * mm / mm[:, None]).to(patches.device), tuple(patches.shape[2:]))

    def of(self, patches: torch.Tensor, mode: Literal["bilinear", "nearest"] = "bilinear") -> torch.Tensor:
        """The views of ``patches`` (B, C, *spatial), in their data type; voxels from outside repeat the border's.

        mode: "bilinear" is trilinear in 3D; "nearest" for labels. Channels that a case lacks stay as they are.
        """
        views = F.grid_sample(patches.to(self._grid.dtype), self._grid, mode=mode, padding_mode="border",
                              align_corners=False)
        if patches.is_floating_point():
            views = fill_absent(views, present_channels(patches))
        return views.to(patches.dtype)

    def inside(self) -> torch.Tensor:
        """Which voxels of the views come from within the patches: bool (B, 1, *spatial)."""
        return (self._grid.abs() <= 1).all(-1)[:, None]

    @cached_property
    def _grid(self) -> torch.Tensor:
        """For grid_sample: -1 to 1 from edge to edge of a patch, the last axis first. Image and labels share it."""
        sides = self.matrices.new_tensor(self.shape)
        relative = (self.matrices * sides / sides[:, None]).flip(1, 2)
        theta = torch.cat([relative, relative.new_zeros(*relative.shape[:2], 1)], 2)
        # In half precision positions would be wrong by up to 0.15 voxels of a patch of 320.
        with without_autocast(theta.device):
            return F.affine_grid(theta, [len(theta), 1, *self.shape], align_corners=False)
