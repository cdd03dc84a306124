"""How the student's unlabelled patches are made harder than the teacher's: CutMix and an intensity view."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nnunetv2_semi.data.views import IntensityViews
from nnunetv2_semi.methods.mixing import CutMix
from nnunetv2_semi.methods.settings import Settings as BaseSettings
from nnunetv2_semi.methods.settings import setting


class ViewSettings(BaseSettings):
    """How the intensities of the student's unlabelled patches are changed."""

    view_gamma: float = setting(
        1.5,
        "other intensities: a gamma curve between a patch's lowest and highest intensity, exponent 1 / (1 + "
        "this) to 1 + this",
        at_least=0,
    )
    view_scale: float = setting(0.5, "then intensities are multiplied by 1 ± this", at_least=0, at_most=1)
    view_shift: float = setting(0.5, "and shifted by up to this many standard deviations of the channel", at_least=0)
    view_noise: float = setting(0.2, "largest standard deviation of the noise", at_least=0)
    view_noise_probability: float = setting(0.5, "of adding noise", at_least=0, at_most=1)


class PerturbationSettings(ViewSettings):
    """How the student's unlabelled patches are changed."""

    cutmix: float = setting(
        0.5,
        "sides of the box that shows the next unlabelled patch, as a share of the patch's; `0`: none",
        at_least=0, at_most=1,
    )

    @property
    def mixes_unlabelled(self) -> bool:
        return self.cutmix > 0


def intensity_view(image: torch.Tensor, settings: ViewSettings, masked_channels: Sequence[int]) -> torch.Tensor:
    """A view of ``image`` (B, C, *spatial) with other intensities, as the settings say.

    masked_channels: see `Context`.
    """
    drawn = IntensityViews.draw(1, image, settings.view_scale, settings.view_shift, settings.view_noise,
                                settings.view_noise_probability, settings.view_gamma)
    return drawn.apply(image, masked=masked_channels)[0]


def perturbed(image: torch.Tensor, settings: PerturbationSettings,
              masked_channels: Sequence[int]) -> tuple[torch.Tensor, CutMix]:
    """``image`` (B, C, *spatial) mixed and with other intensities, and the mixing, to do the same to its labels."""
    mixing = CutMix.draw(image, settings.cutmix)
    return intensity_view(mixing.of(image), settings, masked_channels), mixing
