"""One encoder per modality before one shared decoder: images of any modality in one feature space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import nn

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.present_channels import present_channels, present_modalities

Pyramid = tuple[list[torch.Tensor], list[torch.Tensor]]


def require_encoder_and_decoder(network: nn.Module, purpose: str) -> None:
    """Raise UserError where ``network`` is none of nnU-Net's U-Nets; ``purpose`` says what these are needed for."""
    if not hasattr(network, "encoder") or not hasattr(getattr(network, "decoder", None), "transpconvs"):
        raise UserError(f"{type(network).__name__} has no nnU-Net encoder and decoder: {purpose} with PlainConvUNet "
                        "and ResidualEncoderUNet.")


class ModalityEncoders(nn.Module):
    """nnU-Net's network with an encoder for each modality.

    networks: modality name -> an nnU-Net network (``encoder`` and ``decoder``) for this modality's channels. All give
    their encoder; the first gives the decoder. channels: modality name -> its channels in the whole image.
    Raises UserError for networks that are built otherwise.
    """

    decoder: UNetDecoder

    def __init__(self, networks: Mapping[str, nn.Module], channels: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        first = next(iter(networks.values()))
        require_encoder_and_decoder(first, "modalities can share a decoder")
        self.names = tuple(networks)
        self.channels = {name: list(channels[name]) for name in self.names}
        self.encoders = nn.ModuleList([getattr(network, "encoder") for network in networks.values()])  # noqa: B009
        self.decoder = getattr(first, "decoder")  # noqa: B009
        # nnU-Net's decoder keeps a reference to its encoder, whose weights would be saved twice
        self.decoder.encoder = None

    @property
    def widths(self) -> list[int]:
        """Channels of the decoder stages' features, coarsest stage first."""
        return [layer.in_channels for layer in self.decoder.seg_layers]

    def stock_weights(self, name: str) -> dict[str, torch.Tensor]:
        """State dict of nnU-Net's network with the encoder of modality ``name`` and the shared decoder."""
        encoder = self.encoders[self.names.index(name)].state_dict()
        # nnU-Net's decoder refers to its encoder: the weights of that stand in its state twice.
        return {**{f"encoder.{key}": value for key, value in encoder.items()},
                **{f"decoder.{key}": value for key, value in self.decoder.state_dict().items()},
                **{f"decoder.encoder.{key}": value for key, value in encoder.items()}}

    def present_modalities(self, image: torch.Tensor) -> torch.Tensor:
        """Which modalities each ``image`` (B, C, *spatial) has: bool (B, modalities); all where there is none."""
        present = present_modalities(present_channels(image), self.channels.values())
        return present | ~present.any(1, keepdim=True)

    def modality(self, image: torch.Tensor) -> torch.Tensor:
        """The index (B,) of the first modality that each image (B, C, *spatial) has."""
        return self.present_modalities(image).int().argmax(1)

    def forward(self, image: torch.Tensor, known: int | None = None) -> Pyramid:
        """Logits, and the features of the decoder's stages, of ``image`` (B, C, *spatial), all of whose channels but
        those of one modality, for each patch its own, are absent.

        known: the modality of all patches, whose channels alone are looked at then; None: it is searched for.
        Logits (B, K, *spatial of the stage), finest first, as many as deep supervision asks for; features
        (B, widths[stage], *spatial of the stage), coarsest first.
        """
        if known is not None:
            return self._decoded(self.encoders[known](image[:, self.channels[self.names[known]]]))
        modality = self.modality(image)
        rows, levels = [], []
        for index, (name, encoder) in enumerate(zip(self.names, self.encoders, strict=True)):
            own = (modality == index).nonzero()[:, 0]
            if len(own):
                rows.append(own)
                levels.append(encoder(image[own][:, self.channels[name]]))
        skips = levels[0]
        if len(levels) > 1:
            back = torch.cat(rows).argsort()
            skips = [torch.cat(parts)[back] for parts in zip(*levels, strict=True)]
        return self._decoded(skips)

    def _decoded(self, skips: list[torch.Tensor]) -> Pyramid:
        decoder, features, logits = self.decoder, skips[-1], []
        pyramid = []
        for stage, skip in enumerate(reversed(skips[:-1])):
            features = decoder.stages[stage](torch.cat([decoder.transpconvs[stage](features), skip], 1))
            pyramid.append(features)
            if decoder.deep_supervision or stage == len(decoder.stages) - 1:
                logits.append(decoder.seg_layers[stage](features))
        return logits[::-1], pyramid
