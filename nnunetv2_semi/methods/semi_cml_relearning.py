"""Stage 2 of Semi-CML, pseudo-label re-learning: modalities learn from soft labels of the better one's teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from nnunetv2_semi.data.views import with_noise
from nnunetv2_semi.losses.area_contrast import AreaContrast
from nnunetv2_semi.losses.predictions import Logits, full_resolution, probabilities
from nnunetv2_semi.losses.soft_labels import soft_cross_entropy, soft_dice_loss
from nnunetv2_semi.methods.base import Method
from nnunetv2_semi.methods.contract import Term
from nnunetv2_semi.methods.rows import Rows
from nnunetv2_semi.methods.semi_cml_settings import SemiCMLSettings
from nnunetv2_semi.networks.modality_branches import ModalityBranches
from nnunetv2_semi.networks.monte_carlo import summed_probabilities
from nnunetv2_semi.teachers import Teacher


@dataclass(frozen=True)
class Relearning:
    """A step of stage 2: alpha L_ASC(p_t, p_m) + (1 - alpha)(L_CE + L_Dice), p_t the better modality's soft label.

    method: whose step it is. contrast: L_ASC, or None to do without. teachers: one a modality, in the order of the
    student's names. better: the modality that teaches.
    """

    method: Method
    settings: SemiCMLSettings
    contrast: AreaContrast | None
    student: ModalityBranches
    teachers: Sequence[Teacher]
    better: str

    def rows(self, present: torch.Tensor) -> dict[str, Rows]:
        """The unlabelled patches that each modality learns from, of those modalities that learn now.

        Those patches that have it and a modality that teaches. present: bool (B, modalities) on the CPU.
        """
        names = self.student.names
        taught = present[:, [names.index(name) for name in self._teaching()]].any(1)
        return {name: Rows.where(present[:, names.index(name)] & taught) for name in self._learners()}

    def _teaching(self) -> list[str]:
        """The modalities whose teachers make the soft label."""
        return [self.better] if self.settings.soft_label == "better" else list(self.student.names)

    def _learners(self) -> list[str]:
        """The modalities that re-learn now: the better one learns from itself at the end of stage 2 alone."""
        if self.settings.soft_label == "mean":
            return list(self.student.names)
        joins_at = 1.0 - self.settings.self_relearning * (1.0 - self.settings.prel_start)
        return [name for name in self.student.names if name != self.better or self.method.progress >= joins_at]

    def terms(self, image: torch.Tensor, present: torch.Tensor, rows: Mapping[str, Rows],
              outputs: Mapping[str, Iterator[Logits]]) -> Iterator[list[Term]]:
        """The terms of unlabelled patches, a group for each modality that learns.

        Args:
            image: (B, C, *spatial).
            present: bool (B, modalities) on the CPU.
            rows: what the method ``rows`` gives.
            outputs: of each modality; the next one is what its network gives for its rows of ``image``.
        """
        method, settings, regions = self.method, self.settings, self.method.context.regions
        soft_labels = self.soft_labels(image, present)
        for name, own in rows.items():
            logits, soft_label = full_resolution(next(outputs[name])), own.of(soft_labels)
            predicted = probabilities(logits, regions)
            if not own.empty:
                method.note_agreement(soft_label, predicted)
            relearn = soft_cross_entropy(logits, soft_label, regions) + soft_dice_loss(predicted, soft_label, regions)
            if self.contrast is None:
                yield [Term(f"prel_{name}", relearn, method.unlabelled_weight(settings.prel_weight),
                            patches=own.number)]
                continue
            alpha = settings.alpha_better if name == self.better else settings.alpha_weaker
            contrast = self.contrast(soft_label, predicted)
            yield [Term(f"prel_{name}", relearn, method.unlabelled_weight(settings.prel_weight * (1.0 - alpha)),
                        patches=own.number),
                   Term(f"prel_asc_{name}", contrast, method.unlabelled_weight(settings.prel_weight * alpha),
                        patches=own.number)]

    def soft_labels(self, image: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Mean probability, over noisy passes with dropout active, of the teaching modalities that a patch has.

        (B, K, *spatial), of ``image`` (B, C, *spatial) and ``present``, bool (B, modalities) on the CPU. Draws from
        torch's global random state.
        """
        noise, passes = self.settings.prel_noise, self.settings.prel_passes
        total: torch.Tensor | float = 0.0
        number: torch.Tensor | float = 0.0
        for name in self._teaching():
            index = self.student.names.index(name)
            own = self.student.select(image, name)
            share = present[:, index].to(image, non_blocking=True).reshape(-1, *[1] * (image.ndim - 1))
            number = number + passes * share
            # the paper's noise: clamp(0.1 N(0, 1), 0, 0.2), never negative
            noisy = (with_noise(own, noise, 0.0, 2 * noise) for _ in range(passes))
            total = total + summed_probabilities(self.teachers[index].network, noisy,
                                                 self.method.context.regions) * share
        assert isinstance(total, torch.Tensor) and isinstance(number, torch.Tensor)
        return total / number.clamp_min(1)
