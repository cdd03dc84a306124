"""Contrastive similarity of feature channels: a channel of one image is to be most like the same channel of the other.

Source: Chen et al., "MASS: modality-collaborative semi-supervised segmentation by exploiting cross-modal consistency
from unpaired CT and MRI images", Medical Image Analysis 80, 2022, 102506 ("anatomical consistency").

    L = -mean_i log( exp(a_i.b_i / tau) / sum_j exp(a_i.b_j / tau) )        a_i, b_j: tokens of channels i and j
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from nnunetv2_semi.losses.predictions import single_precision
from nnunetv2_semi.precision import without_autocast


def channel_contrast(first: torch.Tensor, second: torch.Tensor, temperature: float = 0.1,
                     normalise: Literal["normalised", "released"] = "normalised") -> torch.Tensor:
    """Mean over channels i of the cross-entropy of softmax_j(a_i.b_j / tau) against j = i; a scalar, nats.

    first, second: tokens a and b, (C, F) or (B, C, F): C channels with F features each; tokens of different cases of a
    batch are never compared. The softmax is over the channels of ``second`` alone. normalise: "normalised" makes each
    token a unit vector; "released", as the authors' code, scales each feature to length 1 over the C channels and has
    no temperature, which leaves the loss near log C. Half-precision input is computed in float32.
    Raises ValueError for differing shapes, a temperature <= 0 or another ``normalise``.
    """
    if first.shape != second.shape or first.ndim not in (2, 3):
        raise ValueError(f"both must be tokens (C, F) or (B, C, F) of the same shape, got {tuple(first.shape)} "
                         f"and {tuple(second.shape)}")
    if temperature <= 0 or normalise not in ("normalised", "released"):
        raise ValueError(f'temperature must be positive and normalise "normalised" or "released", got {temperature} '
                         f"and {normalise!r}")
    with without_autocast(first.device):
        axis = -1 if normalise == "normalised" else -2
        first, second = (F.normalize(single_precision(tokens), dim=axis) for tokens in (first, second))
        similar = first @ second.mT  # (..., channels of first, channels of second)
        if normalise == "normalised":
            similar = similar / temperature
        return -similar.log_softmax(-1).diagonal(dim1=-2, dim2=-1).mean()
