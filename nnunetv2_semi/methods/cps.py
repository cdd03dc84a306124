"""CPS: two networks teach each other with hard pseudo-labels.

Source: Chen et al., "Semi-supervised semantic segmentation with cross pseudo supervision", CVPR 2021.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import ClassVar, Literal

import torch
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn

from nnunetv2_semi.losses.hard_labels import hard_labels
from nnunetv2_semi.losses.predictions import Logits, probabilities
from nnunetv2_semi.methods.base import Method
from nnunetv2_semi.methods.contract import Batch, Context, Term
from nnunetv2_semi.methods.perturbation import PerturbationSettings, perturbed
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.methods.settings import setting


class CPSSettings(PerturbationSettings):
    """Settings of CPS."""

    cps_weight: float = setting(
        1.0,
        "lambda: of every loss to the other network's labels; Cityscapes: 6",
        at_least=0, paper=1.5,
    )
    ramp_fraction: float = setting(
        0.2,
        "share of training over which it ramps up; `0`: constant",
        at_least=0, paper=0,
    )
    cps_loss: Literal["dice_ce", "ce"] = setting(
        "dice_ce",
        "nnU-Net's Dice and cross-entropy at all outputs, or cross-entropy of the full-resolution one",
        paper="ce",
    )
    labelled_too: bool = setting(
        False,
        "on labelled patches too; in the paper with CutMix on unlabelled ones alone",
        paper=True,
    )
    perturb: bool = setting(
        True,
        "the networks learn from mixed unlabelled patches with other intensities; the paper has CutMix as a "
        "variant",
        paper=False,
    )

    @property
    def mixes_unlabelled(self) -> bool:
        return super().mixes_unlabelled and self.perturb


class CPS(Method):
    """Supervised loss of both networks + w(t) (L(z_1, y_2) + L(z_2, y_1)) on perturbed unlabelled patches.

    y_n: what network n decides on the patches as nnU-Net augmented them, mixed as these are. The first network is
    deployed.
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
        decided = {"unlabelled": self._decisions(batch.unlabelled)}
        if self.settings.labelled_too:
            decided["labelled"] = self._decisions(batch.labelled)
        self.note_agreement(*decided["unlabelled"])
        image = batch.unlabelled
        if self.settings.perturb:
            image, mixing = perturbed(image, self.settings, self.context.masked_channels)
            decided["unlabelled"] = tuple(mixing.of(p) for p in decided["unlabelled"])
        passes = [(name, self.passes(network, batch.labelled, image)) for name, network in self._networks()]
        for stream in ("labelled", "unlabelled"):
            for index, (name, outputs) in enumerate(passes):
                output, terms = next(outputs), []
                if stream == "labelled":
                    terms.append(self.supervised(output, batch.target, f"supervised_{name}"))
                if stream in decided:
                    terms.append(self._term(f"cps_{stream}_{name}", output, decided[stream][1 - index]))
                yield terms

    def _networks(self) -> list[tuple[str, nn.Module]]:
        return [("first", self.student), ("second", self.second)]

    def _decisions(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Probabilities of both networks."""
        with self.without_graph():
            return tuple(probabilities(network(image), self.context.regions) for _, network in self._networks())

    def _term(self, name: str, output: Logits, other: torch.Tensor) -> Term:
        """Loss of a network's ``output`` to what the ``other`` one's probabilities decide."""
        labels, confidence = hard_labels(other, self.context.regions)
        everywhere = torch.ones_like(confidence, dtype=torch.bool)
        value = self.pseudo_label_loss(output, labels, everywhere, self.settings.cps_loss)
        return Term(name, value, self.unlabelled_weight(self.settings.cps_weight, self.settings.ramp_fraction))

    def parts(self) -> dict[str, nn.Module]:
        return {"second": self.second}
