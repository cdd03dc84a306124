"""How strongly the unlabelled terms of a trained model's method act: the size of their gradient beside nnU-Net's loss.

    python benchmarks/gradient_share.py MODEL/fold_all --set '{"MeanTeacher": {"perturbation": "noise"}}'

A term whose gradient is a hundredth of the supervised one changes nothing, whatever it is worth. Needs the model's
data set, preprocessed, and nnU-Net's three folders. Nothing is trained or changed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

os.environ["nnUNet_n_proc_DA"] = "0"
_LOGS = tempfile.TemporaryDirectory()
os.environ["nnUNet_results"] = _LOGS.name  # read at import: the trainer's log goes there

import torch  # noqa: E402
from measuring import table  # noqa: E402
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name  # noqa: E402

from nnunetv2_semi.methods.settings import merged_settings  # noqa: E402
from nnunetv2_semi.training import batches  # noqa: E402


def main(arguments: list[str] | None = None) -> None:
    """Print a row for each unlabelled term."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fold", type=Path, help="folder of a trained fold, with checkpoint_final.pth")
    parser.add_argument("--set", type=json.loads, default={}, metavar="JSON", help='on top of the model\'s "semi"')
    parser.add_argument("--progress", type=float, default=0.5, help="share of training that is done (default: 0.5)")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the batches (default: 0)")
    args = parser.parse_args(arguments)

    checkpoint = torch.load(args.fold / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    plans, configuration, fold, dataset_json = (checkpoint["init_args"][name] for name in (
        "plans", "configuration", "fold", "dataset_json"))
    content = plans["configurations"][configuration]
    content["semi"] = merged_settings(content["semi"], {"seed": args.seed, **args.set})
    trainer = recursive_find_trainer_class_by_name(checkpoint["trainer_name"])(
        {**plans, "continue_training": False}, configuration, fold, dataset_json, torch.device("cpu"))
    trainer.initialize()
    trainer.method.load_state_dict(checkpoint["nnunetv2_semi"]["method_state"])
    stream, validation = trainer.get_dataloaders()
    validation.close()
    trainer.method.train()
    trainer.method.progress = args.progress

    shares: dict[str, list[float]] = defaultdict(list)
    for _ in range(args.batches):
        sizes = gradient_sizes(trainer.method, batches.on_device(next(stream), trainer.modalities, trainer.device))
        supervised = sizes.pop("supervised terms")
        for name, size in sizes.items():
            shares[name].append(size / supervised)
    stream.close()
    print(f"\nSize of the gradient, that of the supervised terms is 1; {args.batches} batches.\n")
    print(table(("term", "median", "lowest", "highest"), [
        (name, *(f"{value:.4f}" for value in (statistics.median(values), min(values), max(values))))
        for name, values in shares.items()]))


def gradient_sizes(method: torch.nn.Module, batch: object) -> dict[str, float]:
    """Euclidean norm of the gradient of each unlabelled term, and of all supervised ones together, weighted."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    summed: dict[str, list[torch.Tensor]] = {}
    for group in method.loss(batch):  # type: ignore[operator]
        group = [term for term in group if term.applies]
        for number, term in enumerate(group):
            name = "supervised terms" if term.supervised else term.name
            gradients = torch.autograd.grad(term.weight * term.value, parameters, retain_graph=number < len(group) - 1,
                                            allow_unused=True)
            before = summed.get(name, [torch.zeros_like(p) for p in parameters])
            summed[name] = [a if b is None else a + b for a, b in zip(before, gradients, strict=True)]
    return {name: float(torch.stack([g.square().sum() for g in total]).sum().sqrt()) for name, total in summed.items()}


if __name__ == "__main__":
    main()
