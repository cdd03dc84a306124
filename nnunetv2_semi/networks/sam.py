"""SAM and MedSAM as foundation models: adapters of low rank in the encoder, one mask a class, no prompts.

Sources: Kirillov et al., "Segment anything", ICCV 2023; Ma et al., "Segment anything in medical images", Nature
Communications 2024; the manner of adapting it: Zhang and Liu, "Customized segment anything model for medical image
segmentation", arXiv 2304.13785.

transformers is imported when a model is built, not before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.networks.foundation import FoundationModel
from nnunetv2_semi.networks.foundation_weights import (
    local_weights,
    missing_extra,
    read_tensors,
    require_same_parameters,
)
from nnunetv2_semi.networks.gradient_checkpointing import keep_inputs_alone
from nnunetv2_semi.networks.lora import LoRAQueryValue, replace_layers
from nnunetv2_semi.networks.sam_weights import (
    HEADS,
    SAMWeights,
    from_original_layout,
    is_original_layout,
    resized_to,
    with_both_position_matrices,
    without_other_heads,
)
from nnunetv2_semi.precision import without_autocast

# Of photographs, in units of 0 to 1, as SAM was trained.
_PIXEL_MEAN = [value / 255 for value in (123.675, 116.28, 103.53)]
_PIXEL_STD = [value / 255 for value in (58.395, 57.12, 57.375)]
# That of the vision configuration is 1e-10: for weights that a file will replace.
_INITIALIZER_RANGE = 0.02


class SAMFoundation(FoundationModel):
    """SamModel of transformers for nnU-Net's 2D patches; logits have a quarter of the model's input size per axis.

    What trains: adapters of query and value in every layer of the image encoder; the embedding that stands for "no mask
    prompt", which is all that is reached of the prompt encoder without prompts; and the mask decoder, except its
    estimate of quality and what makes the mask of its first token, which is no output. The rest is frozen.

    What it does to a patch (B, C, height, width) of z-scores: every channel of every patch is scaled to 0 to 1 by its
    smallest and largest value; the patch is resized bilinearly to the square input size; one channel is repeated to
    three, three stay as they are, and other numbers go through a linear map to three that starts as their mean and
    trains (a fixed mean would cancel modalities of opposite contrast). Then `"sam"` normalises as SAM's photographs
    were, `"medsam"` leaves 0 to 1.

    Args:
        model: a SamModel with a mask token a class and one besides. Taken over.
        num_channels: C, of patches.
        rank: of the adapters.
        alpha: the adapters' change is scaled by alpha / rank; None: not scaled.
        normalisation: what the weights expect.
        checkpointing: keep the input of each encoder layer alone and compute it again for its gradient.
        from_file: names of the parameters of ``model`` that came from a file.
    """

    def __init__(self, model: nn.Module, num_channels: int, *, rank: int = 4, alpha: float | None = None,
                 normalisation: Literal["sam", "medsam"] = "sam", checkpointing: bool = False,
                 from_file: Iterable[str] = ()) -> None:
        super().__init__()
        self.model = model
        parameters = dict(model.named_parameters(remove_duplicate=False))
        loaded = [parameters[name] for name in from_file]
        sam: Any = model
        self.image_size: int = sam.config.vision_config.image_size
        _freeze_what_does_not_train(sam)
        fused = [layer.attn.qkv for layer in sam.vision_encoder.layers]
        replace_layers(model, {layer: LoRAQueryValue(layer, rank, alpha) for layer in fused})
        if checkpointing:
            keep_inputs_alone(sam.vision_encoder.layers)
        self.to_three_channels = None if num_channels in (1, 3) else _mean_of_channels(num_channels)
        photographs = normalisation == "sam"
        mean, std = (_PIXEL_MEAN, _PIXEL_STD) if photographs else ([0.0] * 3, [1.0] * 3)
        self.pixel_mean: torch.Tensor
        self.pixel_std: torch.Tensor
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self._note_frozen(loaded)

    @classmethod
    def from_weights(cls, weights: str, num_channels: int, num_classes: int, *, image_size: int | None = None,
                     rank: int = 4, alpha: float | None = None, normalisation: Literal["sam", "medsam"] = "sam",
                     checkpointing: bool = False) -> SAMFoundation:
        """A model with the weights that ``weights`` stands for, see `local_weights`, and ``num_classes`` masks.

        image_size: pixels a side, a multiple of the encoder's patch size; None: as the weights were trained.

        Raises:
            UserError: transformers is not installed; the weights are not to be had or do not fit; ``image_size`` is not
                such a multiple.
        """
        model, from_file, notes = sam_model(weights, num_classes, image_size)
        foundation = cls(model, num_channels, rank=rank, alpha=alpha, normalisation=normalisation,
                         checkpointing=checkpointing, from_file=from_file)
        foundation.notes = notes
        return foundation

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``image`` (B, C, height, width) -> logits (B, K, image_size / 4, image_size / 4)."""
        return self.model(pixel_values=self.pixels(image), multimask_output=True).pred_masks.squeeze(1)

    def pixels(self, image: torch.Tensor) -> torch.Tensor:
        """What the encoder gets of ``image`` (B, C, height, width): float32 (B, 3, image_size, image_size)."""
        with without_autocast(image.device):
            side = self.image_size
            scaled = F.interpolate(unit_range(image.float()), (side, side), mode="bilinear", antialias=True)
            if self.to_three_channels is not None:
                scaled = self.to_three_channels(scaled)
            return (scaled - self.pixel_mean) / self.pixel_std


def unit_range(image: torch.Tensor) -> torch.Tensor:
    """Every channel of every patch of ``image`` (B, C, *spatial), scaled to 0 to 1; 0 where it is constant."""
    axes = tuple(range(2, image.ndim))
    low, high = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
    return (image - low) / (high - low).clamp_min(1e-6)


def sam_model(weights: str, num_classes: int,
              image_size: int | None = None) -> tuple[nn.Module, list[str], list[str]]:
    """A SamModel with ``num_classes`` masks: the model, names of its parameters from a file, and notes for the log.

    Raises UserError as `SAMFoundation.from_weights`.
    """
    try:
        from transformers import SamConfig, SamModel
    except ImportError as error:
        raise missing_extra("transformers") from error
    path = local_weights(weights)
    found = None if path is None else _read(path)
    config: Any = SamConfig() if found is None else \
        SamConfig(vision_config=found.vision, prompt_encoder_config=found.prompt, mask_decoder_config=found.decoder)
    _for_segmentation(config, num_classes, image_size)
    model = SamModel(config)
    if found is None:
        return model, [], ["SAM starts from random weights (ViT-B)."]
    own = model.state_dict()
    # The decoder leaves the first token's mask out.
    state = without_other_heads(resized_to(own, with_both_position_matrices(found.state)), num_classes + 1)
    new = {name for name in own if name.startswith(HEADS)} - state.keys()
    require_same_parameters({name: value for name, value in own.items() if name not in new}, state, found.path)
    model.load_state_dict(state, strict=False)
    notes = []
    trained_size = found.vision["image_size"]
    if trained_size != config.vision_config.image_size:
        notes.append(f"SAM's position embeddings are resized from inputs of {trained_size} pixels to "
                     f"{config.vision_config.image_size}.")
    if new:
        _reset_heads(model.mask_decoder)
        notes.append("SAM's mask tokens and what makes masks of them start anew, one for each of "
                     f"{num_classes} classes.")
    else:
        notes.append(f"SAM's mask tokens are the file's, which has them for {num_classes} classes too.")
    return model, [name for name in own if name not in new], notes


def _read(path: Path) -> SAMWeights:
    if path.is_file():
        try:
            state = read_tensors(path)
        except UserError as error:
            raise UserError(f'{error} For a checkpoint of nnU-Net write "foundation": "nnunet" beside it.') from error
        if is_original_layout(state):
            return from_original_layout(state, path)
        raise UserError(f"{path} has not the names of SAM's original code, such as image_encoder.pos_embed. In the "
                        "format of transformers, give the folder with config.json.")
    description = path / "config.json"
    if not description.is_file():
        raise UserError(f"{path} has no config.json: it is no model in the format of transformers. For weights in the "
                        "layout of SAM's original code, give the file itself.")
    content = json.loads(description.read_text(encoding="utf-8"))
    if content.get("model_type") != "sam":
        raise UserError(f"{description} describes a model of type {content.get('model_type')!r}, not \"sam\".")
    from transformers import SamConfig

    config: Any = SamConfig.from_pretrained(path)
    return SAMWeights(path, read_tensors(path), config.vision_config.to_dict(), config.prompt_encoder_config.to_dict(),
                      config.mask_decoder_config.to_dict())


def _for_segmentation(config: Any, num_classes: int, image_size: int | None) -> None:
    """Change a configuration for ``num_classes`` masks and inputs of ``image_size``."""
    vision, prompt = config.vision_config, config.prompt_encoder_config
    size = vision.image_size if image_size is None else image_size
    if size < vision.patch_size or size % vision.patch_size:
        raise UserError(f"The input size of SAM must be a multiple of {vision.patch_size} pixels, got {size}.")
    vision.image_size = prompt.image_size = size
    prompt.image_embedding_size = size // prompt.patch_size
    vision.initializer_range = _INITIALIZER_RANGE
    config.mask_decoder_config.num_multimask_outputs = num_classes


def _freeze_what_does_not_train(model: Any) -> None:
    """Leave the mask decoder and the prompt encoder trainable as far as a gradient reaches them."""
    for part in (model.shared_image_embedding, model.vision_encoder, model.prompt_encoder,
                 model.mask_decoder.iou_prediction_head, model.mask_decoder.output_hypernetworks_mlps[0]):
        part.requires_grad_(False)
    model.prompt_encoder.no_mask_embed.requires_grad_(True)


def _reset_heads(decoder: Any) -> None:
    """As the original code starts them: PyTorch's defaults. Those of transformers would give logits near zero."""
    for head in (decoder.mask_tokens, decoder.output_hypernetworks_mlps, decoder.iou_prediction_head):
        for layer in head.modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                layer.reset_parameters()


def _mean_of_channels(num_channels: int) -> nn.Conv2d:
    """A linear map to three channels, each the mean of ``num_channels``."""
    layer = nn.Conv2d(num_channels, 3, 1)
    with torch.no_grad():
        layer.weight.fill_(1 / num_channels)
        layer.bias.zero_()  # type: ignore[union-attr]
    return layer
