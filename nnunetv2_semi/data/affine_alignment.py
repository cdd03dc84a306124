"""Affine registration of arrays of any modality, by SimpleITK."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk

from nnunetv2_semi.data.registration import optimum

_SHRINK = (4, 2, 1)
_FEWEST_VOXELS = 8  # along an axis, at any resolution


def affine_transform(moving: np.ndarray, fixed: np.ndarray, spacing: Sequence[float]) -> sitk.Transform:
    """The affine map of points of ``fixed`` to points of ``moving``, by Mattes' mutual information.

    moving, fixed: (*spatial) of the same spacing (mm per axis). All voxels are used and one thread, so that the same
    images always give the same map. Raises RuntimeError where the images do not overlap (SimpleITK's), or where volumes
    would change by more than a factor of two: mutual information was led astray.
    """
    images = _image(moving, spacing), _image(fixed, spacing)
    factors = [f for f in _SHRINK if f == 1 or min(min(moving.shape), min(fixed.shape)) // f >= _FEWEST_VOXELS]
    centre = sitk.CenteredTransformInitializer(images[1], images[0], sitk.AffineTransform(moving.ndim),
                                               sitk.CenteredTransformInitializerFilter.GEOMETRY)
    return optimum(*images, centre, factors=factors)


def resampled(patch: np.ndarray, transform: sitk.Transform, spacing: Sequence[float], *, nearest: bool) -> np.ndarray:
    """``patch`` (C, *spatial) where ``transform`` takes its own grid's points, in its own data type.

    nearest: no interpolation, for labels. Where the map leads out of the image, labels are 0 and other channels have
    their lowest value.
    """
    interpolator = sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear
    channels = []
    for channel in patch:
        image = _image(channel, spacing)
        moved = sitk.Resample(image, image, transform, interpolator, 0.0 if nearest else float(channel.min()))
        channels.append(sitk.GetArrayFromImage(moved).astype(patch.dtype))
    return np.stack(channels)


def _image(array: np.ndarray, spacing: Sequence[float]) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(array, dtype=np.float32))
    image.SetSpacing([float(size) for size in reversed(spacing)])
    return image
