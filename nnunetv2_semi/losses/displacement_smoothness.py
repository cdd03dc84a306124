"""How smooth a field of displacements is: the mean square of its forward differences.

Source: Chen et al., "MASS: modality-collaborative semi-supervised segmentation by exploiting cross-modal consistency
from unpaired CT and MRI images", Medical Image Analysis 80, 2022, 102506.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nnunetv2_semi.losses.predictions import single_precision
from nnunetv2_semi.precision import without_autocast


def displacement_smoothness(displacement: torch.Tensor) -> torch.Tensor:
    """Mean of (u(x + 1) - u(x))^2 over voxels and components, averaged over the spatial axes; a scalar >= 0, voxels^2.

    displacement: (B, n, *spatial), voxels. Axes of one voxel have no difference and do not count; where all are, 0.
    Half-precision input is computed in float32.
    """
    with without_autocast(displacement.device):
        displacement = single_precision(displacement)
        of_axes = [F.mse_loss(displacement.narrow(axis, 1, size - 1), displacement.narrow(axis, 0, size - 1))
                   for axis, size in enumerate(displacement.shape) if axis >= 2 and size > 1]
        return torch.stack(of_axes).mean() if of_axes else displacement.sum() * 0
