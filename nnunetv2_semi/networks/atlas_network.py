"""Segmentation of images of one modality out of several, with atlases: the network of MASS.

Source: Chen et al., MASS, Medical Image Analysis 80, 2022, 102506.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from nnunetv2_semi.losses.local_ncc import local_ncc_map
from nnunetv2_semi.losses.predictions import Logits, probabilities
from nnunetv2_semi.networks.atlases import Atlases
from nnunetv2_semi.networks.correspondence import CorrespondenceHead
from nnunetv2_semi.networks.deployment import Deployed, StockNetwork
from nnunetv2_semi.networks.modality_branches import mean_at_all_scales
from nnunetv2_semi.networks.modality_encoders import ModalityEncoders, Pyramid
from nnunetv2_semi.networks.warp import warp
from nnunetv2_semi.present_channels import fill_absent

Predict = Literal["segmentation", "atlas", "both"]
_EPS = 1e-4  # of probabilities whose logarithm is taken


class AtlasNetwork(Deployed):
    """Encoders per modality, a shared decoder with a segmentation and a correspondence head, and atlases.

    networks, channels: see `ModalityEncoders`. atlases: its atlases. dimensions: 2 or 3. predict: what a forward pass
    gives: the segmentation head's logits, those of the atlases' labels, or of the mean probability of both.
    refine: register warped atlases once more. skip_finest: so many of the finest decoder stages are left out of
    correspondence, which is found at the resolution below and interpolated.
    """

    def __init__(self, networks: Mapping[str, nn.Module], channels: Mapping[str, Sequence[int]], atlases: Atlases,
                 dimensions: int, predict: Predict = "segmentation", refine: bool = False,
                 skip_finest: int = 1) -> None:
        super().__init__()
        self.encoders = ModalityEncoders(networks, channels)
        widths = self.encoders.widths
        self.stages = max(1, len(widths) - skip_finest)
        self.correspondence = CorrespondenceHead(widths[: self.stages], dimensions)
        self.atlases, self.predict, self.refine = atlases, predict, refine

    @property
    def decoder(self) -> nn.Module:
        """Whose ``deep_supervision`` nnU-Net switches."""
        return self.encoders.decoder

    def displacement(self, target: Pyramid, source: Pyramid, size: Sequence[int]) -> torch.Tensor:
        """(B, axes, *size) in voxels: the source at x + displacement(x) corresponds to the target at x."""
        return self.correspondence(target[1][: self.stages], source[1][: self.stages], size)

    def forward(self, image: torch.Tensor) -> Logits:
        """``image`` (B, C, *spatial) -> logits (B, K, *spatial), a list of them, finest first, with deep supervision.

        An image with several modalities is predicted from each; the mean of the probabilities counts.
        """
        return self.predicted(image, self.predict)

    def predicted(self, image: torch.Tensor, predict: Predict) -> Logits:
        """As ``forward``, but says what is predicted."""
        return self.predictions(image, [predict])[predict]

    def predictions(self, image: torch.Tensor, wanted: Sequence[Predict] = get_args(Predict)) -> dict[str, Logits]:
        """As ``predicted`` for each of ``wanted``, which share their passes."""
        present = self.encoders.present_modalities(image)
        # An exported graph cannot branch on what is in an image: each modality predicts all of it, then they vote.
        traced = torch.jit.is_tracing()
        single: dict[str, list[list[torch.Tensor]]] = {predict: [] for predict in wanted}
        voting = []
        for index, has in enumerate(present.unbind(1)):
            if not traced and not has.any():
                continue
            voting.append(has)
            found = self._of_one_modality(image if traced else image[has], index, wanted)
            for predict, outputs in single.items():
                outputs.append([scale if traced else _in_rows(scale, has) for scale in found[predict]])
        votes = torch.stack(voting, 1)
        means = {predict: mean_at_all_scales(outputs, self.atlases.regions, votes)
                 for predict, outputs in single.items()}
        return {predict: scales if self.decoder.deep_supervision else scales[0] for predict, scales in means.items()}

    def parts(self) -> dict[str, nn.Module]:
        """The other ways to predict."""
        return {how: Predicting(self, how) for how in get_args(Predict) if how != self.predict}

    def with_parts(self, image: torch.Tensor) -> tuple[Logits, dict[str, Logits]]:
        """All ways to predict, of shared passes."""
        each = self.predictions(image)
        return each.pop(self.predict), each

    def stock_networks(self) -> dict[str, StockNetwork]:
        """The segmentation head with each modality's encoder."""
        return {name: (self.encoders.channels[name], self.encoders.stock_weights(name)) for name in self.encoders.names}

    def why_not_exportable(self) -> str | None:
        """Only the segmentation head can be exported."""
        return None if self.predict == "segmentation" else f'it predicts from atlases ("predict": "{self.predict}")'

    def only(self, image: torch.Tensor, modality: int | torch.Tensor) -> torch.Tensor:
        """``image`` (B, C, *spatial) with the channels of ``modality`` (one, or one for each patch) alone."""
        own = torch.zeros(len(self.encoders.names), image.shape[1], dtype=torch.bool, device=image.device)
        for index, channels in enumerate(self.encoders.channels.values()):
            own[index, channels] = True
        return fill_absent(image, own[torch.as_tensor(modality, device=image.device).expand(len(image))])

    def _of_one_modality(self, image: torch.Tensor, modality: int,
                         wanted: Sequence[Predict]) -> dict[str, list[torch.Tensor]]:
        """Logits at each scale, finest first, from one modality of images: those wanted, and maybe others."""
        pyramid = self.encoders(image, modality)
        found = {"segmentation": pyramid[0]}
        if set(wanted) - set(found):
            fused = self.atlas_probability(image, pyramid, modality)
            head = probabilities(pyramid[0][0], self.atlases.regions)
            found |= {"atlas": self._logits(fused, pyramid), "both": self._logits((fused + head) / 2, pyramid)}
        return found

    def _logits(self, probability: torch.Tensor, pyramid: Pyramid) -> list[torch.Tensor]:
        probability = probability.clamp(_EPS, 1 - _EPS)
        whole = probability.logit() if self.atlases.regions else probability.log()
        return [whole, *(F.interpolate(whole, scale.shape[2:], mode="nearest") for scale in pyramid[0][1:])]

    def atlas_probability(self, image: torch.Tensor, pyramid: Pyramid, modality: int) -> torch.Tensor:
        """The labels of the modality's atlases, warped to ``image`` and fused: (B, K, *spatial).

        Each atlas counts with exp(local NCC) at each voxel, a softmax over the atlases whose label is known there; the
        segmentation head decides where none is.
        """
        channels = list(self.encoders.channels.values())[modality]
        total: torch.Tensor | float = 0.0
        weights: torch.Tensor | float = 0.0
        for number in self.atlases.of_modality(modality):
            source, labels = self.atlases.image([number]), self.atlases.one_hot([number])
            known = self.atlases.known([number])
            for _ in range(1 + self.refine):
                moving = self.encoders(source, modality)  # of one image, until it is warped to each of the batch
                moving = moving[0], [features.expand(len(image), *features.shape[1:]) for features in moving[1]]
                displacement = self.displacement(pyramid, moving, image.shape[2:])
                source, labels, known = (warp(whole.expand(len(image), *whole.shape[1:]), displacement)
                                         for whole in (source, labels, known))
            similarity = local_ncc_map(source[:, channels], image[:, channels]).mean(1, keepdim=True).exp()
            total, weights = total + similarity * labels, weights + similarity * known
        if not isinstance(total, torch.Tensor) or not isinstance(weights, torch.Tensor):
            raise RuntimeError(f"The network holds no atlas of modality {self.encoders.names[modality]}.")
        head = probabilities(pyramid[0], self.atlases.regions)
        return torch.where(weights > _EPS, total / weights.clamp_min(_EPS), head)


def _in_rows(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``values`` in the rows that are true of ``rows``, bool (B,), and zeros in the others: (B, ...)."""
    if rows.all():
        return values
    whole = values.new_zeros(len(rows), *values.shape[1:])
    whole[rows] = values
    return whole


class Predicting(nn.Module):
    """An atlas network that predicts in one way; shares its weights, has none of its own."""

    def __init__(self, network: AtlasNetwork, predict: Predict) -> None:
        super().__init__()
        self.network, self.how = network, predict

    @property
    def decoder(self) -> nn.Module:
        """Whose ``deep_supervision`` nnU-Net switches."""
        return self.network.decoder

    def forward(self, image: torch.Tensor) -> Logits:
        """As `AtlasNetwork.predicted`."""
        return self.network.predicted(image, self.how)
