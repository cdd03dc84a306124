"""The area-similarity contrast of two predictions: what their areas are, and which of them take part.

Source: Zhang et al., "Multi-modal contrastive mutual learning and pseudo-label re-learning for semi-supervised medical
image segmentation", Medical Image Analysis 83, 2023, 102656.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnunetv2_semi.losses.area_similarity import area_similarity_contrast, slices_as_areas
from nnunetv2_semi.losses.predictions import foreground


@dataclass(frozen=True)
class AreaContrast:
    """L_ASC of two predictions of the same patches.

    regions: region-based labels. slice_axis: spatial axis (0 to 2) along which slices of 3D patches are the areas;
    None: whole patches. max_slices: at most so many of a patch, drawn from torch's global random state.
    temperature: similarities are divided by it. empty_areas: areas without a predicted foreground voxel take part.
    """

    regions: bool
    slice_axis: int | None
    max_slices: int
    temperature: float
    empty_areas: bool

    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """A scalar, of probabilities (B, K, *spatial)."""
        return self.of_areas(*self._areas(first, second))

    def _areas(self, *predicted: torch.Tensor) -> list[torch.Tensor]:
        """Foreground probabilities of the same areas in each prediction, (areas, C, *area)."""
        shown = [foreground(probability, self.regions) for probability in predicted]
        if shown[0].ndim == 4 or self.slice_axis is None:
            return shown
        chosen, areas = None, []
        for probability in shown:
            slices, chosen = slices_as_areas(probability, self.slice_axis, self.max_slices, chosen)
            areas.append(slices)
        return areas

    def of_areas(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """A scalar, of foreground probabilities (areas, C, *area) of the same areas.

        The overlap does not see how large probabilities are: between two areas that both predict no foreground it
        compares traces of probability, and telling such areas apart means inventing foreground.
        """
        keep = None
        if not self.empty_areas:
            keep = ((first.detach() > 0.5) | (second.detach() > 0.5)).flatten(1).any(1)
        return area_similarity_contrast(first, second, self.temperature, keep)
