"""Views of patches made on the training device."""

from __future__ import annotations

import torch


def with_noise(
    image: torch.Tensor, standard_deviation: float, lowest: float | None = None, highest: float | None = None
) -> torch.Tensor:
    """``image`` (B, C, *spatial) plus Gaussian noise, clamped to [lowest, highest] (default: two standard deviations).

    Draws from torch's global random state. Intensities are nnU-Net's normalised ones.
    """
    lowest = -2 * standard_deviation if lowest is None else lowest
    highest = 2 * standard_deviation if highest is None else highest
    return torch.randn_like(image).mul_(standard_deviation).clamp_(lowest, highest).add_(image)
