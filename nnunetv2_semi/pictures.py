"""Side-by-side pictures of images, truth and predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnunetv2_semi.data.atomic_files import whole_file

# Okabe and Ito's colours, told apart with any colour vision and against grey.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC3377", "#F0E442", "#0072B2", "#D55E00")
BACKGROUND = "#111111"
FOREGROUND = "#F2F2F2"


@dataclass(frozen=True)
class PictureRow:
    """One case of a picture.

    Args:
        case: Name, written at the left.
        images: Volume ``(Z, Y, X)`` per column title, all of one size.
        segmentations: Label map of that size per column title; the first is the truth and has no Dice.
        dice: Mean Dice per column title of ``segmentations``, shown above the panel where present.
        aspect: Height of a pixel over its width.
        ranges: Black and white value per title of ``images``; of others a percentile of the panel.
    """

    case: str
    images: Mapping[str, np.ndarray]
    segmentations: Mapping[str, np.ndarray]
    dice: Mapping[str, float]
    aspect: float = 1.0
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def slice_through_structures(truth: np.ndarray, labels: Sequence[int]) -> int:
    """Index along the first axis of the slice that shows the most labels, and of those the largest smallest one."""
    areas = np.stack([(truth == label).sum(axis=tuple(range(1, truth.ndim))) for label in labels])
    visible = (areas > 0).sum(0)
    smallest = np.where(areas > 0, areas, areas.max() + 1).min(0)
    return int(np.argmax(visible * (areas.max() + 2) + smallest))


def save_overview(rows: Sequence[PictureRow], labels: Mapping[str, int], title: str, file: Path) -> None:
    """Draw one slice per case: its images, then its label maps as outlines over the last image.

    Args:
        rows: The cases, all with the same columns.
        labels: Label value per structure name, without background.
        title: Line above the picture.
        file: A .png file; written whole.
    """
    columns = len(rows[0].images) + len(rows[0].segmentations)
    figure = Figure(figsize=(2.3 * columns + 0.5, 2.75 * len(rows) + 1.15), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    height = figure.get_size_inches()[1]
    grid = figure.subplots(
        len(rows),
        columns,
        squeeze=False,
        gridspec_kw={
            "left": 0.045,
            "right": 0.99,
            "top": 1 - 0.8 / height,
            "bottom": 0.5 / height,
            "wspace": 0.04,
            "hspace": 0.16,
        },
    )
    for axes_row, row in zip(grid, rows, strict=True):
        _draw_row(axes_row, row, labels)
    figure.suptitle(title, color=FOREGROUND, fontsize=13, y=1 - 0.18 / height, va="top")
    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in zip(labels, COLOURS, strict=False)],
        loc="lower center",
        bbox_to_anchor=(0.5, 0.06 / height),
        ncols=len(labels),
        frameon=False,
        labelcolor=FOREGROUND,
        fontsize=11,
    )
    with whole_file(file) as unfinished:
        figure.savefig(unfinished, dpi=110, facecolor=BACKGROUND, format="png")


def _draw_row(axes_row: Sequence[Axes], row: PictureRow, labels: Mapping[str, int]) -> None:
    values = list(labels.values())
    # of the truth, or where that has none, of a prediction
    shown = next((single for single in row.segmentations.values() if np.isin(single, values).any()),
                 next(iter(row.segmentations.values())))
    index = slice_through_structures(shown, values)
    panels: list[tuple[str, np.ndarray, np.ndarray | None]] = [
        (title, volume[index], None) for title, volume in row.images.items()
    ]
    underlay = panels[-1][1]
    for title, segmentation in row.segmentations.items():
        heading = f"{title}   Dice {row.dice[title]:.2f}" if title in row.dice else title
        panels.append((heading, underlay, segmentation[index]))
    for axes, (heading, image, outlines) in zip(axes_row, panels, strict=True):
        low, high = row.ranges.get(heading) or np.percentile(image, [1, 99.5])
        axes.imshow(image, cmap="gray", vmin=low, vmax=high, aspect=row.aspect, interpolation="nearest")
        if outlines is not None:
            _draw_labels(axes, outlines, labels)
        axes.set_title(heading, color=FOREGROUND, fontsize=10, pad=4)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_frame_on(False)
    axes_row[0].set_ylabel(row.case, color=FOREGROUND, fontsize=10)


def _draw_labels(axes: Axes, segmentation: np.ndarray, labels: Mapping[str, int]) -> None:
    for label, colour in zip(labels.values(), COLOURS, strict=False):
        # The frame closes outlines of structures that touch the border of the picture.
        mask = np.pad(segmentation == label, 1)
        if not mask.any():
            continue
        extent = (-1, segmentation.shape[1], -1, segmentation.shape[0])
        across = np.arange(extent[0], extent[1] + 1)
        down = np.arange(extent[2], extent[3] + 1)
        axes.contourf(across, down, mask, levels=[0.5, 1.5], colors=[colour], alpha=0.30)
        axes.contour(across, down, mask, levels=[0.5], colors=[colour], linewidths=1.6)
    axes.set_xlim(-0.5, segmentation.shape[1] - 0.5)
    axes.set_ylim(segmentation.shape[0] - 0.5, -0.5)
