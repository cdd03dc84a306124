"""Affine registration of images of any modality, by SimpleITK."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk

_BINS = 32
_SHRINK = (4, 2, 1)
_FEWEST_VOXELS = 8  # along an axis, at any resolution
_ITERATIONS = 100
_LARGEST_CHANGE = 2.0  # of a volume


def affine_transform(moving: np.ndarray, fixed: np.ndarray, spacing: Sequence[float]) -> sitk.Transform:
    """The affine map of points of ``fixed`` to points of ``moving``, by Mattes' mutual information.

    moving, fixed: (*spatial) of the same spacing (mm per axis). All voxels are used and one thread, so that the same
    images always give the same map. Raises RuntimeError where the images do not overlap (SimpleITK's), or where volumes
    would change by more than a factor of two: mutual information was led astray.
    """
    images = [_image(array, spacing) for array in (moving, fixed)]
    factors = [f for f in _SHRINK if f == 1 or min(min(moving.shape), min(fixed.shape)) // f >= _FEWEST_VOXELS]
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetMetricSamplingStrategy(method.NONE)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, _ITERATIONS, relaxationFactor=0.7)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(factors)
    method.SetSmoothingSigmasPerLevel([f / 2 for f in factors])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    centre = sitk.CenteredTransformInitializer(images[1], images[0], sitk.AffineTransform(moving.ndim),
                                               sitk.CenteredTransformInitializerFilter.GEOMETRY)
    method.SetInitialTransform(centre, inPlace=False)
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # those of the metric; their sums differ in the last digits
    try:
        found = method.Execute(images[1], images[0])
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    origin, *ends = (np.array(found.TransformPoint(point)) for point in np.eye(moving.ndim + 1, moving.ndim, -1))
    volume = float(np.linalg.det([end - origin for end in ends]))
    if not 1 / _LARGEST_CHANGE < volume < _LARGEST_CHANGE:
        raise RuntimeError(f"volumes would change by a factor of {volume:.2f}")
    return found


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
