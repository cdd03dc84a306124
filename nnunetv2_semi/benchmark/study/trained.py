"""What a trained model tells about its training: curves and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nnunetv2_semi.benchmark.study.execution import FINAL
from nnunetv2_semi.data.atomic_files import read_json_object


@dataclass(frozen=True)
class Curves:
    """A value per epoch. dice: nnU-Net's moving average of the Dice of validation patches."""

    train_loss: Sequence[float]
    validation_loss: Sequence[float]
    dice: Sequence[float]


def curves_of(model: Path) -> Curves | None:
    """Curves from nnU-Net's final checkpoint in the fold folder; None where it is absent, unreadable or another's.

    The checkpoint is unpickled, which runs code in it: use models that you trust, as for nnU-Net's own prediction.
    """
    try:
        # nnU-Net stores numpy scalars, which are not loaded with weights_only. Mapped, the weights stay on disk.
        content = torch.load(model / FINAL, map_location="cpu", weights_only=False, mmap=True)
        logged = content["logging"]
        curves = Curves(*([float(value) for value in logged[key]]
                          for key in ("train_losses", "val_losses", "ema_fg_dice")))  # fmt: skip
    except MemoryError:
        raise
    except Exception:  # unpickling raises whatever the file makes it
        return None
    return curves if curves.dice else None


def settings_of(model: Path) -> dict[str, str]:
    """Trainer, plans, and each setting of the configuration that a model was trained with, by dotted name.

    Empty where the folder is not nnU-Net's.
    """
    # The plans are named after the study, whose name may hold "__" too.
    trainer, _, rest = model.parent.name.partition("__")
    plans_name, _, configuration = rest.rpartition("__")
    plans = read_json_object(str(model.parent / "plans.json")) or {}
    content = plans.get("configurations", {}).get(configuration)
    if not isinstance(content, dict):
        return {}
    return {"trainer": trainer, "plans": plans_name, "configuration": configuration} | _flat(content)


def _flat(content: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(value)
    return flat
