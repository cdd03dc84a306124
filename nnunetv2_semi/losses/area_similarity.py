"""Area-similarity contrast: predictions of the same area in two modalities agree, those of other areas differ.

Source: Zhang et al., "Multi-modal contrastive mutual learning and pseudo-label re-learning for semi-supervised medical
image segmentation", Medical Image Analysis 83, 2023, 102656.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nnunetv2_semi.losses.predictions import single_precision
from nnunetv2_semi.precision import without_autocast

_EPS = 1e-6


def area_similarity(areas: torch.Tensor) -> torch.Tensor:
    """Soft Dice overlap of every pair of areas, (N, N), from one matrix product.

    areas: foreground probabilities (N, C, *spatial) in [0, 1]; all channels and voxels of an area count together.
    s(a, b) = (2 sum(a b) + eps) / (sum(a^2) + sum(b^2) + eps), eps = 1e-6.
    """
    flat = areas.flatten(1)
    products = flat @ flat.T
    squares = products.diagonal()
    return (2.0 * products + _EPS) / (squares[:, None] + squares[None, :] + _EPS)


def area_similarity_contrast(
    areas_first: torch.Tensor, areas_second: torch.Tensor, temperature: float = 1.0, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """L_ASC = -1/(2B) sum_i log( exp s(i, i+) / sum_{j != i} exp s(i, j) ), a scalar.

    areas_first, areas_second: (B, C, *spatial) foreground probabilities of the same B areas in two modalities, in the
    same order; i+ is the same area in the other modality. temperature: similarities are divided by it (paper: 1).
    keep: (B,) bool, the areas that take part, as anchors and as negatives; None: all. The loss of none is 0.
    Half-precision input is computed in float32. Raises ValueError for differing shapes or a temperature <= 0.
    """
    if areas_first.shape != areas_second.shape:
        raise ValueError(f"both modalities need the same areas, got {tuple(areas_first.shape)} "
                         f"and {tuple(areas_second.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    with without_autocast(areas_first.device):
        areas = single_precision(torch.cat([areas_first, areas_second]))
        logits = area_similarity(areas) / temperature
        itself = torch.eye(len(areas), dtype=torch.bool, device=areas.device)
        positives = torch.arange(len(areas), device=areas.device).roll(len(areas_first))
        if keep is None:
            return F.cross_entropy(logits.masked_fill(itself, -torch.inf), positives)
        kept = keep.repeat(2)
        # An area's own positive stays in its sum, so that the rows that are left out are finite too.
        left_out = itself | (~kept & ~itself[positives])
        losses = F.cross_entropy(logits.masked_fill(left_out, -torch.inf), positives, reduction="none")
        return (losses * kept).sum() / kept.sum().clamp_min(1)


def slices_as_areas(
    probabilities: torch.Tensor, axis: int, max_slices: int, chosen: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """2D slices of 3D patches as areas: (B, C, *3 spatial) -> (B * n, C, *2 spatial), n = min(max_slices, extent).

    axis: spatial axis (0 to 2) to slice along. chosen: slice numbers (n,) to take, so that every modality gives the
    same areas; drawn from torch's global random state when None. Returns the areas and the slice numbers.
    """
    extent = probabilities.shape[2 + axis]
    if chosen is None:
        chosen = torch.randperm(extent)[:max_slices].sort().values.to(probabilities.device)
    slices = probabilities.index_select(2 + axis, chosen).movedim(2 + axis, 1)
    return slices.flatten(0, 1), chosen
