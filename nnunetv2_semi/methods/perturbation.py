"""How the student's unlabelled patches are made harder than the teacher's: CutMix and an intensity view."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnunetv2_semi.data.mixing import CutMix
from nnunetv2_semi.data.views import IntensityViews
from nnunetv2_semi.methods.settings import Settings as BaseSettings


@dataclass(frozen=True)
class PerturbationSettings(BaseSettings):
    """cutmix: sides of the box that comes from the next unlabelled patch, fraction of the patch's (0: none).
    Intensity view: view_gamma, view_scale, view_shift, view_noise, view_noise_probability, see `IntensityViews.draw`.
    """

    cutmix: float = 0.5
    view_gamma: float = 1.5
    view_scale: float = 0.5
    view_shift: float = 0.5
    view_noise: float = 0.2
    view_noise_probability: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fractions("cutmix", "view_noise_probability")
        self.at_least(0, "view_gamma", "view_scale", "view_shift", "view_noise")


def intensity_view(image: torch.Tensor, settings: PerturbationSettings) -> torch.Tensor:
    """A view of ``image`` (B, C, *spatial) with other intensities, as the settings say."""
    return IntensityViews.draw(1, image, settings.view_scale, settings.view_shift, settings.view_noise,
                               settings.view_noise_probability, settings.view_gamma).apply(image)[0]


def perturbed(image: torch.Tensor, settings: PerturbationSettings) -> tuple[torch.Tensor, CutMix]:
    """``image`` (B, C, *spatial) mixed and with other intensities, and the mixing, to do the same to its labels."""
    mixing = CutMix.draw(image, settings.cutmix)
    return intensity_view(mixing.of(image), settings), mixing
