"""The plots of a report: drawn without a display, returned for the page."""

from __future__ import annotations

import base64
import io
import tempfile
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nnunetv2_semi.benchmark.report.page import Picture
from nnunetv2_semi.benchmark.report.pairing import Arm
from nnunetv2_semi.benchmark.study.trained import Curves
from nnunetv2_semi.pictures import PictureRow, save_overview

# Okabe and Ito's colours that are dark enough on white; shapes tell methods apart too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#A6761D", "#56B4E9", "#7B3294")
MARKERS = ("s", "^", "D", "v", "P", "X", "*", "h")
CONTROL_COLOUR = "#444444"
LINE = "#BBBBBB"
Style = tuple[str, str]


def styles_of(arms: Iterable[Arm]) -> dict[str, Style]:
    """Colour and marker per method, the same in all plots; the control is grey."""
    methods = {arm.method: (CONTROL_COLOUR, "o") for arm in arms}
    others = dict.fromkeys(arm.method for arm in arms if arm.role == "method")
    return methods | dict(zip(others, zip(cycle(COLOURS), cycle(MARKERS), strict=False), strict=False))


def efficiency_plot(rows: pd.DataFrame, bound: pd.Series | None, styles: Mapping[str, Style], title: str) -> Picture:
    """Dice against the number of labelled cases.

    Args:
        rows: Of the summary: one per method and count, in the order of counts.
        bound: The row of the upper bound.
        styles: Of ``styles_of``.
        title: For the caption.
    """
    figure, (axes,) = _figure(4.6, 3.6)
    rows = rows.assign(count=["unknown" if pd.isna(count) else str(count) for count in rows["labelled"]])
    ticks, methods = list(dict.fromkeys(rows["count"])), list(dict.fromkeys(rows["method"]))
    said = []
    for index, method in enumerate(methods):
        own = rows[rows["method"] == method]
        # Side by side, so that intervals do not hide each other.
        offset = min(0.09, 0.7 / len(methods)) * (index - (len(methods) - 1) / 2)
        places = [ticks.index(count) + offset for count in own["count"]]
        reach = np.nan_to_num([own["mean"] - own["low"], own["high"] - own["mean"]])
        colour, marker = styles[method]
        axes.errorbar(places, own["mean"], np.maximum(reach, 0), color=colour, marker=marker, markersize=6, capsize=3,
                      linewidth=1.4, label=method)  # fmt: skip
        said += [
            f"{method}, {count} labelled: {mean:.3f}" for count, mean in zip(own["count"], own["mean"], strict=True)
        ]
    if bound is not None:
        axes.axhline(bound["mean"], color="black", linestyle="--", linewidth=1.2, label="upper bound")
        if not pd.isna(bound["low"]):
            axes.axhspan(bound["low"], bound["high"], color="black", alpha=0.07, linewidth=0)
        said.append(f"upper bound: {bound['mean']:.3f}")
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlim(-0.5, len(ticks) - 0.5)
    axes.set_xlabel("labelled training cases (steps of equal width)")
    axes.set_ylabel("Dice, mean over labels")
    _add_legend(figure, axes)
    return Picture(_svg(figure), f"{title}. Bars: 95 % intervals.", f"Plot of mean Dice. {'; '.join(said)}.", 30)


def paired_plot(control: pd.Series, method: pd.Series, control_name: str, method_name: str, where: str) -> Picture:
    """Dice of each case, by the control (across) and by the method (up).

    Args:
        control, method: Dice per case name.
        control_name, method_name: For the axes.
        where: Data set and number of labelled cases, for the caption.
    """
    both = pd.concat([control, method], axis=1, keys=["control", "method"]).dropna()
    figure, (axes,) = _figure(3.6, 3.6)
    low = max(0.0, float(both.min().min()) - 0.03) if len(both) else 0.0
    axes.plot([low, 1], [low, 1], color=LINE, linewidth=1, zorder=1)
    axes.scatter(both["control"], both["method"], s=26, color=COLOURS[0], alpha=0.75, linewidths=0, zorder=2)
    axes.set_xlim(low, 1.01)
    axes.set_ylim(low, 1.01)
    axes.set_aspect("equal")
    for axis, name in ((axes.xaxis, control_name), (axes.yaxis, method_name)):
        axis.set_major_locator(MaxNLocator(4))
        axis.set_label_text("\n".join(textwrap.wrap(f"Dice, {name}", 30)))
    better, worse = int((both["method"] > both["control"]).sum()), int((both["method"] < both["control"]).sum())
    told = f"{method_name} is higher in {better} of {len(both)} cases, lower in {worse}"
    return Picture(_svg(figure), f"{where}: {told}.", f"Scatter plot of Dice per case. {told}.")


def curves_plot(curves: Mapping[str, Sequence[Curves]], styles: Mapping[str, Style], where: str) -> Picture:
    """Loss and nnU-Net's moving average of Dice over epochs; a line per training.

    Args:
        curves: Of the trainings of each method.
        styles: Of ``styles_of``.
        where: Data set and number of labelled cases, for the caption.
    """
    figure, (upper, lower) = _figure(4.6, 5.2, 2)
    said = []
    for method, trainings in curves.items():
        colour, _ = styles[method]
        for number, training in enumerate(trainings):
            upper.plot(training.train_loss, color=colour, linewidth=1.1, label=None if number else method)
            upper.plot(training.validation_loss, color=colour, linewidth=1.1, linestyle=":")
            lower.plot(training.dice, color=colour, linewidth=1.3)
        last = float(np.mean([training.dice[-1] for training in trainings]))
        said.append(f"{method} ends at {last:.3f}")
    upper.set_ylabel("loss (dotted: validation)")
    lower.set_ylabel("Dice of patches")
    lower.set_xlabel("epoch")
    _add_legend(figure, upper)
    caption = f"{where}. The Dice is nnU-Net's moving average over random patches of its validation cases."
    return Picture(_svg(figure), caption, f"Training curves. Dice of patches: {'; '.join(said)}.", 30)


def overlay_picture(rows: Sequence[PictureRow], labels: Mapping[str, int], title: str, caption: str) -> Picture:
    """Outlines of truth and prediction over the image, one row per case."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "overlay.png"
        save_overview(rows, labels, title, file)
        uri = _uri("image/png", file.read_bytes())
    said = "; ".join(f"{row.case}: " + ", ".join(f"{name} Dice {dice:.2f}" for name, dice in row.dice.items())
                     for row in rows)  # fmt: skip
    return Picture(uri, caption, f"Outlines of truth and prediction over the image. {said}.", 36)


def _figure(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = list(figure.subplots(panels, squeeze=False, sharex=True)[:, 0])
    for single in axes:
        single.spines[["top", "right"]].set_visible(False)
        single.grid(axis="y", color="#E6E6E6", linewidth=0.8)
        single.set_axisbelow(True)
    return figure, axes


def _add_legend(figure: Figure, axes: Axes) -> None:
    lines, names = axes.get_legend_handles_labels()
    # Long names would leave no room for a second column.
    columns = 2 if max(map(len, names)) < 24 else 1
    figure.legend(lines, names, loc="outside upper left", frameon=False, ncols=columns, fontsize=9)


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    # The same report gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _uri("image/svg+xml", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
