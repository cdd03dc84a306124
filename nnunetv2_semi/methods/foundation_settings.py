"""Settings of a foundation model that a method trains beside nnU-Net's network, and the model that they ask for."""

from __future__ import annotations

from typing import Literal

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods.settings import Settings, setting
from nnunetv2_semi.networks.foundation import FoundationModel
from nnunetv2_semi.networks.foundation_weights import HUB, local_weights, weights_digest
from nnunetv2_semi.networks.frozen_weights import leave_out_of_state_dict
from nnunetv2_semi.networks.nnunet_foundation import NnUNetFoundation, require_file
from nnunetv2_semi.networks.sam import SAMFoundation


class FoundationSettings(Settings):
    """Which foundation model, its weights, and how it is optimised."""

    foundation: Literal["sam", "nnunet"] = setting(
        "sam",
        '`"sam"`: SAM or MedSAM, in 2D; `"nnunet"`: a trained nnU-Net model',
    )
    weights: str | None = setting(
        None,
        "of the foundation model: a file (`sam_vit_b_01ec64.pth`, `medsam_vit_b.pth`, nnU-Net's "
        '`checkpoint_final.pth`), a folder in the format of transformers, or `"hub:owner/name"`; `"random"`: none',
    )
    weights_sha256: str | None = setting(
        None,
        "SHA-256 of that file or folder; written by the trainer, checked by `--c`",
    )
    image_size: int = setting(512, "`\"sam\"`: patches are resized to this many pixels a side", at_least=16)
    normalisation: Literal["sam", "medsam"] = setting(
        "sam",
        '`"sam"`: patches scaled to 0 to 1, then normalised as photographs; `"medsam"`: scaled to 0 to 1',
    )
    lora_rank: int = setting(4, "rank of the adapters; `0`, of `\"nnunet\"` alone: all weights train", at_least=0)
    foundation_lr: float = setting(1e-4, "initial learning rate of the foundation model (AdamW)", above=0)
    foundation_weight_decay: float = setting(0.1, "of AdamW", at_least=0)
    warmup_steps: int = setting(250, "over which that learning rate rises", at_least=0)


def require_foundation(settings: FoundationSettings, spatial_dims: int) -> None:
    """Raise UserError where ``settings`` ask for no model, or for one that does not take such patches."""
    if settings.weights is None:
        raise UserError(
            'SynFoC needs the weights of a foundation model. Put "SynFoC": {"weights": "/folder/medsam_vit_b.pth", '
            '"normalisation": "medsam"} into the "semi" object of the configuration in the plans file (docs/synfoc.md'
            ' says where to get them), or "weights": "random" to do without.')
    if settings.foundation == "sam" and spatial_dims != 2:
        raise UserError('SAM takes 2D patches. Train the 2d configuration, or set "SynFoC": {"foundation": "nnunet"}'
                        ' in the plans file\'s "semi" with the weights of a 3D nnU-Net.')
    if settings.foundation == "sam" and settings.lora_rank == 0:
        raise UserError('"lora_rank" of SynFoC must be at least 1 with SAM: its encoder is frozen.')


def build_foundation(settings: FoundationSettings, num_channels: int, num_heads: int,
                     spatial_dims: int) -> FoundationModel:
    """The foundation model with its weights.

    Raises UserError where the weights are not to be had, do not fit, or are not those that the plans file names.
    """
    require_foundation(settings, spatial_dims)
    assert settings.weights is not None
    checked_digest(settings)
    model: FoundationModel
    if settings.foundation == "nnunet":
        model = NnUNetFoundation.from_weights(settings.weights, num_channels, num_heads, spatial_dims,
                                              rank=settings.lora_rank)
    else:
        model = SAMFoundation.from_weights(settings.weights, num_channels, num_heads, image_size=settings.image_size,
                                           rank=settings.lora_rank, normalisation=settings.normalisation,
                                           checkpointing=settings.gradient_checkpointing)
    leave_out_of_state_dict(model, model.frozen_names())
    return model


def absolute(weights: str) -> str:
    """``weights`` as they are found from any folder: a path in full; other names stay."""
    path = None if weights.startswith(HUB) else local_weights(weights)
    return weights if path is None else str(path.resolve())


def checked_digest(settings: FoundationSettings) -> str | None:
    """SHA-256 of the foundation model's weights; None without weights. Raises UserError if the plans file has another.
    """
    path = local_weights(settings.weights) if settings.weights is not None else None
    if path is not None and settings.foundation == "nnunet":
        require_file(path)
    digest = None if path is None else weights_digest(path)
    if settings.weights_sha256 not in (None, digest):
        raise UserError(f"The weights of the foundation model in {settings.weights} are not those that the plans file "
                        f"names: their SHA-256 is {digest}, not {settings.weights_sha256}. Give that file, or take "
                        '"weights_sha256" out of the plans file for a new training.')
    return digest
