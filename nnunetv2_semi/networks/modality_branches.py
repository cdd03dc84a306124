"""One network per modality, each usable alone; together they average their probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from nnunetv2_semi.losses.predictions import Logits, all_scales
from nnunetv2_semi.networks.deployment import Deployed, StockNetwork
from nnunetv2_semi.networks.one_modality import OneModality
from nnunetv2_semi.present_channels import present_channels, present_modalities


class ModalityBranches(Deployed):
    """One segmentation network per modality of the same patient.

    branches: modality name -> network that takes this modality's channels (B, C_m, *spatial) to logits
    (B, K, *spatial), or to a list of them with deep supervision.
    channels: modality name -> its channels in the whole image (B, C, *spatial).
    regions: True for region-based (sigmoid) labels, False for softmax labels.
    """

    def __init__(self, branches: Mapping[str, nn.Module], channels: Mapping[str, Sequence[int]], regions: bool) -> None:
        super().__init__()
        # A list, because modality names may hold characters that a parameter name must not.
        self.names = tuple(branches)
        self.branches = nn.ModuleList(branches.values())
        self.channels = {name: list(channels[name]) for name in self.names}
        self.regions = regions

    def branch(self, name: str) -> nn.Module:
        """The network of modality ``name``."""
        return self.branches[self.names.index(name)]

    def select(self, image: torch.Tensor, name: str) -> torch.Tensor:
        """The channels (B, C_m, *spatial) of modality ``name`` in ``image`` (B, C, *spatial)."""
        return image[:, self.channels[name]]

    def forward(self, image: torch.Tensor) -> Logits:
        """Logits (B, K, *spatial) whose softmax (or sigmoid) is the mean of the branches' probabilities.

        The branches of the modalities that an image has vote. With deep supervision a list of such logits, finest
        first.
        """
        return self.mean(image, self.each(image))

    def each(self, image: torch.Tensor) -> dict[str, Logits]:
        """Modality name -> the branch's logits of ``image`` (B, C, *spatial)."""
        return {name: self.branch(name)(self.select(image, name)) for name in self.names}

    def mean(self, image: torch.Tensor, each: Mapping[str, Logits]) -> Logits:
        """As ``forward``, of what ``each`` gives."""
        present = present_modalities(present_channels(image), self.channels.values())
        scales = mean_at_all_scales([all_scales(logits) for logits in each.values()], self.regions, present)
        return scales[0] if isinstance(each[self.names[0]], torch.Tensor) else scales

    def parts(self) -> dict[str, nn.Module]:
        """Each modality's network by itself."""
        return {name: OneModality(self.branch(name), name, self.channels[name]) for name in self.names}

    def part_applies(self, name: str, present: torch.Tensor) -> torch.Tensor:
        """Images that have the modality."""
        return present[:, self.names.index(name)]

    def with_parts(self, image: torch.Tensor) -> tuple[Logits, dict[str, Logits]]:
        """The mean and each modality's logits, of one pass through each branch."""
        each = self.each(image)
        return self.mean(image, each), each

    def stock_networks(self) -> dict[str, StockNetwork]:
        """Each branch is one."""
        return {name: (self.channels[name], self.branch(name).state_dict()) for name in self.names}


def mean_at_all_scales(outputs: Sequence[Sequence[torch.Tensor]], regions: bool,
                       voting: torch.Tensor) -> list[torch.Tensor]:
    """`mean_probability_logits` at each scale of ``outputs``: predictions at several scales; one counts as it is."""
    if len(outputs) == 1:
        return list(outputs[0])
    return [mean_probability_logits(scale, regions, voting) for scale in zip(*outputs, strict=True)]


def mean_probability_logits(logits: Sequence[torch.Tensor], regions: bool,
                            voting: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of the mean probability of several predictions (each (B, K, *spatial)), without leaving log space.

    voting: bool (B, predictions), those whose mean it is; None: all. Where none votes, all do.
    """
    stacked = torch.stack([single.float() for single in logits])
    votes = torch.ones(stacked.shape[:2], dtype=torch.bool, device=stacked.device)
    if voting is not None:
        votes = (voting | ~voting.any(1, keepdim=True)).T
    votes = votes.reshape(*votes.shape, *[1] * (stacked.ndim - 2))
    silent = torch.zeros_like(votes, dtype=stacked.dtype).masked_fill(~votes, -torch.inf)
    if not regions:
        # The constant log(number of predictions) is the same for all classes, and so is the mean normaliser of the
        # voters: softmax removes them. With it a single vote is that prediction's own logits, which nnU-Net's predictor
        # averages over windows as it does with any network's.
        normaliser = _log_sum_exp(stacked, 2)
        mean_normaliser = (normaliser * votes).sum(0) / votes.sum(0)
        return (_log_sum_exp(stacked - normaliser + silent, 0) + mean_normaliser)[0]
    # log sigmoid(x) = -softplus(-x). PyTorch's logsigmoid becomes log(sigmoid(x)) in ONNX, which is -inf from -18 on.
    return (_log_sum_exp(silent - F.softplus(-stacked), 0) - _log_sum_exp(silent - F.softplus(stacked), 0))[0]


def _log_sum_exp(values: torch.Tensor, dim: int) -> torch.Tensor:
    """As `torch.logsumexp`, with ``dim`` kept; of the values along it one at least is finite.

    PyTorch's own becomes log(sum(exp(x))) in ONNX, which is -inf where all values are below -104.
    """
    largest = values.amax(dim, keepdim=True).detach()
    return (values - largest).exp().sum(dim, keepdim=True).log() + largest
