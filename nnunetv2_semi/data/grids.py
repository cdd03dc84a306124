"""Whether two images lie on the same grid of voxels: one rule, and one tolerance, wherever grids are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Headers hold 32-bit floats, and converted files differ in the last digits: of an origin of 0 mm, or a cosine of 0,
# nnU-Net's relative tolerance leaves nothing.
_PLACEMENT_TOLERANCE = 1e-3
_AXES = (("R", "L"), ("A", "P"), ("I", "S"))  # towards which side the voxels of an axis go, in ITK's coordinates


@dataclass(frozen=True)
class Grid:
    """Where the voxels of an image lie, as far as its file tells; () for what it does not.

    Attributes:
        spacing: mm, one per spatial axis in the reader's order.
        origin: mm, of the first voxel.
        direction: cosines of the axes, a square matrix row by row.
    """

    spacing: tuple[float, ...] = ()
    origin: tuple[float, ...] = ()
    direction: tuple[float, ...] = ()


def grid_of(properties: Mapping) -> Grid:
    """The grid in the properties that one of nnU-Net's readers returns; empty of a reader that knows of no headers.

    Of a reader that reorients images it is the grid after that, since that is where voxels are compared.
    """
    if "sitk_stuff" in properties:
        header = properties["sitk_stuff"]
        size = len(header["origin"])
        spatial = min(size, 3)  # the fourth axis of a file with several channels is no place
        direction = np.reshape(header["direction"], (size, size))[:spatial, :spatial]
        return Grid(_floats(properties["spacing"]), _floats(header["origin"][:spatial]), _floats(direction))
    if "nibabel_stuff" in properties:
        header = properties["nibabel_stuff"]
        affine = np.asarray(header.get("reoriented_affine", header["original_affine"]), dtype=float)
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        lps = np.diag([-1.0, -1.0, 1.0])  # as ITK has it; NIfTI's axes go to the right and to the front
        direction = lps @ affine[:3, :3] / np.where(lengths > 0, lengths, 1)
        return Grid(_floats(properties["spacing"]), _floats(lps @ affine[:3, 3]), _floats(direction))
    return Grid()


def same_spacing(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two spacings agree as nnU-Net's readers want it of a case's channels."""
    return len(first) == len(second) and np.allclose(first, second)


def grid_difference(first: Grid, second: Grid) -> str | None:
    """Which of "spacing", "origin" and "direction" differs, as far as both are known; None if they agree."""
    if first.spacing and second.spacing and not same_spacing(first.spacing, second.spacing):
        return "spacing"
    for name in ("origin", "direction"):
        here, there = getattr(first, name), getattr(second, name)
        if here and there and not (len(here) == len(there) and np.allclose(here, there, atol=_PLACEMENT_TOLERANCE)):
            return name
    return None


def orientation(grid: Grid) -> str:
    """Such as "LPS": where each axis of a 3D image leads to (left, posterior, superior); "" where it is not known."""
    if len(grid.direction) != 9:
        return ""
    letters = []
    for column in np.reshape(grid.direction, (3, 3)).T:
        axis = int(np.argmax(np.abs(column)))
        letters.append(_AXES[axis][int(column[axis] > 0)])
    return "".join(letters)


def _floats(values: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in np.ravel(values))
