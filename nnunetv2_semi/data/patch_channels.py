"""Which channels the patches of a batch have, and augmentation by dropping a modality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nnunetv2_semi.data.case_channels import CaseChannels
from nnunetv2_semi.present_channels import fill_absent


@dataclass(frozen=True)
class ModalityDrop:
    """Augmentation: with ``probability`` a patch that has several modalities loses one, each with equal probability.

    channels: of each modality.
    """

    probability: float
    channels: Sequence[Sequence[int]]

    def __call__(self, present: torch.Tensor) -> torch.Tensor:
        """What is left of ``present``, bool (B, C). Draws from numpy's global random state."""
        left = present.clone()
        for row in left:
            there = [list(own) for own in self.channels if row[list(own)].any()]
            if len(there) > 1 and np.random.uniform() < self.probability:
                row[there[np.random.randint(len(there))]] = False
        return left


def mark_present(batch: dict, cases: CaseChannels, drop: ModalityDrop | None) -> None:
    """Note in nnU-Net's ``batch`` which channels its patches have, "present": bool (B, C).

    What augmentation made of the fill in absent channels, and the intensities of those that ``drop`` takes away, are
    replaced by the fill.
    """
    image = batch["data"]
    present = cases.present([str(case) for case in batch["keys"]], image.shape[1])
    batch["present"] = present if drop is None else drop(present)
    image += 0.0  # an augmentation may make minus zero, the mark of absent channels, of zero
    if not batch["present"].all():
        batch["data"] = fill_absent(image, batch["present"])
