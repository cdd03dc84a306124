"""One encoder per modality, features fused at every scale, one decoder of them all and a light one per modality."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nnunetv2_semi.losses.predictions import Logits
from nnunetv2_semi.networks.cross_modal_attention import CrossModalAttention
from nnunetv2_semi.networks.deployment import Deployed
from nnunetv2_semi.networks.modality_encoders import require_encoder_and_decoder
from nnunetv2_semi.present_channels import present_channels, present_modalities

_DROPOUT = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


class FusionCore(nn.Module):
    """The encoders and decoders; what a training step calls.

    Args:
        networks: modality name -> nnU-Net's network for its channels alone. All give their encoder, the first one its
            decoder.
        channels: modality name -> its channels in the whole image.
        attention_scales: encoder stages with attention between modalities.
        attention_heads: of it.
        dropout: probability with which a channel of the fused bottleneck is dropped.

    Raises:
        UserError: the networks have no encoder and decoder of nnU-Net's.
    """

    def __init__(self, networks: Mapping[str, nn.Module], channels: Mapping[str, Sequence[int]],
                 attention_scales: Sequence[int], attention_heads: int, dropout: float) -> None:
        super().__init__()
        first: Any = next(iter(networks.values()))
        require_encoder_and_decoder(first, "modalities are fused")
        self.names = tuple(networks)
        self.channels = {name: list(channels[name]) for name in self.names}
        self.encoders = nn.ModuleList([getattr(network, "encoder") for network in networks.values()])  # noqa: B009
        encoder, decoder = first.encoder, first.decoder
        decoder.encoder = None  # it would be saved twice
        widths = list(encoder.output_channels)
        self.head = DroppedDecoder(_DROPOUT[_dimensions(encoder)](dropout), decoder)
        self.fusions = nn.ModuleList([_mean_of_modalities(encoder.conv_op, len(self.names), width)
                                      for width in widths])
        self.attention = nn.ModuleDict({str(scale): CrossModalAttention(widths[scale], attention_heads)
                                        for scale in attention_scales})
        self.own_decoders = nn.ModuleList([LightDecoder(single, decoder.num_classes) for single in self.encoders])

    def present(self, image: torch.Tensor) -> torch.Tensor:
        """Which modalities each ``image`` (B, C, *spatial) has: bool (B, modalities); all where there is none."""
        present = present_modalities(present_channels(image), self.channels.values())
        return present | ~present.any(1, keepdim=True)

    def features(self, image: torch.Tensor) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
        """Of ``image`` (B, C, *spatial): fused features at each scale, finest first, and those of each modality."""
        present = self.present(image)
        own = [encoder(image[:, self.channels[name]]) for name, encoder in zip(self.names, self.encoders, strict=True)]
        shown = present.to(image).unflatten(1, (len(self.names), 1))
        # as many modalities as there could be, so that the sum over those that are there is their mean
        shares = (shown * len(self.names) / shown.sum(1, keepdim=True)).unbind(1)
        fused = []
        for scale, fusion in enumerate(self.fusions):
            at_scale = [features[scale] for features in own]
            if str(scale) in self.attention:
                at_scale = self.attention[str(scale)](at_scale, present)
            # in the features' own precision: single precision would double the largest tensors
            fused.append(fusion(torch.cat([single * share.to(single).view(-1, *[1] * (single.ndim - 1))
                                           for single, share in zip(at_scale, shares, strict=True)], 1)))
        return fused, own

    def of_each(self, own: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """Logits (B, K, *spatial) of each modality's light decoder, of its features alone."""
        return [decoder(features) for decoder, features in zip(self.own_decoders, own, strict=True)]

    def forward(self, image: torch.Tensor, each: bool = False) -> Any:
        """``image`` (B, C, *spatial) -> logits of the fused decoder, a list of them, finest first, with deep
        supervision; with ``each`` these and a list of the logits (B, K, *spatial) of each modality's light decoder.
        """
        fused, own = self.features(image)
        logits = self.head(fused)
        return (logits, self.of_each(own)) if each else logits


class DroppedDecoder(nn.Module):
    """nnU-Net's decoder behind dropout of the bottleneck."""

    def __init__(self, dropout: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.dropout, self.decoder = dropout, decoder

    def forward(self, features: Sequence[torch.Tensor]) -> Logits:
        """Features of each scale, finest first -> logits, a list of them with deep supervision."""
        return self.decoder([*features[:-1], self.dropout(features[-1])])


class LightDecoder(nn.Module):
    """A decoder of few channels: each scale's features, reduced, are added to those of the coarser one, upsampled.

    It has half as many channels as the encoder's first stage, eight at least.
    """

    def __init__(self, encoder: Any, num_classes: int) -> None:
        super().__init__()
        conv, width = encoder.conv_op, max(8, encoder.output_channels[0] // 2)
        self.reduce = nn.ModuleList([conv(channels, width, 1) for channels in encoder.output_channels])
        kernel = encoder.kernel_sizes[0]
        sizes = [kernel] * _dimensions(encoder) if isinstance(kernel, int) else list(kernel)
        norm = [] if encoder.norm_op is None else [encoder.norm_op(width, **(encoder.norm_op_kwargs or {}))]
        self.block = nn.Sequential(conv(width, width, sizes, 1, [(size - 1) // 2 for size in sizes]), *norm,
                                   encoder.nonlin(**(encoder.nonlin_kwargs or {})))
        self.segment = conv(width, num_classes, 1)

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Features of each scale, finest first -> logits (B, K, *spatial)."""
        summed = self.reduce[-1](features[-1])
        for layer, finer in zip(list(self.reduce)[-2::-1], list(features)[-2::-1], strict=True):
            mode = _LINEAR[finer.ndim - 2]
            reduced = layer(finer)
            summed = reduced + F.interpolate(summed, finer.shape[2:], mode=mode).to(reduced)
        return self.segment(self.block(summed))


class FusedNetwork(Deployed):
    """`FusionCore` behind nnU-Net's interface: predicts with whatever modalities an image has.

    Takes the same arguments.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.core = FusionCore(*args, **kwargs)

    @property
    def decoder(self) -> nn.Module:
        """Whose ``deep_supervision`` nnU-Net switches."""
        return self.core.head.decoder

    def forward(self, image: torch.Tensor) -> Logits:
        """``image`` (B, C, *spatial) -> logits (B, K, *spatial), a list of them, finest first, with deep supervision.
        """
        return self.core(image)

    def parts(self) -> dict[str, nn.Module]:
        """Each modality by itself, with its light decoder."""
        return {name: OwnDecoder(self, index) for index, name in enumerate(self.core.names)}

    def part_applies(self, name: str, present: torch.Tensor) -> torch.Tensor:
        """Images that have the modality."""
        return present[:, self.core.names.index(name)]

    def with_parts(self, image: torch.Tensor) -> tuple[Logits, dict[str, Logits]]:
        """Of one pass through each encoder."""
        fused, each = self.core(image, each=True)
        return fused, {name: self.at_scales_of(fused, logits)
                       for name, logits in zip(self.core.names, each, strict=True)}

    @staticmethod
    def at_scales_of(fused: Logits, logits: torch.Tensor) -> Logits:
        """``logits`` (B, K, *spatial) at every scale of ``fused``, for nnU-Net's loss in validation."""
        if isinstance(fused, torch.Tensor):
            return logits
        return [logits if scale.shape[2:] == logits.shape[2:] else
                F.interpolate(logits, scale.shape[2:], mode=_LINEAR[logits.ndim - 2]) for scale in fused]


class OwnDecoder(nn.Module):
    """One modality's encoder and light decoder behind the whole image's interface; has no weights of its own."""

    def __init__(self, network: FusedNetwork, index: int) -> None:
        super().__init__()
        core = network.core
        self.encoder, self.own_decoder = core.encoders[index], core.own_decoders[index]
        self.channels = core.channels[core.names[index]]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``image`` (B, C, *spatial) -> logits (B, K, *spatial)."""
        return self.own_decoder(self.encoder(image[:, self.channels]))


def attention_scales(strides: Sequence[Sequence[int]], patch_size: Sequence[int], modalities: int,
                     most_tokens: int) -> list[int]:
    """Encoder stages at which modalities attend to each other: the bottleneck, and the one above if it is small enough.

    Args:
        strides: of each stage, along each axis.
        patch_size: voxels per axis.
        modalities: number of them.
        most_tokens: voxels of all modalities together, of the stage above.
    """
    sizes, shape = [], [float(size) for size in patch_size]
    for stride in strides:
        shape = [size / step for size, step in zip(shape, stride, strict=True)]
        sizes.append(modalities * math.prod(shape))
    last = len(sizes) - 1
    return [last - 1, last] if last > 0 and sizes[last - 1] <= most_tokens else [last]


def _dimensions(encoder: Any) -> int:
    return len(encoder.strides[0])


def _mean_of_modalities(conv_op: Any, modalities: int, width: int) -> nn.Module:
    """A 1×1 convolution of concatenated features that starts as their mean."""
    layer = conv_op(modalities * width, width, 1)
    with torch.no_grad():
        same = torch.eye(width).repeat(1, modalities) / modalities
        layer.weight.copy_(same.view(layer.weight.shape))
        layer.bias.zero_()
    return layer
