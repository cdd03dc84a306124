"""Labelled images that travel inside a network's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

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
             ignore_label: int | None = None) -> None:
        """Make these the atlases: images (C, *spatial), nnU-Net's targets (channels, *spatial), modality of each.

        ignore_label: of the targets.
        """
        device = self.modality.device
        labels = torch.stack(list(targets))
        if self.regions:
            kept = labels[:, : self.num_heads].to(torch.uint8)
            unknown = labels[:, -1:] > 0 if ignore_label is not None else None
        else:
            kept = labels.clamp_min(0).to(torch.uint8)
            unknown = labels == ignore_label if ignore_label is not None else None
        self.images = torch.stack(list(images)).to(device, torch.float16)
        self.labels = (kept if unknown is None else kept.masked_fill(unknown, _UNKNOWN)).to(device)
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
        classes = torch.where(labels == _UNKNOWN, self.num_heads, labels)[:, 0].long()
        return F.one_hot(classes, self.num_heads + 1).movedim(-1, 1)[:, : self.num_heads].float()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        for name, buffer in list(self.named_buffers(recurse=False)):
            found = state_dict.get(prefix + name)
            if found is not None:
                setattr(self, name, torch.zeros_like(found, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
