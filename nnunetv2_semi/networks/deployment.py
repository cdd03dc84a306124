"""What a network that is not nnU-Net's own answers about its deployment."""

from __future__ import annotations

import torch
from torch import nn

from nnunetv2_semi.losses.predictions import Logits

# Channels of the whole image that a network takes, and its state dict.
StockNetwork = tuple[list[int], dict[str, torch.Tensor]]


class Deployed(nn.Module):
    """Base of networks with parts that can be used by themselves.

    A forward pass takes the whole image (B, C, *spatial) and gives logits (B, K, *spatial).
    """

    def parts(self) -> dict[str, nn.Module]:
        """Networks validated by themselves besides this one, by name; each takes the whole image."""
        return {}

    def part_applies(self, name: str, present: torch.Tensor) -> torch.Tensor:
        """Which images can be predicted by the part ``name`` alone: bool (B,), of ``present``, bool (B, modalities)."""
        return torch.ones(len(present), dtype=torch.bool)

    def with_parts(self, image: torch.Tensor) -> tuple[Logits, dict[str, Logits]]:
        """What this network, and what each part, makes of ``image`` (B, C, *spatial); parts may share passes."""
        return self(image), {name: part(image) for name, part in self.parts().items()}

    def stock_networks(self) -> dict[str, StockNetwork]:
        """The parts that are plain nnU-Net networks, by name, with the weights they have now."""
        return {}

    def why_not_exportable(self) -> str | None:
        """Why this network cannot become a graph of standard operators (ONNX), a clause; None where it can."""
        return None
