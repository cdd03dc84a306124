"""What decides whether two trainings can be compared, asked from the trainers themselves, any of nnU-Net's too.

Run as a program (nnU-Net trainers make their output folder when they are made, so nnUNet_results is a temporary one):
reads a JSON list of questions (trainer, plans file, configuration, fold) and writes a list of facts to a file.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_semi.benchmark.study.jobs import digest
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.trainer_classes import trainer_class

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

Facts = Mapping[str, object]


@dataclass(frozen=True)
class Question:
    """A training: trainer class, plans file, configuration, fold."""

    trainer: str
    plans: str
    configuration: str
    fold: int | str


def trainer_facts(questions: Sequence[Question], environment: Mapping[str, str]) -> list[Facts]:
    """Facts about each training, in order; names are those of a study's ``meant_differences``, and ``num_epochs``,
    ``uses_unlabelled``.

    Raises:
        UserError: A trainer is not found or refuses its plans; with its message.
    """
    with tempfile.TemporaryDirectory(prefix="nnunetv2_semi_facts_") as folder:
        answer = Path(folder) / "facts.json"
        result = subprocess.run(
            [sys.executable, "-m", "nnunetv2_semi.benchmark.study.trainer_facts", str(answer)], text=True,
            input=json.dumps([vars(question) for question in questions]), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={**environment, "nnUNet_results": folder, "nnUNet_wandb_enabled": "0"})
        content = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else None
    if result.returncode != 0 or content is None:
        raise UserError(f"The trainers of the study could not be made:\n{result.stdout[-3000:]}")
    if isinstance(content, dict):
        raise UserError(str(content["error"]))
    return list(content)


def differences(facts: Mapping[str, Facts], meant: Sequence[str]) -> list[str]:
    """What differs between trainings (name -> facts) that ought to be alike, a line each; ``None`` is not compared."""
    lines = []
    names = {name for single in facts.values() for name in single} - {"num_epochs", "uses_unlabelled", *meant}
    for name in sorted(names):
        values = {method: single[name] for method, single in facts.items() if single.get(name) is not None}
        if len({json.dumps(value) for value in values.values()}) > 1:
            shown = ", ".join(f"{method}: {value}" for method, value in values.items())
            lines.append(f"{name} differs ({shown})")
    return lines


def _facts(question: Question) -> Facts:
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    cls = trainer_class(question.trainer)
    folder = Path(question.plans).parent
    plans = json.loads(Path(question.plans).read_text(encoding="utf-8"))
    plans["continue_training"] = False
    dataset_json = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    trainer: nnUNetTrainer = cls(plans, question.configuration, question.fold, dataset_json, torch.device("cpu"))
    configuration = trainer.configuration_manager
    settings = getattr(trainer, "settings", None)
    uses_unlabelled = bool(getattr(getattr(cls, "method_class", None), "uses_unlabelled", False))
    unlabelled = (settings.unlabelled_batch_size or configuration.batch_size) if uses_unlabelled and settings else None
    rotation, dummy_2d, initial_patch_size, mirror_axes = \
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    augmentation = [inspect.getsource(cls.get_training_transforms), dummy_2d, list(map(int, initial_patch_size))]
    optimizer = "SGD" if settings or cls.configure_optimizers is nnUNetTrainer.configure_optimizers else \
        cls.configure_optimizers.__qualname__
    return {
        "num_epochs": trainer.num_epochs,
        "uses_unlabelled": uses_unlabelled,
        "iterations": trainer.num_epochs * trainer.num_iterations_per_epoch,
        "batch_size": configuration.batch_size,
        "unlabelled_batch_size": unlabelled,
        "patch_size": list(configuration.patch_size),
        "spacing": list(configuration.spacing),
        "network": _network(trainer),
        "augmentation": digest(augmentation)[:8],
        "rotation": [round(math.degrees(angle), 3) for angle in rotation or []],
        "mirroring": list(mirror_axes or []),
        "oversample_foreground_percent": trainer.oversample_foreground_percent,
        "probabilistic_oversampling": trainer.probabilistic_oversampling,
        "optimizer": optimizer,
        "initial_lr": trainer.initial_lr,
        "momentum": settings.momentum if settings else (0.99 if optimizer == "SGD" else None),
        "weight_decay": trainer.weight_decay,
        "deep_supervision": trainer.enable_deep_supervision,
    }


def _network(trainer: nnUNetTrainer) -> str:
    """Digest of the deployed network's layers and weights' shapes."""
    import torch
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    plans, configuration = trainer.plans_manager, trainer.configuration_manager
    channels = determine_num_input_channels(plans, configuration, trainer.dataset_json)
    with torch.device("meta"):
        network = trainer.build_network_architecture(plans, configuration, channels,
                                                     trainer.label_manager.num_segmentation_heads, False)
    return digest([[type(module).__name__ for module in network.modules()],
                   [list(weights.shape) for weights in network.parameters()]])[:8]


def main(answer: str) -> None:
    content: object
    try:
        content = [_facts(Question(**question)) for question in json.load(sys.stdin)]
    except UserError as error:
        content = {"error": str(error)}
    Path(answer).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("nnUNet_compile", "f")
    main(sys.argv[1])
