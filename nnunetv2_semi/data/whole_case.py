"""A labelled training case as a whole, not as patches of batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WholeCase:
    """A labelled training case, cropped or padded to the patch size about its centre, without augmentation.

    image: (C, *spatial). target: nnU-Net's (channels, *spatial), without deep supervision. modalities: numbers of those
    that it has, in the order of ``Context.modalities``.
    """

    name: str
    image: torch.Tensor
    target: torch.Tensor
    modalities: list[int]
