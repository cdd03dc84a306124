"""One network for one modality, behind the interface of the whole image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nnunetv2_semi.losses.predictions import Logits
from nnunetv2_semi.networks.deployment import Deployed, StockNetwork


class OneModality(Deployed):
    """Takes all channels and looks at those of one modality. Has no weights besides the network's.

    Args:
        network: (B, C_m, *spatial) -> logits (B, K, *spatial), or a list of them with deep supervision.
        name: of the modality.
        channels: its C_m channels in the whole image.
    """

    def __init__(self, network: nn.Module, name: str, channels: Sequence[int]) -> None:
        super().__init__()
        self.network, self.name, self.channels = network, name, list(channels)

    def forward(self, image: torch.Tensor) -> Logits:
        """``image`` (B, C, *spatial) -> the network's logits."""
        return self.network(image[:, self.channels])

    def stock_networks(self) -> dict[str, StockNetwork]:
        """The network, which needs this modality alone."""
        return {self.name: (self.channels, self.network.state_dict())}
