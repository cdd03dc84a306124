"""Anatomy and imaging of the phantom: images and label map of one case, made from a seed and a case number.

The anatomy is simple but not trivial. Organs vary in place, size, shape and grey value from case to case, and no
modality shows everything: T1 shows the outlines of the organs and hardly the lesion, T2 the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

MODALITIES = ("T1", "T2", "FLAIR", "T1ce")
CT_MODALITIES = ("CT", *MODALITIES[1:])
LABELS = {"liver": 1, "kidney": 2, "spine": 3, "lesion": 4}

INTENSITY_SCALE = 400.0
NOISE = 0.035
BIAS_AMPLITUDE = 0.2
# A structure thinner than this (radius in voxels) would vanish between voxel centres.
SMALLEST_RADIUS = 1.2


@dataclass(frozen=True)
class Tissue:
    """One ellipsoidal structure of the phantom.

    Lengths are fractions of half the image side, positions lie in [-1, 1], both in the order (axial, anterior to
    posterior, left to right). 2D phantoms use the last two.

    Args:
        label: Label value of its voxels; 0 for tissue that is nobody's target.
        centre: Mean position.
        radii: Mean semi-axes.
        shift: Standard deviation of the position from case to case.
        stretch: Standard deviation of the logarithm of the radii.
        intensity: Mean grey value in each of ``MODALITIES``, where air is 0 and the brightest tissue about 1.
    """

    label: int
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    shift: float
    stretch: float
    intensity: tuple[float, float, float, float]


# Painted in this order, each over the ones before.
TISSUES = {
    "fat": Tissue(0, (0.0, 0.0, 0.0), (1.3, 0.86, 0.92), 0.02, 0.03, (0.90, 0.78, 0.70, 0.90)),
    "muscle": Tissue(0, (0.0, 0.0, 0.0), (1.2, 0.76, 0.82), 0.02, 0.03, (0.46, 0.38, 0.42, 0.48)),
    "bowel": Tissue(0, (0.1, -0.35, 0.35), (0.45, 0.20, 0.26), 0.08, 0.20, (0.60, 0.66, 0.38, 0.62)),
    "liver": Tissue(1, (0.0, -0.12, -0.34), (0.62, 0.42, 0.34), 0.06, 0.12, (0.64, 0.44, 0.50, 0.72)),
    "vessel": Tissue(1, (0.0, -0.12, -0.34), (0.50, 0.055, 0.055), 0.06, 0.10, (0.40, 0.62, 0.30, 0.85)),
    "kidney": Tissue(2, (0.0, 0.22, 0.46), (0.50, 0.27, 0.20), 0.06, 0.12, (0.34, 0.52, 0.60, 0.66)),
    "spine": Tissue(3, (0.0, 0.48, 0.0), (1.2, 0.14, 0.15), 0.03, 0.08, (0.58, 0.28, 0.28, 0.56)),
    "lesion": Tissue(4, (0.0, 0.0, 0.0), (0.30, 0.20, 0.19), 0.0, 0.15, (0.57, 0.72, 0.80, 0.60)),
}
# The lesion and the vessel belong to the liver and move with it.
INSIDE_LIVER = ("vessel", "lesion")

# Hounsfield units in the portal venous phase.
CT_AIR, CT_NOISE = -1000.0, 20.0
CT_UNITS = {"fat": -100.0, "muscle": 55.0, "bowel": 30.0, "liver": 110.0, "vessel": 170.0, "kidney": 180.0,
            "spine": 320.0, "lesion": 60.0}


@dataclass(frozen=True)
class PhantomCase:
    """Images ``(C, *shape)`` as int16 and the label map ``(*shape)`` as uint8 of one case."""

    images: np.ndarray
    segmentation: np.ndarray


def make_phantom_case(number: int, shape: Sequence[int], channels: int, seed: int, ct: bool = False) -> PhantomCase:
    """Images and label map of case ``number``; every label occurs in it.

    Grey values follow the usual model of an MR magnitude image: tissue means weighted by each voxel's share of the
    tissue (partial volume), times a smooth bias field, with Rician noise.

    Args:
        number: Number of the case, the second half of the seed.
        shape: Two or three sides in voxels.
        channels: 1 to 4.
        seed: Of the random numbers.
        ct: The first modality is a CT in Hounsfield units, without bias field, in place of T1 (``CT_MODALITIES``).
    """
    rng = np.random.default_rng((seed, number))
    shape = tuple(shape)
    shares = tissue_shares(rng, shape)
    segmentation = _label_map(shares)
    images = [_ct_image(rng, shares) if ct and channel == 0 else _image(rng, shares, channel)
              for channel in range(channels)]
    return PhantomCase(np.stack(images), segmentation)


def tissue_shares(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Share of every tissue in every voxel, each ``(*shape)`` in [0, 1]; what is missing to 1 is air."""
    ndim = len(shape)
    axes = [(np.arange(side) + 0.5) * 2 / side - 1 for side in shape]
    position = np.stack(np.meshgrid(*axes, indexing="ij"))
    position = position + np.stack([smooth_field(rng, shape, 0.06) for _ in shape])

    shares: dict[str, np.ndarray] = {}
    liver_centre = liver_radii = np.zeros(ndim)
    for name, tissue in TISSUES.items():
        # Axes are dropped after drawing, so that the 2D phantom has the 3D one's anatomy.
        centre = (np.array(tissue.centre) + rng.normal(0, tissue.shift, 3))[-ndim:]
        radii = (np.array(tissue.radii) * np.exp(rng.normal(0, tissue.stretch, 3)))[-ndim:]
        direction = rng.normal(size=3)[-ndim:]
        angle = rng.normal(0, 0.25)
        if name == "liver":
            liver_centre, liver_radii = centre, radii
        elif name in INSIDE_LIVER:
            centre = liver_centre + 0.5 * liver_radii * direction / np.linalg.norm(direction)
        radii = np.maximum(radii, SMALLEST_RADIUS * 2 / np.array(shape))
        occupied = _occupancy(position, centre, radii, angle, shape)
        for earlier in shares.values():
            earlier *= 1 - occupied
        shares[name] = occupied
    return shares


def _occupancy(
    position: np.ndarray, centre: np.ndarray, radii: np.ndarray, angle: float, shape: tuple[int, ...]
) -> np.ndarray:
    """How much of each voxel lies in an ellipsoid that is turned by ``angle`` (radians) in the last two axes."""
    offset = position - centre.reshape(-1, *[1] * len(shape))
    down, right = offset[-2].copy(), offset[-1].copy()
    offset[-2] = math.cos(angle) * down - math.sin(angle) * right
    offset[-1] = math.sin(angle) * down + math.cos(angle) * right
    relative = np.sqrt(sum((along / radius) ** 2 for along, radius in zip(offset, radii, strict=True)))
    # To first order the distance from the surface, in voxels; a voxel is mixed within half a voxel of it.
    mean_radius = float(np.exp(np.mean(np.log(radii * np.array(shape) / 2))))
    return np.clip(0.5 + (1 - relative) * mean_radius, 0, 1)


def _label_map(shares: dict[str, np.ndarray]) -> np.ndarray:
    """Label with the largest share per voxel, ``(*shape)`` uint8; every label gets a voxel however small it is."""
    by_label = np.zeros((len(LABELS) + 1, *next(iter(shares.values())).shape))
    for name, share in shares.items():
        by_label[TISSUES[name].label] += share
    by_label[0] = 1 - by_label[1:].sum(0)
    segmentation = by_label.argmax(0).astype(np.uint8)
    for label in LABELS.values():
        if not (segmentation == label).any():
            segmentation[np.unravel_index(by_label[label].argmax(), segmentation.shape)] = label
    return segmentation


def _image(rng: np.random.Generator, shares: dict[str, np.ndarray], channel: int) -> np.ndarray:
    """One modality, ``(*shape)`` int16."""
    shape = next(iter(shares.values())).shape
    signal = np.zeros(shape)
    for name, share in shares.items():
        signal += share * TISSUES[name].intensity[channel] * math.exp(rng.normal(0, 0.06))
    texture = ndimage.gaussian_filter(rng.normal(size=shape), 1.0)
    signal *= 1 + 0.05 * texture / texture.std()
    # A case's own contrast curve and gain, as scanners and protocols differ.
    signal = np.maximum(signal, 0) ** math.exp(rng.normal(0, 0.12))
    signal *= np.exp(smooth_field(rng, shape, BIAS_AMPLITUDE, nodes=3))
    magnitude = np.hypot(signal + rng.normal(0, NOISE, shape), rng.normal(0, NOISE, shape))
    gain = INTENSITY_SCALE * math.exp(rng.normal(0, 0.2))
    return np.round(magnitude * gain).astype(np.int16)


def _ct_image(rng: np.random.Generator, shares: dict[str, np.ndarray]) -> np.ndarray:
    """A CT, ``(*shape)`` int16, Hounsfield units; enhancement varies from case to case."""
    shape = next(iter(shares.values())).shape
    units = np.full(shape, CT_AIR)
    for name, share in shares.items():
        units += share * (CT_UNITS[name] * math.exp(rng.normal(0, 0.06)) - CT_AIR)
    # A reconstruction kernel leaves neighbours' noise correlated.
    noise = ndimage.gaussian_filter(rng.normal(size=shape), 0.5)
    return np.round(units + noise * (CT_NOISE / noise.std())).astype(np.int16)


def smooth_field(rng: np.random.Generator, shape: tuple[int, ...], amplitude: float, nodes: int = 4) -> np.ndarray:
    """Random field ``(*shape)``: a cubic spline through ``nodes`` normal values (of that deviation) per axis."""
    field = rng.normal(0, amplitude, (nodes,) * len(shape))
    for side in shape:
        # The spline is separable, and as a matrix per axis many times faster than as a zoom of the volume. Each
        # product consumes the first axis and appends the finer one, so that in the end they are in order again.
        spline = ndimage.zoom(np.eye(nodes), (side / nodes, 1), order=3, mode="nearest", grid_mode=True)
        field = np.tensordot(field, spline, axes=(0, 1))
    return field
