"""One network per modality, each usable alone; together they average their probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn


class ModalityBranches(nn.Module):
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

    def forward(self, image: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Logits (B, K, *spatial) whose softmax (or sigmoid) is the mean of the branches' probabilities.

        With deep supervision a list of such logits, finest first.
        """
        outputs = [self.branch(name)(self.select(image, name)) for name in self.names]
        if isinstance(outputs[0], torch.Tensor):
            return mean_probability_logits(outputs, self.regions)
        return [mean_probability_logits(list(scale), self.regions) for scale in zip(*outputs, strict=True)]


class SingleModality(nn.Module):
    """One branch behind the whole image's interface: takes all channels, looks at its own.

    Shares the branch; has no weights of its own.
    """

    def __init__(self, networks: ModalityBranches, name: str) -> None:
        super().__init__()
        self.network, self.channels = networks.branch(name), networks.channels[name]

    def forward(self, image: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """``image`` (B, C, *spatial) -> the branch's logits (B, K, *spatial), or a list of them."""
        return self.network(image[:, self.channels])


def mean_probability_logits(logits: Sequence[torch.Tensor], regions: bool) -> torch.Tensor:
    """Logits of the mean probability of several predictions (each (B, K, *spatial)), without leaving log space."""
    stacked = torch.stack([single.float() for single in logits])
    if not regions:
        # The normalising constant log(number of predictions) is the same for all classes: softmax removes it.
        return stacked.log_softmax(2).logsumexp(0)
    return F.logsigmoid(stacked).logsumexp(0) - F.logsigmoid(-stacked).logsumexp(0)
