"""Weights of SAM (Kirillov et al., ICCV 2023) in the names and shapes of transformers' SamModel.

Two layouts are read: that of transformers, and that of the original code (``sam_vit_b_01ec64.pth``, and
``medsam_vit_b.pth`` of Ma et al., Nature Communications 2024).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nnunetv2_semi.errors import UserError, shown

# Attention heads of the mask decoder, which no shape in a file tells; the original code has no other number.
_DECODER_HEADS = 8
_POSITIONS = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")
# Those that exist once a mask token; all are new where their number is.
HEADS = ("mask_decoder.mask_tokens.", "mask_decoder.output_hypernetworks_mlps.", "mask_decoder.iou_prediction_head.")

_MLP_OF_THREE = {"0": "proj_in", "1": "layers.0", "2": "proj_out"}
_ATTENTION = r"(self_attn|cross_attn_token_to_image|cross_attn_image_to_token)\.(.+)"
# Names of the original code, whole, and what transformers calls them; \d+ and groups are taken over.
_RENAMED: list[tuple[str, str]] = [
    (r"image_encoder\.pos_embed", "vision_encoder.pos_embed"),
    (r"image_encoder\.patch_embed\.proj\.(.+)", r"vision_encoder.patch_embed.projection.\1"),
    (r"image_encoder\.blocks\.(\d+)\.norm([12])\.(.+)", r"vision_encoder.layers.\1.layer_norm\2.\3"),
    (r"image_encoder\.blocks\.(\d+)\.(attn|mlp)\.(.+)", r"vision_encoder.layers.\1.\2.\3"),
    (r"image_encoder\.neck\.0\.(.+)", r"vision_encoder.neck.conv1.\1"),
    (r"image_encoder\.neck\.1\.(.+)", r"vision_encoder.neck.layer_norm1.\1"),
    (r"image_encoder\.neck\.2\.(.+)", r"vision_encoder.neck.conv2.\1"),
    (r"image_encoder\.neck\.3\.(.+)", r"vision_encoder.neck.layer_norm2.\1"),
    (r"prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix", _POSITIONS[0]),
    (r"prompt_encoder\.point_embeddings\.(\d+)\.(.+)", r"prompt_encoder.point_embed.\1.\2"),
    (r"prompt_encoder\.(not_a_point_embed|no_mask_embed)\.(.+)", r"prompt_encoder.\1.\2"),
    (r"prompt_encoder\.mask_downscaling\.0\.(.+)", r"prompt_encoder.mask_embed.conv1.\1"),
    (r"prompt_encoder\.mask_downscaling\.1\.(.+)", r"prompt_encoder.mask_embed.layer_norm1.\1"),
    (r"prompt_encoder\.mask_downscaling\.3\.(.+)", r"prompt_encoder.mask_embed.conv2.\1"),
    (r"prompt_encoder\.mask_downscaling\.4\.(.+)", r"prompt_encoder.mask_embed.layer_norm2.\1"),
    (r"prompt_encoder\.mask_downscaling\.6\.(.+)", r"prompt_encoder.mask_embed.conv3.\1"),
    (r"mask_decoder\.transformer\.layers\.(\d+)\.norm([1-4])\.(.+)",
     r"mask_decoder.transformer.layers.\1.layer_norm\2.\3"),
    (r"mask_decoder\.transformer\.layers\.(\d+)\.mlp\.(.+)", r"mask_decoder.transformer.layers.\1.mlp.\2"),
    (r"mask_decoder\.transformer\.layers\.(\d+)\." + _ATTENTION, r"mask_decoder.transformer.layers.\1.\2.\3"),
    (r"mask_decoder\.transformer\.final_attn_token_to_image\.(.+)",
     r"mask_decoder.transformer.final_attn_token_to_image.\1"),
    (r"mask_decoder\.transformer\.norm_final_attn\.(.+)", r"mask_decoder.transformer.layer_norm_final_attn.\1"),
    (r"mask_decoder\.(iou_token|mask_tokens)\.weight", r"mask_decoder.\1.weight"),
    (r"mask_decoder\.output_upscaling\.0\.(.+)", r"mask_decoder.upscale_conv1.\1"),
    (r"mask_decoder\.output_upscaling\.1\.(.+)", r"mask_decoder.upscale_layer_norm.\1"),
    (r"mask_decoder\.output_upscaling\.3\.(.+)", r"mask_decoder.upscale_conv2.\1"),
    *((rf"mask_decoder\.output_hypernetworks_mlps\.(\d+)\.layers\.{old}\.(.+)",
       rf"mask_decoder.output_hypernetworks_mlps.\1.{new}.\2") for old, new in _MLP_OF_THREE.items()),
    *((rf"mask_decoder\.iou_prediction_head\.layers\.{old}\.(.+)", rf"mask_decoder.iou_prediction_head.{new}.\1")
      for old, new in _MLP_OF_THREE.items()),
]


@dataclass(frozen=True)
class SAMWeights:
    """What was read.

    path: for messages. state: in transformers' names. vision, prompt, decoder: settings of transformers' configuration
    of the three parts.
    """

    path: Path
    state: dict[str, torch.Tensor]
    vision: dict[str, Any] = field(default_factory=dict)
    prompt: dict[str, Any] = field(default_factory=dict)
    decoder: dict[str, Any] = field(default_factory=dict)


def is_original_layout(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a state dict has the names of the original code."""
    return any(name.startswith("image_encoder.") for name in state)


def from_original_layout(state: Mapping[str, torch.Tensor], path: Path) -> SAMWeights:
    """``state`` with the names of the original code, which also tells the size of the network.

    Raises:
        UserError: ``state`` has names that SAM has not, or does not tell the network's size.
    """
    renamed, unknown = {}, []
    for name, value in state.items():
        known = _renamed(name)
        if known is None:
            unknown.append(name)
        else:
            renamed[known] = value
    if unknown:
        raise UserError(f"{path} is not a SAM with a plain vision transformer (ViT-B, L or H): it has "
                        f"{shown(unknown, 8)}.")
    renamed = with_both_position_matrices(renamed)
    try:
        vision, prompt, decoder = _settings(renamed)
    except KeyError as error:
        raise UserError(f"The weights in {path} do not fit SAM: {error.args[0]} is missing, among others.") from error
    if not vision["window_size"]:
        raise UserError(f"The weights in {path} do not tell which layers attend within windows: their input size is "
                        "that of a window. Save the model in the format of transformers, whose config.json does.")
    return SAMWeights(path, renamed, vision, prompt, decoder)


def with_both_position_matrices(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` with the matrix of the position encoding under the two names that transformers has for it."""
    filled = dict(state)
    for own, other in (_POSITIONS, _POSITIONS[::-1]):
        if own not in filled and other in filled:
            filled[own] = filled[other]
    return filled


def resized_to(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` with position embeddings and relative positions as long as those of a model for another input size.

    Which layers attend globally, and so have relative positions over the whole image, is told by the shapes.

    Args:
        own: parameters of that model, by name.
    """
    fitted = dict(state)
    for name, value in state.items():
        if name not in own or own[name].shape == value.shape:
            continue
        if name.endswith("pos_embed"):
            fitted[name] = resized_position_embedding(value, own[name].shape[1:3])
        elif name.endswith(("rel_pos_h", "rel_pos_w")):
            fitted[name] = resized_relative_positions(value, own[name].shape[0])
    return fitted


def resized_position_embedding(embedding: torch.Tensor, grid: tuple[int, ...] | torch.Size) -> torch.Tensor:
    """``embedding`` (1, height, width, dim), bilinearly interpolated to ``grid`` (height, width)."""
    channels_first = embedding.float().permute(0, 3, 1, 2)
    return F.interpolate(channels_first, tuple(grid), mode="bilinear").permute(0, 2, 3, 1).to(embedding.dtype)


def resized_relative_positions(positions: torch.Tensor, length: int) -> torch.Tensor:
    """``positions`` (2 size - 1, dim), from the most negative distance to the largest, interpolated to ``length``."""
    return F.interpolate(positions.float().T[None], length, mode="linear")[0].T.to(positions.dtype)


def without_other_heads(state: Mapping[str, torch.Tensor], num_tokens: int) -> dict[str, torch.Tensor]:
    """``state`` without what exists once a mask token, unless it has ``num_tokens`` of them."""
    tokens = state.get("mask_decoder.mask_tokens.weight")
    if tokens is None or len(tokens) == num_tokens:
        return dict(state)
    return {name: value for name, value in state.items() if not name.startswith(HEADS)}


def _renamed(name: str) -> str | None:
    for pattern, replacement in _RENAMED:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return None


def _settings(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Settings of the three parts that shapes tell; the rest is as in the original code."""
    def shape(name: str) -> torch.Size:
        return state[name].shape

    def count(prefix: str) -> int:
        return 1 + max((int(name[len(prefix):].split(".")[0]) for name in state if name.startswith(prefix)), default=-1)

    encoder, decoder, layer = "vision_encoder.", "mask_decoder.", "vision_encoder.layers.{}."
    grid, hidden = shape(encoder + "pos_embed")[1], shape(encoder + "pos_embed")[3]
    patch = shape(encoder + "patch_embed.projection.weight")[-1]
    num_layers = count(encoder + "layers.")
    lengths = [shape(layer.format(i) + "attn.rel_pos_h")[0] for i in range(num_layers)]
    windows = [length for length in lengths if length != 2 * grid - 1]
    size = {"image_size": grid * patch, "patch_size": patch}
    vision = {
        **size, "hidden_size": hidden, "num_hidden_layers": num_layers,
        "num_attention_heads": hidden // shape(layer.format(0) + "attn.rel_pos_h")[1],
        "mlp_dim": shape(layer.format(0) + "mlp.lin1.weight")[0],
        "output_channels": shape(encoder + "neck.conv1.weight")[0],
        "num_pos_feats": shape(_POSITIONS[0])[1],
        "global_attn_indexes": [i for i, length in enumerate(lengths) if length == 2 * grid - 1],
        "window_size": (windows[0] + 1) // 2 if windows else 0,
    }
    prompt = {
        **size, "hidden_size": shape("prompt_encoder.no_mask_embed.weight")[1],
        "mask_input_channels": shape("prompt_encoder.mask_embed.conv2.weight")[0],
        "num_point_embeddings": count("prompt_encoder.point_embed."),
    }
    width = shape(decoder + "iou_token.weight")[1]
    mask = {
        "hidden_size": width, "num_attention_heads": _DECODER_HEADS,
        "num_hidden_layers": count(decoder + "transformer.layers."),
        "mlp_dim": shape(decoder + "transformer.layers.0.mlp.lin1.weight")[0],
        "attention_downsample_rate":
            width // shape(decoder + "transformer.final_attn_token_to_image.q_proj.weight")[0],
        "iou_head_hidden_dim": shape(decoder + "iou_prediction_head.proj_in.weight")[0],
        "num_multimask_outputs": shape(decoder + "mask_tokens.weight")[0] - 1,
    }
    return vision, prompt, mask
