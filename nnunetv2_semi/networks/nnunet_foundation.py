"""A trained nnU-Net model as foundation model, in 2D or 3D."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunetv2_semi.errors import UserError, one_line
from nnunetv2_semi.losses.predictions import full_resolution
from nnunetv2_semi.networks.foundation import FoundationModel
from nnunetv2_semi.networks.foundation_weights import RANDOM, local_weights, require_same_parameters
from nnunetv2_semi.networks.lora import adapt_convolutions
from nnunetv2_semi.networks.stride_padding import cropped, padded_to_strides, product_of_strides

_HEADS = "decoder.seg_layers."


class NnUNetFoundation(FoundationModel):
    """A U-Net of nnU-Net with an adapter at every convolution, or as a whole; logits have the patch's grid.

    With adapters train, besides them: the segmentation head of the finest output, and the first convolution where its
    input channels are others than the file's. Patches are taken as they are: z-scores, as nnU-Net's networks expect.
    They are padded with zeros, at their end, to what the network's strides divide, and the logits cropped.

    Args:
        network: with nnU-Net's ``encoder`` and ``decoder``. Taken over.
        rank: of the adapters; 0: no adapters, all weights train.
        alpha: the adapters' change is scaled by alpha / rank; None: not scaled.
        from_file: names of the parameters of ``network`` that are a file's as they are.
    """

    def __init__(self, network: nn.Module, *, rank: int = 4, alpha: float | None = None,
                 from_file: tuple[str, ...] = ()) -> None:
        super().__init__()
        _require_unet(network)
        self.network = network
        parameters = dict(network.named_parameters(remove_duplicate=False))
        loaded = {id(parameters[name]): parameters[name] for name in from_file if name in parameters}
        unet: Any = network
        heads = unet.decoder.seg_layers
        self.stride = product_of_strides(unet.encoder.strides)
        unet.decoder.deep_supervision = False
        if rank > 0:
            fresh = [layer for layer in network.modules() if isinstance(layer, nn.modules.conv._ConvNd)
                     and loaded and id(layer.weight) not in loaded]
            network.requires_grad_(False)
            adapt_convolutions(network, rank, alpha, but=[*heads, *fresh])
            for layer in (heads[-1], *fresh):
                layer.requires_grad_(True)
        heads[:-1].requires_grad_(False)  # of outputs that only deep supervision has
        self._note_frozen(loaded.values())

    @classmethod
    def from_weights(cls, weights: str, num_channels: int, num_classes: int, spatial_dims: int, *, rank: int = 4,
                     alpha: float | None = None) -> NnUNetFoundation:
        """The network of a checkpoint of nnU-Net, such as ``<model folder>/fold_0/checkpoint_final.pth``.

        Its architecture is that of its own plans. Segmentation heads start anew where the file has none, or for another
        number of classes. A first convolution for other channels than the file's gets the mean of the file's weights
        over its channels, scaled so that its output is the same where all channels show the same.

        Args:
            weights: path of the file.
            num_channels: C, of patches.
            num_classes: K, of logits.
            spatial_dims: 2 or 3, of patches.

        Raises:
            UserError: The file cannot be read, is of the other dimension, or has parameters that do not fit.
        """
        if weights == RANDOM:
            raise UserError(f'A nnU-Net as foundation model needs weights; "{RANDOM}" says no architecture. Give the '
                            "path of a checkpoint_final.pth.")
        path = local_weights(weights)
        assert path is not None
        checkpoint = _checkpoint(path)
        network = _network(path, checkpoint, num_channels, num_classes)
        dims = next(parameter for parameter in network.parameters() if parameter.ndim > 1).ndim - 2
        if dims != spatial_dims:
            raise UserError(f"The foundation model in {path} is {dims}D, what is trained {spatial_dims}D.")
        own = network.state_dict()
        found = {name.removeprefix("module.").removeprefix("_orig_mod."): value
                 for name, value in checkpoint["network_weights"].items()}
        state, changed, notes = _fitted(own, found, num_channels, num_classes)
        require_same_parameters(own, state, path, "They must be of a stock network of nnU-Net.")
        network.load_state_dict(state)
        foundation = cls(network, rank=rank, alpha=alpha, from_file=tuple(name for name in own if name not in changed))
        foundation.notes = notes
        return foundation

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``image`` (B, C, *spatial) -> logits (B, K, *spatial)."""
        return cropped(full_resolution(self.network(padded_to_strides(image, self.stride))), image.shape[2:])


def _require_unet(network: nn.Module) -> None:
    if not hasattr(getattr(network, "encoder", None), "strides") or \
            not hasattr(getattr(network, "decoder", None), "seg_layers"):
        raise UserError(f"{type(network).__name__} is no U-Net of nnU-Net: a foundation model needs its encoder, and "
                        "its decoder with segmentation heads.")


def require_file(path: Path) -> None:
    """Raise UserError where ``path`` is a folder."""
    if path.is_dir():
        raise UserError(f"{path} is a folder. Give a checkpoint of nnU-Net in it, such as fold_0/checkpoint_final.pth.")


def _checkpoint(path: Path) -> dict[str, Any]:
    require_file(path)
    try:
        # As nnU-Net reads its checkpoints: they hold numbers of numpy besides tensors.
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise UserError(f"{path} cannot be read as a checkpoint of nnU-Net: {one_line(error)}") from error
    if not isinstance(checkpoint, dict) or not {"network_weights", "init_args"} <= checkpoint.keys() \
            or "configuration" not in checkpoint["init_args"]:
        raise UserError(f"{path} is no checkpoint of nnU-Net: it lacks network_weights, init_args or the name of a "
                        "configuration in them.")
    return checkpoint


def _network(path: Path, checkpoint: Mapping[str, Any], num_channels: int, num_classes: int) -> nn.Module:
    """The untrained network of a checkpoint's plans, which it holds itself or has two folders up."""
    arguments = checkpoint["init_args"]
    plans = arguments.get("plans")
    if plans is None:
        file = path.parent.parent / "plans.json"
        if not file.is_file():
            raise UserError(f"{path} holds no plans, and there is no {file}: its architecture is not known.")
        plans = json.loads(file.read_text(encoding="utf-8"))
    manager = PlansManager(plans)
    configuration = manager.get_configuration(arguments["configuration"])
    return nnUNetTrainer.build_network_architecture(manager, configuration, num_channels, num_classes, False)


def _fitted(own: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], num_channels: int,
            num_classes: int) -> tuple[dict[str, torch.Tensor], set[str], list[str]]:
    """``found`` with heads and first convolutions of the shapes in ``own``: it, names of what changed, and notes."""
    fitted, heads, inputs = dict(found), set(), set()
    channels = num_channels
    for name, value in found.items():
        if name not in own or own[name].shape == value.shape:
            continue
        need, have = own[name].shape, value.shape
        if name.startswith(_HEADS):
            heads.add(name)
            fitted[name] = own[name]
        elif len(need) > 1 and (need[0], *need[2:]) == (have[0], *have[2:]) and need[1] == num_channels:
            inputs.add(name)
            channels = have[1]
            mean = value.mean(1, keepdim=True) * (have[1] / num_channels)
            fitted[name] = mean.expand(need).clone()
    missing = {name: value for name, value in own.items() if name.startswith(_HEADS) and name not in found}
    heads |= missing.keys()
    fitted |= missing
    notes = [f"The segmentation heads of the foundation model start anew, for {num_classes} classes." if heads else
             f"The segmentation heads of the foundation model are the file's, which has {num_classes} classes too."]
    if inputs:
        notes.append(f"The first convolution of the foundation model, of {channels} channels, is averaged for "
                     f"{num_channels}.")
    return fitted, heads | inputs, notes
