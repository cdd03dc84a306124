"""Pictures of a registration: the fixed and the moved image as the fields of a checkerboard, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from nnunetv2_semi.data.atomic_files import whole_file
from nnunetv2_semi.pictures import BACKGROUND, COLOURS, FOREGROUND

_FIELDS = 6  # along the longer side
_PLANES = ("axial", "coronal", "sagittal")
_TINTED = LinearSegmentedColormap.from_list("moving", ["black", COLOURS[0], "white"])


@dataclass(frozen=True)
class AlignmentPicture:
    """One registration.

    Args:
        title: at the left.
        fixed, before, after: of one grid; the moving image as its header places it, and as the transform does.
        captions: above the pictures of before and of after.
    """

    title: str
    fixed: sitk.Image
    before: sitk.Image
    after: sitk.Image
    captions: tuple[str, str]


def save_sheet(pictures: Sequence[AlignmentPicture], title: str, file: Path) -> None:
    """A row for each registration: middle slices in each plane before, then after. Written whole."""
    planes = max(picture.fixed.GetDimension() for picture in pictures) * 2 - 3
    columns = 2 * planes
    figure = Figure(figsize=(2.3 * columns + 0.6, 2.5 * len(pictures) + 0.9), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    height = figure.get_size_inches()[1]
    grid = figure.subplots(len(pictures), columns, squeeze=False, gridspec_kw={
        "left": 0.05, "right": 0.99, "top": 1 - 0.85 / height, "bottom": 0.1 / height, "wspace": 0.04, "hspace": 0.2})
    for row, picture in zip(grid, pictures, strict=True):
        for axes in row:
            axes.set_axis_off()
        for half, (moved, caption) in enumerate(zip((picture.before, picture.after), picture.captions, strict=True)):
            for plane in range(picture.fixed.GetDimension() * 2 - 3):
                axes = row[half * planes + plane]
                _draw(axes, picture.fixed, moved, plane)
                of_plane = f"{_PLANES[plane]} " if planes > 1 else ""
                axes.set_title(caption if plane == 0 else of_plane, color=FOREGROUND, fontsize=9, pad=4)
        row[0].text(-0.06, 0.5, picture.title, color=FOREGROUND, fontsize=9, rotation=90, va="center", ha="right",
                    transform=row[0].transAxes)
    figure.suptitle(title, color=FOREGROUND, fontsize=12, y=1 - 0.15 / height, va="top")
    with whole_file(file) as unfinished:
        figure.savefig(unfinished, dpi=110, facecolor=BACKGROUND, format="png")


def _draw(axes: Axes, fixed: sitk.Image, moved: sitk.Image, plane: int) -> None:
    """A middle slice: fields of the fixed image in grey, of the moved one tinted."""
    volumes = [sitk.GetArrayFromImage(image).astype(np.float32) for image in (fixed, moved)]
    spacing = fixed.GetSpacing()[::-1]
    slices, sides = volumes, spacing
    if fixed.GetDimension() == 3:
        slices = [np.take(volume, volume.shape[plane] // 2, axis=plane) for volume in volumes]
        sides = tuple(side for axis, side in enumerate(spacing) if axis != plane)
    shown = [_scaled(image, volume) for image, volume in zip(slices, volumes, strict=True)]
    if plane > 0:  # NIfTI's third axis goes up
        shown = [image[::-1] for image in shown]
    rows, columns = shown[0].shape
    field = max(rows * sides[0], columns * sides[1]) / _FIELDS
    down, across = np.arange(rows) * sides[0] // field, np.arange(columns) * sides[1] // field
    odd = (down[:, None] + across[None]) % 2 > 0
    grey = np.repeat(shown[0][..., None], 3, -1)
    axes.imshow(np.where(odd[..., None], _TINTED(shown[1])[..., :3], grey), aspect=sides[0] / sides[1],
                interpolation="nearest")


def _scaled(image: np.ndarray, volume: np.ndarray) -> np.ndarray:
    low, high = np.percentile(volume, [1, 99.5])
    return np.clip((image - low) / max(high - low, 1e-6), 0, 1)
