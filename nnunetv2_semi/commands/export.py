"""``nnunetv2_semi export``: a model folder that stock nnU-Net runs without this package, or ONNX files."""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nnunetv2_semi.data.atomic_files import whole_folder, write_json_whole
from nnunetv2_semi.data.dataset_settings import folder_name
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.trainer_classes import trainer_class

if TYPE_CHECKING:
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunetv2_semi.networks.deployment import StockNetwork

_PER_CHANNEL = ("normalization_schemes", "use_mask_for_norm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, named as nnU-Net's commands name them."""
    parser.add_argument("-d", metavar="DATASET", help="dataset name or id of the trained model")
    parser.add_argument("-tr", metavar="TRAINER", help="its trainer, such as nnUNetTrainerSemiCML")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="its plans (default: %(default)s)")
    parser.add_argument("-c", metavar="CONFIGURATION", default="3d_fullres",
                        help="its configuration (default: %(default)s)")
    parser.add_argument("-m", metavar="FOLDER", help="the model folder itself, instead of -d, -tr, -p and -c")
    parser.add_argument("-f", metavar="FOLD", nargs="+",
                        help="folds to export (default: all that are trained, the fold all where no other is)")
    parser.add_argument("-chk", metavar="FILE", default="checkpoint_final.pth",
                        help="checkpoint to export (default: %(default)s)")
    parser.add_argument("--modality", metavar="NAME", help="export the network of this modality alone (default: every "
                        "network that nnU-Net can run, one folder each)")
    parser.add_argument("-o", metavar="FOLDER", required=True, help="folder to write")
    parser.add_argument("--onnx", action="store_true", help="write ONNX files, one per fold, and a JSON with all that "
                        "inference needs; of models of nnU-Net's own trainers too")
    parser.add_argument("--tolerance", metavar="SHARE", type=float, default=1e-4, help="with --onnx: largest "
                        "difference allowed between the logits of ONNX Runtime and of PyTorch, as a share of the "
                        "largest logit, or of 1 where all are smaller (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Export and say how to predict with what was written."""
    folder = args.m or _model_folder(args.d, args.tr, args.p, args.c)
    if args.onnx:
        return _run_onnx(folder, args)
    for name, written in export_model(folder, args.o, modality=args.modality, folds=args.f,
                                      checkpoint_name=args.chk).items():
        channels = _read_json(os.path.join(written, "dataset.json"))["channel_names"]
        inputs = ", ".join(f"_{int(index):04d} = {channel}" for index, channel in channels.items())
        print(f"{name or 'Model'}: {written}\n  input: {inputs}\n"
              f"  nnUNetv2_predict_from_modelfolder -i IMAGES -o PREDICTIONS -m {written} "
              f"-f {' '.join(_folds(written, args.f, args.chk))} -chk {args.chk}")
    return 0


def _run_onnx(folder: str, args: argparse.Namespace) -> int:
    from nnunetv2_semi.onnx_export.export import export_onnx

    folds = _folds(folder, args.f, args.chk)
    _check_nothing_in(args.o)
    written, remarks = export_onnx(folder, args.o, folds=folds, checkpoint_name=args.chk, modality=args.modality,
                                   tolerance=args.tolerance)
    for name, network in written.items():
        print(f"{name or 'Deployed network'}: {network.folder}\n  input: {', '.join(network.channels)}\n"
              f"  checked with ONNX Runtime on {network.checked_on}")
        for fold, (difference, largest) in network.differences.items():
            print(f"  fold_{fold}.onnx: logits differ from PyTorch's by at most {difference:.1e} (logits are up to "
                  f"{largest:.3g}, allowed: {args.tolerance * max(1.0, largest):.1e})")
    for remark in remarks:
        print(remark)
    return 0


def export_model(model_folder: str, output_folder: str, *, modality: str | None = None,
                 folds: Sequence[str] | None = None, checkpoint_name: str = "checkpoint_final.pth") -> dict[str, str]:
    """Write the networks of a trained model that are nnU-Net's own as stock model folders.

    model_folder: ``<results>/<dataset>/<trainer>__<plans>__<configuration>``. modality: only this one, straight into
    ``output_folder``; None: all, into one sub-folder each where there are several. folds: such as ["0", "all"]; None:
    all that have ``checkpoint_name``. Returns name -> folder written; ``output_folder`` appears when all are. Raises
    UserError for what does not exist, and for an ``output_folder`` that is not empty.
    """
    import torch

    from nnunetv2_semi.data.dataset_json import read_dataset_json

    folds = _folds(model_folder, folds, checkpoint_name)
    plans = _read_json(os.path.join(model_folder, "plans.json"))
    dataset_json = read_dataset_json(os.path.join(model_folder, "dataset.json"))
    _check_nothing_in(output_folder)
    written: dict[str, str] = {}
    with whole_folder(output_folder) as unfinished:
        for fold in folds:
            path = os.path.join(model_folder, f"fold_{fold}", checkpoint_name)
            checkpoint = torch.load(path, map_location="cpu", weights_only=False)
            configuration = checkpoint["init_args"]["configuration"]
            trainer = checkpoint["trainer_name"]
            models = _stock_networks(_our_trainer(trainer), plans, configuration, dataset_json,
                                     checkpoint["network_weights"])
            for name, (channels, weights) in _chosen(models, modality, trainer).items():
                part = folder_name(name) if len(models) > 1 and modality is None else ""
                folder = os.path.join(unfinished, part)
                stock = {"plans": _stock_plans(plans, channels), "dataset_json": _stock_dataset(dataset_json, channels)}
                if name not in written:
                    write_json_whole(os.path.join(folder, "plans.json"), stock["plans"])
                    write_json_whole(os.path.join(folder, "dataset.json"), stock["dataset_json"])
                    _copy_fingerprint(model_folder, folder, channels)
                    written[name] = os.path.join(output_folder, part) if part else output_folder
                _save_checkpoint(checkpoint, weights, stock, fold,
                                 os.path.join(folder, f"fold_{fold}", checkpoint_name))
    return written


def _model_folder(dataset: str | None, trainer: str | None, plans: str, configuration: str) -> str:
    if dataset is None or trainer is None:
        raise UserError("Name the trained model: -d DATASET -tr TRAINER [-p PLANS] [-c CONFIGURATION], or -m FOLDER.")
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    try:
        return get_output_folder(dataset, trainer, plans, configuration)
    except (RuntimeError, ValueError) as error:  # no such data set
        raise UserError(" ".join(str(error).split())) from error


def _folds(model_folder: str, folds: Sequence[str] | None, checkpoint_name: str) -> list[str]:
    if not os.path.isfile(os.path.join(model_folder, "plans.json")):
        raise UserError(f"{model_folder} is no trained model: it has no plans.json. Give the folder that holds fold_0.")
    trained = sorted(name.removeprefix("fold_") for name in os.listdir(model_folder) if name.startswith("fold_")
                     and os.path.isfile(os.path.join(model_folder, name, checkpoint_name)))
    missing = sorted(set(folds or []) - set(trained))
    if missing or not trained:
        raise UserError(f"{model_folder} has no {checkpoint_name} for fold {', '.join(missing) or '(any)'}. "
                        f"Folds that have it: {', '.join(trained) or 'none'}. An unfinished training can be exported "
                        "with -chk checkpoint_best.pth.")
    return list(folds) if folds else [fold for fold in trained if fold != "all"] or trained  # as nnU-Net chooses


def _our_trainer(name: str) -> type[nnUNetTrainer]:
    from nnunetv2_semi.trainer import nnUNetTrainerSemi
    from nnunetv2_semi.training.stock_trainer import nnUNetTrainerSemiStock

    trainer = trainer_class(name)
    if not issubclass(trainer, (nnUNetTrainerSemi, nnUNetTrainerSemiStock)):
        raise UserError(f"The model was trained with {name}, which is not a trainer of this package: it needs no "
                        "export.")
    return trainer


def _stock_networks(trainer: type[nnUNetTrainer], plans: dict, configuration: str, dataset_json: dict,
                    weights: dict) -> dict[str, StockNetwork]:
    """The parts of the deployed network that stock nnU-Net can run, by name."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunetv2_semi.networks.deployment import Deployed

    manager = PlansManager(copy.deepcopy(plans))
    chosen = manager.get_configuration(configuration)
    what = (manager, chosen, determine_num_input_channels(manager, chosen, dataset_json),
            manager.get_label_manager(dataset_json).num_segmentation_heads, False)
    network = trainer.build_network_architecture(*what)
    network.load_state_dict(weights)
    if isinstance(network, Deployed):
        return network.stock_networks()
    with torch.device("meta"):
        stock = nnUNetTrainer.build_network_architecture(*what)
    # What a module prints are its layers with all that they were built with, activations for one.
    if repr(network) != repr(stock) or _shapes(network.state_dict()) != _shapes(stock.state_dict()):
        return {}
    return {"": (list(range(len(dataset_json["channel_names"]))), network.state_dict())}


def _shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def _chosen(models: Mapping[str, tuple], modality: str | None, trainer: str) -> dict[str, tuple]:
    if not models:
        raise UserError(f"The network that {trainer} deploys is not nnU-Net's own: stock nnU-Net cannot run it.")
    if modality is None:
        return dict(models)
    if modality not in models:
        known = ", ".join(name for name in models if name) or f"none: {trainer} trains one network for all channels"
        raise UserError(f"No network for modality {modality!r}. Modalities of this model: {known}.")
    return {modality: models[modality]}


def _stock_plans(plans: dict, channels: Sequence[int]) -> dict:
    """The plans for ``channels`` alone, naming nothing that stock nnU-Net lacks."""
    stock = copy.deepcopy(plans)
    stock["foreground_intensity_properties_per_channel"] = _renumbered(
        stock["foreground_intensity_properties_per_channel"], channels)
    if stock.get("experiment_planner_used", "").startswith("nnUNetPlannerSemi"):
        stock["experiment_planner_used"] = "ExperimentPlanner"
    for configuration in stock["configurations"].values():
        configuration.pop("semi", None)
        if configuration.get("preprocessor_name", "").startswith("nnUNetPreprocessorSemi"):
            configuration["preprocessor_name"] = "DefaultPreprocessor"
        for key in _PER_CHANNEL:
            if key in configuration:
                configuration[key] = [configuration[key][channel] for channel in channels]
    return stock


def _stock_dataset(dataset_json: dict, channels: Sequence[int]) -> dict:
    stock = {key: value for key, value in dataset_json.items() if key != "semi"}
    stock["channel_names"] = _renumbered(dataset_json["channel_names"], channels)
    return stock


def _save_checkpoint(checkpoint: dict, weights: dict, stock: dict[str, dict], fold: str, path: str) -> None:
    """The inference part of a checkpoint, as a stock nnUNetTrainer would have written it.

    Weights are cloned: a slice of a bigger storage would be saved with the whole storage.
    """
    from nnunetv2_semi.training.checkpoints import save_whole

    init_args = {**checkpoint["init_args"], **stock, "fold": fold if fold == "all" else int(fold)}
    save_whole({
        "network_weights": {key: value.clone() for key, value in weights.items()},
        "init_args": init_args,
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": checkpoint["inference_allowed_mirroring_axes"],
        "current_epoch": checkpoint["current_epoch"],
    }, path)


def _check_nothing_in(folder: str) -> None:
    if os.path.isdir(folder) and os.listdir(folder):
        raise UserError(f"{folder} is not empty. Name a new folder with -o, or remove it first.")


def _copy_fingerprint(model_folder: str, folder: str, channels: Sequence[int]) -> None:
    source = os.path.join(model_folder, "dataset_fingerprint.json")
    if not os.path.isfile(source):
        return
    fingerprint = _read_json(source)
    per_channel = fingerprint.get("foreground_intensity_properties_per_channel", {})
    if per_channel and len(channels) < len(per_channel):
        fingerprint["foreground_intensity_properties_per_channel"] = _renumbered(per_channel, channels)
        write_json_whole(os.path.join(folder, "dataset_fingerprint.json"), fingerprint)
    else:
        shutil.copyfile(source, os.path.join(folder, "dataset_fingerprint.json"))


def _read_json(path: str) -> dict:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _renumbered(by_channel: Mapping[str, object], channels: Sequence[int]) -> dict[str, object]:
    """The entries of ``channels`` in a JSON object keyed by channel number, numbered from 0."""
    return {str(new): by_channel[str(old)] for new, old in enumerate(channels)}
