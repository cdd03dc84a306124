"""Views of patches made on the training device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from nnunetv2_semi.present_channels import fill_absent, present_channels


def with_noise(
    image: torch.Tensor, standard_deviation: float, lowest: float | None = None, highest: float | None = None
) -> torch.Tensor:
    """``image`` (B, C, *spatial) plus Gaussian noise, clamped to [lowest, highest] (default: two standard deviations).

    Channels that a case lacks stay as they are. Draws from torch's global random state. Intensities are nnU-Net's
    normalised ones.
    """
    lowest = -2 * standard_deviation if lowest is None else lowest
    highest = 2 * standard_deviation if highest is None else highest
    noisy = torch.randn_like(image).mul_(standard_deviation).clamp_(lowest, highest).add_(image)
    return fill_absent(noisy, present_channels(image))


@dataclass(frozen=True)
class IntensityViews:
    """Drawn parameters of several intensity views of a batch; applied twice they give the same views.

    Source: Zhao et al., RCPS, IEEE JBHI 2023: a x + b s, then Gaussian noise with probability 1/2. Ours: before that a
    gamma curve between the lowest and the highest intensity of the patch, since a network with instance normalisation,
    as nnU-Net's are, takes scale and shift out again right after its first convolution.

    scale a, shift b, gamma: (views, B, C). sigma: (views, B), 0 where no noise was drawn. noise_seed: of the noise.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    sigma: torch.Tensor
    noise_seed: int
    gamma: torch.Tensor | None = None

    @classmethod
    def draw(cls, number: int, image: torch.Tensor, scale: float = 0.5, shift: float = 0.5, noise: float = 0.1,
             noise_probability: float = 0.5, gamma: float = 0.0) -> IntensityViews:
        """Parameters of ``number`` views of ``image`` (B, C, *spatial), from torch's global random state of the CPU.

        a ~ U(1 - scale, 1 + scale), b ~ U(-shift, shift), sigma ~ U(0, noise) with ``noise_probability``, the logarithm
        of the curve's exponent ~ U(-log(1 + gamma), log(1 + gamma)).
        """
        batch, channels = image.shape[:2]
        symmetric = 2 * torch.rand(2, number, batch, channels) - 1
        noisy = torch.rand(number, batch) < noise_probability
        return cls(1 + scale * symmetric[0], shift * symmetric[1], noise * torch.rand(number, batch) * noisy,
                   int(torch.randint(2**62, ())),
                   (1 + gamma) ** (2 * torch.rand(number, batch, channels) - 1) if gamma else None)

    def apply(self, image: torch.Tensor, shift_by: Literal["std", "mean"] = "std",
              masked: Sequence[int] = ()) -> torch.Tensor:
        """The views (views, B, C, *spatial) of ``image`` (B, C, *spatial), on its device, in its data type.

        Channels that a case lacks stay as they are.

        shift_by: b is in units of each channel's standard deviation, or of its mean, which is about 0 where intensities
        are z-scored.
        masked: channels whose zeros stay, see ``Context.masked_channels``.
        """
        rows = image.flatten(2)
        unit = rows.std(2) if shift_by == "std" else rows.mean(2)
        after = [1] * (image.ndim - 2)
        scale = self.scale.to(image).view(*self.scale.shape, *after)
        shift = (self.shift.to(image) * unit).view(*self.shift.shape, *after)
        views = torch.addcmul(shift, scale, image if self.gamma is None else self._curved(image))
        generator = torch.Generator(image.device).manual_seed(self.noise_seed)
        for view, patch in self.sigma.nonzero().tolist():
            noise = torch.randn(image.shape[1:], generator=generator, dtype=image.dtype, device=image.device)
            views[view, patch].add_(noise, alpha=float(self.sigma[view, patch]))
        for channel in masked:
            views[:, :, channel].masked_fill_(image[:, channel] == 0, 0)
        return fill_absent(views, present_channels(image).expand(len(views), -1, -1))

    def _curved(self, image: torch.Tensor) -> torch.Tensor:
        """(views, B, C, *spatial): l + (h - l) ((x - l) / (h - l))^gamma, l and h of each channel of a patch."""
        axes = tuple(range(2, image.ndim))
        lowest, highest = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
        span = (highest - lowest).clamp_min(torch.finfo(image.dtype).tiny)
        assert self.gamma is not None
        exponent = self.gamma.to(image).view(*self.gamma.shape, *[1] * len(axes))
        return torch.addcmul(lowest, span, ((image - lowest) / span).pow(exponent))
