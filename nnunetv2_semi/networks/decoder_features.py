"""A segmentation network that gives projected features of one of its decoder stages beside its logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nnunetv2_semi.errors import UserError

Output = tuple[torch.Tensor | list[torch.Tensor], torch.Tensor]


def cumulative_strides(strides: Sequence[int | Sequence[int]], dimensions: int) -> list[tuple[int, ...]]:
    """Voxels of the patch that one voxel of each encoder level covers, per axis.

    strides: of each level relative to the one before, as in the plans.
    """
    total, covered = (1,) * dimensions, []
    for stride in strides:
        single = (stride,) * dimensions if isinstance(stride, int) else tuple(stride)
        total = tuple(t * s for t, s in zip(total, single, strict=True))
        covered.append(total)
    return covered


def level_of_resolution(covered: Sequence[tuple[int, ...]], resolution: int) -> int:
    """The coarsest encoder level with a decoder stage whose voxels cover at most ``resolution`` voxels on every axis.

    On anisotropic grids the axis with the largest stride decides, so that "1/4" is 1/4 in plane.
    """
    fitting = [level for level, axes in enumerate(covered[:-1]) if max(axes) <= resolution]
    return max(fitting, default=0)


class ProjectedFeatures(nn.Module):
    """``network`` with a projection head (1x1 convolution, PReLU, 1x1 convolution) on a decoder stage.

    network: nnU-Net's (PlainConvUNet, ResidualEncoderUNet, or another with ``encoder.strides``, ``.output_channels``,
    ``.conv_op`` and ``decoder.stages``); shared, and not a part of this module: only the head's weights are its own.
    resolution: voxels of the patch per voxel of the stage, see `level_of_resolution`. channels: of the projection.
    Raises UserError for a network that is built otherwise.
    """

    def __init__(self, network: nn.Module, resolution: int = 4, channels: int = 64) -> None:
        super().__init__()
        encoder, decoder = getattr(network, "encoder", None), getattr(network, "decoder", None)
        if encoder is None or decoder is None or not hasattr(decoder, "stages") or not hasattr(encoder, "strides"):
            raise UserError(f"{type(network).__name__} has no nnU-Net decoder to take features from; RCPS works with "
                            'PlainConvUNet and ResidualEncoderUNet, and without features with "contrast": false.')
        self._network = (network,)  # in a tuple, so that its weights are not among the head's
        convolution = encoder.conv_op
        dimensions = 3 if convolution is nn.Conv3d else 2
        self.level = level_of_resolution(cumulative_strides(encoder.strides, dimensions), resolution)
        self.stage = len(decoder.stages) - 1 - self.level
        width = encoder.output_channels[self.level]
        self.head = nn.Sequential(convolution(width, width, 1), nn.PReLU(width), convolution(width, channels, 1))
        self._wanted = False  # nothing is kept where the network is called by itself
        self._features: torch.Tensor | None = None
        decoder.stages[self.stage].register_forward_hook(self._keep)

    def _keep(self, _stage: nn.Module, _inputs: tuple, features: torch.Tensor) -> None:
        if self._wanted:
            self._features = features

    def forward(self, image: torch.Tensor) -> Output:
        """``image`` (B, C, *spatial) -> the network's logits, and features (B, channels, *spatial of the stage)."""
        self._wanted = True
        try:
            logits = self._network[0](image)
        finally:
            self._wanted = False
        features, self._features = self._features, None
        assert features is not None
        return logits, self.head(features)
