"""Stage 1 of Semi-CML, mutual learning: modalities agree on unlabelled patches, and contrast areas of each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from nnunetv2_semi.losses.area_contrast import AreaContrast
from nnunetv2_semi.losses.predictions import Logits, probabilities
from nnunetv2_semi.methods.base import Method
from nnunetv2_semi.methods.contract import Term
from nnunetv2_semi.methods.rows import Rows, of_patches_with_both
from nnunetv2_semi.methods.semi_cml_settings import SemiCMLSettings


@dataclass(frozen=True)
class MutualLearning:
    """A step of stage 1: asc_weight L_ASC(p_1, p_2) + w(t) mean (p_1 - p_2)^2, the mean over pairs of modalities.

    method: whose step it is. contrast: L_ASC, or None to do without. names: of the modalities.
    """

    method: Method
    settings: SemiCMLSettings
    contrast: AreaContrast | None
    names: Sequence[str]

    def rows(self, present: torch.Tensor) -> dict[str, Rows]:
        """The unlabelled patches that each modality learns from: those with two modalities or more.

        present: bool (B, modalities) on the CPU.
        """
        return dict.fromkeys(self.names, Rows.where(present.sum(1) > 1))

    def terms(self, present: torch.Tensor, rows: Mapping[str, Rows],
              outputs: Mapping[str, Iterator[Logits]]) -> list[Term]:
        """The terms of unlabelled patches.

        Args:
            present: bool (B, modalities) on the CPU.
            rows: what the method ``rows`` gives.
            outputs: of each modality; the next one is what its network gives for its rows of the patches.
        """
        method, settings, paired = self.method, self.settings, rows[self.names[0]]
        predicted = [probabilities(next(outputs[name]), method.context.regions) for name in rows]
        pairs = list(combinations(predicted, 2)) if paired.empty else \
            of_patches_with_both(predicted, paired.of(present))
        if not paired.empty:
            method.note_agreement(pairs[0][0].detach(), pairs[0][1])
        difference = sum(torch.mean((first - second) ** 2) for first, second in pairs) / len(pairs)
        weight = method.unlabelled_weight(settings.consistency_weight, settings.ramp_fraction)
        terms = [Term("consistency", torch.as_tensor(difference), weight, patches=paired.number)]
        if self.contrast is not None:
            contrasts = [self.contrast(first, second) for first, second in pairs]
            weight = method.unlabelled_weight(settings.asc_weight, settings.asc_ramp_fraction)
            terms.append(Term("asc", torch.stack(contrasts).mean(), weight, patches=paired.number))
        return terms
