"""Attention between modalities of the same patch: each one's voxels look at those of the others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class CrossModalAttention(nn.Module):
    """Adds to each modality's features what its voxels find at all voxels of the other modalities.

    The weights are the same for every modality, so that any number of them can be given, and a modality that a patch
    lacks is left out: the others get what they would get without it. A patch with one modality stays as it is.

    Args:
        width: channels of the features.
        heads: of the attention, reduced to a number that divides ``width``.
    """

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = math.gcd(width, heads)
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        nn.init.zeros_(self.output.weight)  # it starts as no attention at all
        nn.init.zeros_(self.output.bias)

    def forward(self, features: Sequence[torch.Tensor], present: torch.Tensor) -> list[torch.Tensor]:
        """Features of each modality (B, width, *spatial), of the same shape -> the same with attention added.

        present: which modalities each patch has, bool (B, modalities). What is absent has no meaning in the result.
        """
        spatial = features[0].shape[2:]
        tokens = torch.stack([single.flatten(2).transpose(1, 2) for single in features], 1)
        normed = self.norm(tokens)
        placed = normed + _positions(spatial, tokens.shape[-1], tokens.device).to(normed)
        query, key, value = (self._heads(layer(of)) for layer, of in
                             ((self.query, placed), (self.key, placed), (self.value, normed)))
        found = []
        for index in range(len(features)):
            others = [other for other in range(len(features)) if other != index]
            looked_at = present[:, others]
            alone = ~looked_at.any(1)
            # Attention to nothing is not a number: a patch with one modality looks, and what it finds is dropped.
            mask = (looked_at | alone[:, None]).repeat_interleave(tokens.shape[2], 1)[:, None, None]
            keys, values = (of[:, others].transpose(1, 2).flatten(2, 3) for of in (key, value))
            attended = F.scaled_dot_product_attention(query[:, index], keys, values, attn_mask=mask)
            update = self.output(attended.transpose(1, 2).flatten(2))
            tokens_of_index = tokens[:, index] + update * ~alone[:, None, None]
            found.append(tokens_of_index.transpose(1, 2).reshape(features[index].shape))
        return found

    def _heads(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, modalities, voxels, width) -> (B, modalities, heads, voxels, width / heads)"""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(2, 3)


def _positions(spatial: Sequence[int], width: int, device: torch.device | None = None) -> torch.Tensor:
    """Sines and cosines of each voxel's place along each axis, (voxels, width) (Vaswani et al., NeurIPS 2017).

    Channels that do not divide evenly among the axes are zero.
    """
    frequencies = width // (2 * len(spatial))
    if frequencies == 0:
        return torch.zeros(math.prod(spatial), width, device=device)
    rates = 10000.0 ** (-torch.arange(frequencies, device=device) / frequencies)
    axes = torch.meshgrid(*(torch.arange(size, device=device) for size in spatial), indexing="ij")
    angles = torch.cat([axis.reshape(-1, 1) * rates for axis in axes], 1)
    encoded = torch.cat([angles.sin(), angles.cos()], 1)
    return F.pad(encoded, (0, width - encoded.shape[1]))
