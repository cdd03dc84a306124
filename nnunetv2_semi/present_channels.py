"""Which channels of an image are there, where a case may lack some: told by a mark, never by its intensities.

The preprocessor fills an absent channel with minus zero. To arithmetic that is zero, the mean of a z-scored image, so
any network can be fed with it; its sign bit is a mark that nothing but the fill carries, and that storing, cropping,
padding (with plus zero), mirroring and moving between devices leave as it is. So stock ``nnUNetv2_predict``, which
gives a network one tensor and nothing else, tells it which channels are present too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

FILL = -0.0


def present_channels(image: torch.Tensor) -> torch.Tensor:
    """Whether each channel of ``image`` (B, C, *spatial) is present: bool (B, C).

    Absent is what holds the fill and otherwise zeros alone: padding around it, for one. A present channel that is zero
    all over (a patch of background) holds no minus zero.
    """
    voxels = image.flatten(2)
    return (voxels != 0).any(2) | ~voxels.signbit().any(2)


def fill_absent(image: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """``image`` (..., C, *spatial) with the fill in the channels that ``present``, bool (..., C), says are absent."""
    return torch.where(present.reshape(*present.shape, *[1] * (image.ndim - present.ndim)), image, FILL)


def present_modalities(present: torch.Tensor, channels: Iterable[Sequence[int]]) -> torch.Tensor:
    """Whether any channel of each modality is present: bool (B, modalities) from ``present``, bool (B, C).

    channels: of each modality, in order.
    """
    return torch.stack([present[:, list(own)].any(1) for own in channels], 1)
