"""The matched control: same loader, iterations, augmentation and seeds, no unlabelled data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from nnunetv2_semi.data.mixing import CutMix
from nnunetv2_semi.methods.base import Batch, Method, Target, Term
from nnunetv2_semi.methods.settings import Settings as BaseSettings


@dataclass(frozen=True)
class SupervisedSettings(BaseSettings):
    """labelled_mixing: weight of nnU-Net's loss on labelled patches pasted into each other, beside that on the plain
    ones (0: none). labelled_box: sides of the pasted box, fraction of the patch's."""

    labelled_mixing: float = 0.0
    labelled_box: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "labelled_mixing")
        self.fractions("labelled_box")


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
        yield [self.supervised(next(passes), target, "labelled_mixing", weight)]


def pasted_into_each_other(batch: Batch, box: float) -> tuple[torch.Tensor, Target]:
    """Labelled patches, in a box of each the next one, and their targets; ``box``: sides, fraction of the patch's."""
    mixing = CutMix.draw(batch.labelled, box)
    return mixing.of(batch.labelled), mixing.of(batch.target)
