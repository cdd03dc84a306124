"""One token per channel of a feature map, for losses that compare channels.

Source: Chen et al., "MASS: modality-collaborative semi-supervised segmentation by exploiting cross-modal consistency
from unpaired CT and MRI images", Medical Image Analysis 80, 2022, 102506.
"""

from __future__ import annotations

import torch
from torch import nn


class ChannelTokens(nn.Module):
    """Averages every channel over a coarse grid, and maps these averages to a token with a two-layer perceptron.

    All channels share the perceptron, so it takes feature maps of any number of channels and of any size.
    dimensions: number of spatial axes, 2 or 3. cells: of the grid, per axis: 4 give 64 averages of a channel in 3D, 16
    in 2D. An axis with fewer voxels than cells has voxels that count in several. hidden, features: widths of the
    layers; ``features`` is the length of a token. Raises ValueError for another number of axes.
    """

    def __init__(self, dimensions: int, cells: int = 4, hidden: int = 128, features: int = 128) -> None:
        super().__init__()
        if dimensions not in (2, 3):
            raise ValueError(f"feature maps have 2 or 3 spatial axes, got {dimensions}")
        self.pool = nn.AdaptiveAvgPool2d(cells) if dimensions == 2 else nn.AdaptiveAvgPool3d(cells)
        self.perceptron = nn.Sequential(nn.Linear(cells**dimensions, hidden), nn.ReLU(), nn.Linear(hidden, features))

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """``feature_map`` (B, C, *spatial) -> tokens (B, C, features)."""
        return self.perceptron(self.pool(feature_map).flatten(2))
