"""A conventional network and a foundation model that are deployed together, or the foundation model by itself."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from nnunetv2_semi.losses.predictions import Logits, all_scales, full_resolution
from nnunetv2_semi.networks.deployment import Deployed, StockNetwork
from nnunetv2_semi.networks.foundation import FoundationModel
from nnunetv2_semi.networks.modality_branches import mean_at_all_scales

CONVENTIONAL, FOUNDATION = "conventional", "foundation"
Deploy = Literal["conventional", "foundation", "ensemble"]


class ConventionalAndFoundation(Deployed):
    """Gives the foundation model's logits, or those of the mean probability of both networks (``"ensemble"``).

    Args:
        conventional: nnU-Net's network, (B, C, *spatial) -> logits (B, K, *spatial), a list with deep supervision.
        foundation: as `FoundationModel`.
        deploy: what a forward pass gives, not ``"conventional"``, which needs none of this.
        regions: region-based labels.
        both_train: False where the conventional network has not been trained.
    """

    def __init__(self, conventional: nn.Module, foundation: FoundationModel, deploy: Deploy, regions: bool,
                 both_train: bool = True) -> None:
        super().__init__()
        self.conventional, self.foundation, self.deploy, self.regions = conventional, foundation, deploy, regions
        self.both_train = both_train

    def forward(self, image: torch.Tensor) -> Logits:
        """``image`` (B, C, *spatial) -> logits (B, K, *spatial), a list of them with deep supervision."""
        # Deep supervision is on in validation within an epoch alone, where nnU-Net's loss wants the same scales.
        scales = self.deploy == "ensemble" or any(getattr(m, "deep_supervision", False)
                                                  for m in self.conventional.modules())
        return self._combined(self.deploy, self.conventional(image) if scales else None, image, self.foundation(image))

    def _combined(self, deploy: Deploy, conventional: Logits | None, image: torch.Tensor,
                  foundation: Logits) -> Logits:
        own = full_resolution(foundation)
        if conventional is None:
            return self.foundation.at_patch_grid(own, image.shape[2:])
        each = [[*all_scales(conventional)],
                [self.foundation.at_patch_grid(own, scale.shape[2:]) for scale in all_scales(conventional)]]
        voting = torch.ones(image.shape[0], 2, dtype=torch.bool, device=image.device)
        scales = each[1] if deploy == "foundation" else mean_at_all_scales(each, self.regions, voting)
        return scales[0] if isinstance(conventional, torch.Tensor) else scales

    def parts(self) -> dict[str, nn.Module]:
        """Each network by itself, if both are trained."""
        return {} if not self.both_train else {CONVENTIONAL: self.conventional, FOUNDATION: ConventionalAndFoundation(
            self.conventional, self.foundation, "foundation", self.regions)}

    def with_parts(self, image: torch.Tensor) -> tuple[Logits, dict[str, Logits]]:
        """One pass through each network."""
        if not self.both_train:
            return self(image), {}
        conventional, foundation = self.conventional(image), self.foundation(image)
        return self._combined(self.deploy, conventional, image, foundation), {
            CONVENTIONAL: conventional, FOUNDATION: self._combined("foundation", conventional, image, foundation)}

    def stock_networks(self) -> dict[str, StockNetwork]:
        """The conventional one is, if it is trained."""
        if not self.both_train:
            return {}
        channels = next(p for p in self.conventional.parameters() if p.ndim > 1).shape[1]
        return {CONVENTIONAL: (list(range(channels)), self.conventional.state_dict())}
