"""CPS: two networks teach each other with hard pseudo-labels.

Source: Chen et al., "Semi-supervised semantic segmentation with cross pseudo supervision", CVPR 2021.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import torch
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn

from nnunetv2_semi.losses.hard_labels import hard_labels, voxel_cross_entropy
from nnunetv2_semi.losses.predictions import Logits, full_resolution, probabilities
from nnunetv2_semi.methods.base import Batch, Context, Method, Term
from nnunetv2_semi.methods.settings import Settings as BaseSettings


@dataclass(frozen=True)
class CPSSettings(BaseSettings):
    """cps_weight: lambda, of all four cross-entropies to pseudo-labels. ramp_fraction: share of training over which it
    ramps up (the paper's is constant: 0; its networks are pretrained, these begin at random)."""

    cps_weight: float = 1.5
    ramp_fraction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "cps_weight", "ramp_fraction")


class CPS(Method):
    """Supervised loss of both networks + w(t) (CE(p_1, y_2) + CE(p_2, y_1)), each the mean over voxels, on labelled and
    on unlabelled patches; y_n: what network n decides. The first network is deployed.
    """

    name: ClassVar[str] = "CPS"
    Settings: ClassVar[type[BaseSettings]] = CPSSettings
    settings: CPSSettings

    def __init__(self, student: nn.Module, settings: CPSSettings, context: Context) -> None:
        super().__init__(student, settings, context)
        self.second = deepcopy(student)
        self.second.apply(getattr(student, "initialize", InitWeights_He(1e-2)))

    @classmethod
    def graphs(cls, settings: BaseSettings) -> int:
        return 4

    def loss(self, batch: Batch) -> Iterator[list[Term]]:
        one_pass, regions = self.context.one_pass, self.context.regions
        first, second = (self.passes(network, batch.labelled, batch.unlabelled)
                         for network in (self.student, self.second))
        for stream in ("labelled", "unlabelled"):
            # One graph at a time: the first network needs the second one's labels before its pass with a graph.
            output_2 = next(second) if one_pass else self._without_graph(getattr(batch, stream))
            output_1 = next(first)
            p_1, p_2 = (probabilities(output, regions).detach() for output in (output_1, output_2))
            self.note_agreement(p_1, p_2)  # that of the unlabelled patches remains
            yield self._terms("first", output_1, p_2, batch, stream)
            yield self._terms("second", output_2 if one_pass else next(second), p_1, batch, stream)

    def _terms(self, name: str, output: Logits, other: torch.Tensor, batch: Batch, stream: str) -> list[Term]:
        """A network's terms on a stream; ``other``: the other network's probabilities."""
        labels, _ = hard_labels(other, self.context.regions)
        cross_entropy = voxel_cross_entropy(full_resolution(output), labels, self.context.regions).mean()
        term = Term(f"cps_{stream}_{name}", cross_entropy,
                    self.unlabelled_weight(self.settings.cps_weight, self.settings.ramp_fraction))
        return [self.supervised(output, batch.target, f"supervised_{name}"), term] if stream == "labelled" else [term]

    @torch.no_grad()
    def _without_graph(self, image: torch.Tensor) -> Logits:
        return self.second(image)

    def parts(self) -> dict[str, nn.Module]:
        return {"second": self.second}
