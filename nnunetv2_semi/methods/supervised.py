"""The matched control: same loader, iterations, augmentation and seeds, no unlabelled data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from nnunetv2_semi.methods.base import Method
from nnunetv2_semi.methods.contract import Batch, Target, Term
from nnunetv2_semi.methods.mixing import CutMix
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.methods.settings import setting


class SupervisedSettings(BaseSettings):
    """Settings of Supervised."""

    labelled_mixing: float = setting(
        0.0,
        "weight of nnU-Net's loss on labelled patches pasted into each other, beside that on plain ones; `0`:"
        " none. With `1` it is the second control of [Mix](mix.md#when-it-can-help)",
        at_least=0,
    )
    labelled_box: float = setting(0.5, "sides of the pasted box, as a share of the patch's", at_least=0, at_most=1)

    @property
    def labelled_mixing_by(self) -> str | None:
        return "labelled_mixing" if self.labelled_mixing > 0 else None


class Supervised(Method):
    """nnU-Net's own training step within the semi-supervised trainer.

    With ``labelled_mixing`` it is the second control of a method that pastes patches into each other: what it gains is
    augmentation, and owes nothing to unlabelled images.
    """

    name: ClassVar[str] = "Supervised"
    Settings: ClassVar[type[BaseSettings]] = SupervisedSettings
    uses_unlabelled: ClassVar[bool] = False
    settings: SupervisedSettings

    @classmethod
    def graphs(cls, settings: BaseSettings) -> int:
        assert isinstance(settings, SupervisedSettings)
        return 1 + (settings.labelled_mixing > 0)

    def loss(self, batch: Batch) -> Iterator[list[Term]]:
        weight = self.settings.labelled_mixing
        if weight == 0:
            yield from super().loss(batch)
            return
        image, target = pasted_into_each_other(batch, self.settings.labelled_box)
        passes = self.passes(self.student, batch.labelled, image)
        yield [self.supervised(next(passes), batch.target)]
        yield [self.supervised(next(passes), target, "labelled_mixing", weight, patches=number_mixed(image))]


def number_mixed(image: torch.Tensor) -> int:
    """How many of the patches (B, C, *spatial) count as mixed: all, but for a lone one, which has no other.

    Where a patch and the next show different channels it stays plain, and counts: labels keep their weight.
    """
    return len(image) if len(image) > 1 else 0


def pasted_into_each_other(batch: Batch, box: float) -> tuple[torch.Tensor, Target]:
    """Labelled patches, in a box of each the next one, and their targets; ``box``: sides, fraction of the patch's."""
    mixing = CutMix.draw(batch.labelled, box)
    return mixing.of(batch.labelled), mixing.of(batch.target)
