"""Labelled images that travel inside a network's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

_LARGEST_IN_HALF = 2048
_UNKNOWN = 255  # of a label, where the image is not annotated


class Atlases(nn.Module):
    """Whole labelled images as buffers; there are none until ``take`` or loaded weights bring some.

    num_heads: K, channels of the logits. regions: region-based labels.
    """

    images: torch.Tensor
    labels: torch.Tensor
    modality: torch.Tensor

    def __init__(self, num_heads: int, regions: bool) -> None:
        super().__init__()
        self.num_heads, self.regions = num_heads, regions
        self.register_buffer("images", torch.zeros(0, dtype=torch.float16))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.uint8))
        self.register_buffer("modality", torch.zeros(0, dtype=torch.long))

    def __len__(self) -> int:
        return len(self.modality)

    def take(self, images: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], modality: Sequence[int],
             ignore_label: int | None = None, seen: Sequence[torch.Tensor] | None = None) -> None:
        """Make these the atlases: images (C, *spatial), nnU-Net's targets (channels, *spatial), modality of each.

        ignore_label: of the targets. seen: bool (1, *spatial), where labels are unknown otherwise; None: everywhere.
        """
        device = self.modality.device
        labels = torch.stack(list(targets))
        unknown = torch.zeros_like(labels[:, :1], dtype=torch.bool) if seen is None else ~torch.stack(list(seen))
        if ignore_label is not None:
            unknown |= labels[:, -1:] > 0 if self.regions else labels == ignore_label
        kept = (labels[:, : self.num_heads] if self.regions else labels.clamp_min(0)).to(torch.uint8)
        stacked = torch.stack(list(images)).to(device)
        # half precision has 11 bits; intensities that were not normalised may need more
        self.images = stacked.half() if stacked.abs().max() <= _LARGEST_IN_HALF else stacked.float()
        self.labels = kept.masked_fill(unknown, _UNKNOWN).to(device)
        self.modality = torch.tensor(list(modality), device=device)

    def of_modality(self, modality: int) -> list[int]:
        """Numbers of the atlases of a modality."""
        return [number for number, own in enumerate(self.modality.tolist()) if own == modality]

    def image(self, numbers: Sequence[int]) -> torch.Tensor:
        """Images (len(numbers), C, *spatial), float32."""
        return self.images[list(numbers)].float()

    def one_hot(self, numbers: Sequence[int]) -> torch.Tensor:
        """Labels (len(numbers), K, *spatial) as 0 and 1, float32; all 0 where a softmax label is unknown."""
        labels = self.labels[list(numbers)]
        if self.regions:
            return (labels == 1).float()
        classes = torch.arange(self.num_heads, dtype=labels.dtype, device=labels.device)
        return (labels == classes.view(1, -1, *[1] * (labels.ndim - 2))).float()

    def known(self, numbers: Sequence[int]) -> torch.Tensor:
        """1 where the labels are known, else 0: (len(numbers), 1, *spatial), float32."""
        return (self.labels[list(numbers)] != _UNKNOWN).all(1, keepdim=True).float()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        for name, buffer in list(self.named_buffers(recurse=False)):
            found = state_dict.get(prefix + name)
            if found is not None:
                setattr(self, name, torch.zeros_like(found, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
