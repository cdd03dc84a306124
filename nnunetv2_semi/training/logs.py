"""What a step reports: collected per epoch, printed, plotted into progress.png, and given to nnU-Net's loggers."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from math import inf, isfinite, nan

import matplotlib

matplotlib.use("agg")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from nnunetv2.training.logging.nnunet_logger import LocalLogger  # noqa: E402
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # noqa: E402
from PIL import Image  # noqa: E402

from nnunetv2_semi.data.atomic_files import whole_file  # noqa: E402
from nnunetv2_semi.methods.contract import Term  # noqa: E402

PREFIX = "semi/"
# nnU-Net's picture of 16 million pixels takes seconds, which is much where an epoch does too.
PLOTTING_SHARE = 0.05  # of the time of training, at most


class SemiLocalLogger(LocalLogger):
    """nnU-Net's local logger that takes new keys, and adds their curves under its own in progress.png.

    Args:
        num_epochs: How many epochs the training has.
    """

    def __init__(self, num_epochs: Callable[[], int]) -> None:
        super().__init__()
        self._num_epochs = num_epochs
        self._next_plot = -inf

    def log(self, key: str, value: object, epoch: int) -> None:
        """Log one value of an epoch; a key that starts later than the others is nan before."""
        values = self.my_fantastic_logging.setdefault(key, [])
        values.extend([nan] * (epoch - len(values)))
        super().log(key, value, epoch)

    def plot_progress_png(self, output_folder: str) -> None:
        """nnU-Net's progress.png with one more panel: everything logged under ``semi/``.

        It is drawn after each epoch, or, where epochs are short, after the last one and as often as `PLOTTING_SHARE`
        permits.
        """
        begun = time.monotonic()
        if begun < self._next_plot and len(self.my_fantastic_logging["epoch_end_timestamps"]) < self._num_epochs():
            return
        self._plot(output_folder)
        self._next_plot = begun + (time.monotonic() - begun) / PLOTTING_SHARE

    def _plot(self, output_folder: str) -> None:
        curves = {key: values for key, values in self.my_fantastic_logging.items() if key.startswith(PREFIX)}
        # nnU-Net draws as many epochs as its shortest list has: a term that ended must not end the picture.
        epochs = len(self.my_fantastic_logging["epoch_end_timestamps"])
        for values in curves.values():
            values.extend([nan] * (epochs - len(values)))
        super().plot_progress_png(output_folder)
        if not any(any(isfinite(value) for value in values) for values in curves.values()):
            return
        path = os.path.join(output_folder, "progress.png")
        with Image.open(path) as stock:
            ours = _draw_curves(curves, stock.width)
            both = Image.new("RGB", (stock.width, stock.height + ours.height))
            both.paste(stock, (0, 0))
            both.paste(ours, (0, stock.height))
        with whole_file(path) as unfinished:
            both.save(unfinished, format="png", compress_level=1)


class EpochValues:
    """Sums of one epoch's step values."""

    def __init__(self) -> None:
        self._values: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, values: Mapping[str, float]) -> None:
        """Note one step's values; those that are not finite do not enter the mean."""
        for name, value in values.items():
            if isfinite(value):
                self._values[name].append(value)

    def means(self) -> dict[str, float]:
        """Mean of each value over the steps that reported it."""
        return {name: sum(values) / len(values) for name, values in self._values.items()}


def to_floats(values: Mapping[str, torch.Tensor | float]) -> dict[str, float]:
    """Plain numbers, with a single transfer from the device."""
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    floats = {name: float(value) for name, value in values.items() if not isinstance(value, torch.Tensor)}
    if tensors:
        together = torch.stack([value.detach().to(torch.float32).reshape(()) for value in tensors.values()])
        floats.update(zip(tensors, together.tolist(), strict=True))
    return {name: floats[name] for name in values}


def _draw_curves(curves: Mapping[str, list[float]], width: int) -> Image.Image:
    """A picture ``width`` pixels wide: loss terms, weights, and shares (Dice, agreement, voxels used), over epochs."""
    groups: dict[str, dict[str, list[float]]] = {"loss term": {}, "weight": {}, "share (0 to 1)": {}, "steps": {}}
    for key, values in curves.items():
        name = key.removeprefix(PREFIX)
        if name.startswith("weight_"):
            groups["weight"][name.removeprefix("weight_")] = values
        elif name.startswith("loss_"):
            groups["loss term"][name.removeprefix("loss_")] = values
        else:
            groups["steps" if name == "skipped_steps" else "share (0 to 1)"][name] = values
    shown = {title: lines for title, lines in groups.items() if lines}
    dpi = plt.rcParams["figure.dpi"]  # nnU-Net's picture has it too
    figure, axes = plt.subplots(len(shown), 1, figsize=(width / dpi, 10 * len(shown)), dpi=dpi, squeeze=False)
    for axis, (title, lines) in zip(axes[:, 0], shown.items(), strict=True):
        for name, values in lines.items():
            axis.plot(range(len(values)), values, linewidth=4, label=name, marker="o" if len(values) == 1 else None)
        axis.set_xlabel("epoch")
        axis.set_ylabel(title)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    figure.tight_layout()
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")  # type: ignore[attr-defined]
    plt.close(figure)
    return picture


def log_values(trainer: nnUNetTrainer, values: Mapping[str, float]) -> None:
    """Into the training log and nnU-Net's loggers, one value per epoch each."""
    for name, value in values.items():
        trainer.logger.log(PREFIX + name, value, trainer.current_epoch)
        if not name.startswith("weight_"):
            weight = values.get(name.replace("loss_", "weight_"), None) if name.startswith("loss_") else None
            shown = f"{value:.4f}" if weight is None else f"{value:.4f} (weight {weight:.4f})"
            trainer.print_to_log_file(f"{name.removeprefix('loss_')} {shown}")


def values_of_terms(terms: Iterable[Term]) -> dict[str, torch.Tensor | float]:
    """What to log of the terms that apply: their values, and the weights of those of unlabelled voxels."""
    applying = [term for term in terms if term.applies]
    return {**{f"loss_{term.name}": term.value for term in applying},
            **{f"weight_{term.name}": term.weight for term in applying if not term.supervised}}
