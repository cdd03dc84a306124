"""Trained models that teach another one: one network or several, frozen, read from nnU-Net's model folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_semi.errors import UserError, one_line
from nnunetv2_semi.losses.predictions import full_resolution
from nnunetv2_semi.networks.foundation_weights import weights_digest
from nnunetv2_semi.networks.modality_branches import mean_probability_logits
from nnunetv2_semi.networks.stride_padding import cropped, padded_to_strides, product_of_strides
from nnunetv2_semi.trainer_classes import trainer_class


class TrainedEnsemble(nn.Module):
    """The mean probability of trained networks, without gradients, in evaluation mode, without mirroring.

    The networks go where this module goes, but are no part of it: they are in no state dict, no optimiser, and nothing
    that is switched in the networks of a training (dropout, deep supervision) is switched in them.

    Args:
        networks: deployed ones, (B, C, *spatial) -> logits (B, K, *spatial). Taken over and frozen.
        regions: region-based labels.
        strides: product of each network's strides, per axis; patches are padded with zeros, at their end, to what these
            divide, and the logits cropped. None: patches are taken as they are.
    """

    def __init__(self, networks: Sequence[nn.Module], regions: bool, strides: Sequence[int] | None = None) -> None:
        super().__init__()
        self.networks = tuple(network.requires_grad_(False).eval() for network in networks)
        self.regions, self.strides = regions, strides

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TrainedEnsemble:
        for network in self.networks:
            network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``image`` (B, C, *spatial) -> logits (B, K, *spatial) whose softmax (or sigmoid) is the mean probability."""
        padded = image if self.strides is None else padded_to_strides(image, self.strides)
        each = [full_resolution(network(padded)) for network in self.networks]
        logits = each[0] if len(each) == 1 else mean_probability_logits(each, self.regions)
        return cropped(logits, image.shape[2:])


@dataclass(frozen=True)
class TrainedModel:
    """A model folder of nnU-Net, ``<results>/<dataset>/<trainer>__<plans>__<configuration>``; any trainer's.

    folds: such as ("0", "1") or ("all",). checkpoint_name: of the file in each fold's folder.
    """

    folder: Path
    folds: tuple[str, ...]
    checkpoint_name: str = "checkpoint_final.pth"

    @classmethod
    def checked(cls, folder: str | Path, folds: Sequence[str], checkpoint_name: str) -> TrainedModel:
        """Raises UserError where the folder has no model or lacks a fold, or the model is a cascade's second stage."""
        path = Path(folder).expanduser()
        for name in ("plans.json", "dataset.json"):
            if not (path / name).is_file():
                raise UserError(f"The teacher in {path} is no trained model: it has no {name}. Give the folder that "
                                "holds fold_0 (or fold_all), or the options that it was trained with.")
        model = cls(path, tuple(dict.fromkeys(map(str, folds))), checkpoint_name)
        missing = [fold for fold in model.folds if not model.file(fold).is_file()]
        if missing or not folds:
            there = sorted(file.parent.name.removeprefix("fold_") for file in path.glob(f"fold_*/{checkpoint_name}"))
            raise UserError(f"The teacher in {path} has no {checkpoint_name} for fold {', '.join(missing) or '(none)'}."
                            f" Folds that have it: {', '.join(there) or 'none'}.")
        if model.configuration.previous_stage_name is not None:
            raise UserError(f"The teacher in {path} is the second stage of a cascade: it needs predictions of the first"
                            " stage, and patches have none. Take the first stage, or another model.")
        return model

    def file(self, fold: str) -> Path:
        """The checkpoint of a fold."""
        return self.folder / f"fold_{fold}" / self.checkpoint_name

    def digests(self) -> dict[str, str]:
        """Fold -> SHA-256 of its checkpoint, in hexadecimal."""
        return {fold: weights_digest(self.file(fold)) for fold in self.folds}

    @cached_property
    def plans(self) -> PlansManager:
        return PlansManager(_json(self.folder / "plans.json"))

    @cached_property
    def dataset_json(self) -> dict:
        return _json(self.folder / "dataset.json")

    @cached_property
    def configuration(self) -> ConfigurationManager:
        return self.plans.get_configuration(self._checkpoint(self.folds[0])["init_args"]["configuration"])

    @property
    def num_channels(self) -> int:
        """Of the images."""
        return determine_num_input_channels(self.plans, self.configuration, self.dataset_json)

    @cached_property
    def strides(self) -> tuple[int, ...] | None:
        """Product of the network's strides per axis; None where the plans do not tell them."""
        try:
            steps = self.configuration.pool_op_kernel_sizes
        except KeyError:
            return None
        return product_of_strides(steps)

    def ensemble(self) -> TrainedEnsemble:
        """The deployed networks of all folds, as nnU-Net's predictor builds them.

        Raises:
            UserError: A checkpoint cannot be read, or does not fit the model's plans.
        """
        networks = [self._network(fold) for fold in self.folds]
        regions = self.plans.get_label_manager(self.dataset_json).has_regions
        return TrainedEnsemble(networks, regions, self.strides)

    def _network(self, fold: str) -> nn.Module:
        checkpoint = self._checkpoint(fold)
        try:
            trainer = trainer_class(checkpoint["trainer_name"])
        except UserError as error:
            raise UserError(f"The teacher in {self.folder} cannot be built: {error}") from None
        network = trainer.build_network_architecture(
            self.plans, self.configuration, self.num_channels,
            self.plans.get_label_manager(self.dataset_json).num_segmentation_heads, enable_deep_supervision=False)
        try:
            network.load_state_dict(checkpoint["network_weights"])
        except RuntimeError as error:
            raise UserError(f"The weights in {self.file(fold)} do not fit the plans beside them: "
                            f"{one_line(error)}") from error
        return network

    def _checkpoint(self, fold: str) -> dict[str, Any]:
        file = self.file(fold)
        try:
            # As nnU-Net reads its checkpoints: they hold numbers of numpy besides tensors.
            checkpoint = torch.load(file, map_location="cpu", weights_only=False, mmap=True)
        except Exception as error:
            raise UserError(f"{file} cannot be read as a checkpoint of nnU-Net: {one_line(error)}") from error
        if not isinstance(checkpoint, dict) or not {"network_weights", "init_args", "trainer_name"} <= set(checkpoint):
            raise UserError(f"{file} is no checkpoint of nnU-Net: it has no network_weights, init_args, trainer_name.")
        return checkpoint


def _json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {one_line(error)}") from error
