"""A trained model folder -> ONNX files and their descriptions, each file checked against PyTorch before it is there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import nn

from nnunetv2_semi.data.atomic_files import whole_folder, write_json_whole
from nnunetv2_semi.data.dataset_settings import folder_name, named_channels, num_channels
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods.base import Method
from nnunetv2_semi.networks.deployment import Deployed
from nnunetv2_semi.networks.one_modality import OneModality
from nnunetv2_semi.onnx_export.description import FILE, description
from nnunetv2_semi.onnx_export.graph import largest_difference, require_onnx, write_graph
from nnunetv2_semi.onnx_export.patches import batches, patches_to_check_on

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exported:
    """What was written of one network.

    folder: of its files. channels: names of its inputs. differences: fold -> (largest difference of logits between ONNX
    Runtime and PyTorch, largest logit). checked_on: a phrase that says on what.
    """

    folder: str
    channels: list[str]
    differences: dict[str, tuple[float, float]]
    checked_on: str


def export_onnx(model_folder: str, output_folder: str, *, folds: Sequence[str], checkpoint_name: str,
                modality: str | None = None, tolerance: float = TOLERANCE) -> tuple[dict[str, Exported], list[str]]:
    """Write the network that a model deploys, and each modality's where it has several, as ONNX.

    Args:
        model_folder: of a trainer of this package or of nnU-Net.
        output_folder: the deployed network goes straight into it, each modality's into a folder of its name. It
            appears when all are written and checked.
        folds: each becomes a file.
        checkpoint_name: of a fold.
        modality: its network alone, straight into ``output_folder``; None: all.
        tolerance: largest difference allowed between the logits of ONNX Runtime and of PyTorch, as a share of the
            largest logit, or of 1 where all are smaller.

    Returns:
        Name of the network ("" for the deployed one) -> what was written; and remarks for the user.

    Raises:
        UserError: a package is missing, the network cannot be exported, or its logits differ by more.
    """
    require_onnx()
    model = _Model.read(model_folder, folds, checkpoint_name)
    wanted, remarks = _wanted(model, modality)
    patches, source = patches_to_check_on(model.plans, model.configuration, model.dataset_json)
    written = {}
    with whole_folder(output_folder) as unfinished:
        for name in wanted:
            part = folder_name(name) if name and modality is None else ""
            exported = _export_one(model, name, os.path.join(unfinished, part), patches, source, tolerance)
            written[name] = replace(exported, folder=os.path.join(output_folder, part) if part else output_folder)
    return written, remarks


class _Model:
    """A trained model as nnU-Net's predictor has it: the network, and a state dict of each fold."""

    def __init__(self, predictor: nnUNetPredictor, folds: Sequence[str], made_from: Mapping[str, object]) -> None:
        self.network: nn.Module = getattr(predictor.network, "_orig_mod", predictor.network).eval()
        self.weights = dict(zip(folds, predictor.list_of_parameters, strict=True))
        self.plans, self.configuration = predictor.plans_manager, predictor.configuration_manager
        self.dataset_json, self.mirroring_axes = predictor.dataset_json, predictor.allowed_mirroring_axes
        self.made_from = {**made_from, "trainer": predictor.trainer_name}

    @classmethod
    def read(cls, folder: str, folds: Sequence[str], checkpoint_name: str) -> _Model:
        predictor = nnUNetPredictor(perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False)
        with redirect_stdout(StringIO()):
            predictor.initialize_from_trained_model_folder(folder, tuple(folds), checkpoint_name)
        if predictor.configuration_manager.previous_stage_name is not None:
            raise UserError(f"{folder} is the second stage of a cascade, which needs the predictions of the first one "
                            "as input: only single networks are exported as ONNX.")
        plans = predictor.plans_manager
        return cls(predictor, folds, {"dataset": plans.dataset_name, "plans": plans.plans_name,
                                      "checkpoint": checkpoint_name})

    @property
    def parts(self) -> dict[str, list[int]]:
        """The plain nnU-Net networks within the network, by name, and the channels of each."""
        if not isinstance(self.network, Deployed):
            return {}
        return {name: channels for name, (channels, _) in self.network.stock_networks().items()}

    @property
    def modalities(self) -> list[list[int]]:
        """Channels of each modality; none where the plans name none."""
        return list(self.configuration.configuration.get("semi", {}).get("modalities", {}).values())

    @property
    def seen(self) -> list[int] | None:
        """Channels that the deployed network looks at; None for all."""
        return self.network.channels if isinstance(self.network, OneModality) else None

    @property
    def heads(self) -> int:
        return self.plans.get_label_manager(self.dataset_json).num_segmentation_heads

    def of_fold(self, fold: str, name: str) -> nn.Module:
        """The network ("") or a part of it, with the weights of a fold, in evaluation mode."""
        self.network.load_state_dict(self.weights[fold])
        if not name:
            return self.network
        assert isinstance(self.network, Deployed)
        channels, weights = self.network.stock_networks()[name]
        part = Method.build_student(self.plans, self.configuration, len(channels), self.heads, False)
        part.load_state_dict(weights)
        return part.eval()


def _wanted(model: _Model, modality: str | None) -> tuple[list[str], list[str]]:
    """Names of the networks to export, and remarks on those that are left out."""
    parts = list(model.parts)
    if modality is not None:
        if modality not in parts:
            raise UserError(f"No network for modality {modality!r}. Modalities of this model: "
                            f"{', '.join(parts) or 'none: one network takes all channels'}.")
        return [modality], []
    reason = model.network.why_not_exportable() if isinstance(model.network, Deployed) else None
    if reason is None:
        return ["", *parts], []
    if not parts:
        raise UserError(f"The deployed network cannot be exported as ONNX: {reason}.")
    return parts, [f"The deployed network itself is not exported: {reason}. What is exported are networks within it "
                   f"({', '.join(parts)}), whose predictions are others."]


def _export_one(model: _Model, name: str, folder: str, patches: Sequence[np.ndarray], source: str,
                tolerance: float) -> Exported:
    channels = model.parts[name] if name else list(range(num_channels(model.dataset_json)))
    compared = batches(patches, channels) if name else batches(patches, channels, model.modalities, model.seen)
    if not compared:
        compared, source = _noise(patches, channels), "noise, as the patches found hold nothing"
    files, differences = {}, {}
    os.makedirs(folder, exist_ok=True)
    for fold in model.weights:
        network, files[fold] = model.of_fold(fold, name), f"fold_{fold}.onnx"
        file = os.path.join(folder, files[fold])
        try:
            write_graph(network, compared[0].shape[1:], file)
        except UserError as error:
            others = f" Of the networks within it ask for one: --modality {next(iter(model.parts))}." \
                if model.parts and not name else ""
            raise UserError(f"{error}{others}") from error
        difference, largest = differences[fold] = largest_difference(network, file, compared)
        if not difference <= tolerance * max(1.0, largest):
            raise UserError(
                f"{name or 'The network'}, fold {fold}: logits of ONNX Runtime differ from PyTorch's by up to "
                f"{difference:.2g} (logits are up to {largest:.3g}; allowed are {tolerance:g} of that) on {source}. "
                "No file is kept. --tolerance allows more.")
    content = description(model.plans, model.configuration, model.dataset_json, channels, model.mirroring_axes, files,
                          {**model.made_from, "network": name or "deployed"})
    write_json_whole(os.path.join(folder, FILE), content)
    names = named_channels(model.dataset_json)
    return Exported(folder, [names[str(channel)] for channel in channels], differences, source)


def _noise(patches: Sequence[np.ndarray], channels: Sequence[int]) -> list[np.ndarray]:
    shape = (1, len(channels), *patches[0].shape[1:])
    return [np.random.default_rng(0).standard_normal(shape).astype(np.float32)]
