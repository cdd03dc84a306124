"""Rigid and affine registration of two images of any modality, by SimpleITK and Mattes' mutual information.

A transform maps points (mm) of the fixed image to points of the moving one, as resampling needs it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import SimpleITK as sitk

Kind: TypeAlias = Literal["rigid", "affine"]
Linear: TypeAlias = sitk.Euler2DTransform | sitk.Euler3DTransform | sitk.AffineTransform

_BINS = 32
_LARGEST_CHANGE = 2.0  # of a volume
_ITERATIONS = 100
_FEWEST_VOXELS = 8  # along an axis that is made coarser
_COARSE_VOXELS, _MEDIUM_VOXELS, _JUDGED_VOXELS = 2**14, 2**17, 2**20
_FINE_SAMPLES = 2**17
_SEED = 1  # of the samples
_TURN = math.radians(20)
_REFINED_STARTS = 3  # and the position that the headers say
_LEAST_OVERLAP = 0.5  # of what the better one of the headers' position and common centres has
_POINTS_PER_AXIS = 9


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well a registration went.

    Attributes:
        start: where the search that won began, such as "moments, axis 0 by +20 degrees".
        information_before, information_after: mutual information (nats) of the images as their headers place them, and
            by the transform.
        displacement: mm, mean over the fixed image.
        overlap: share of the smaller image that the other one shows, by the transform.
        is_unmoved: nothing within a voxel was better than the headers' position, which is the result.
    """

    start: str
    information_before: float
    information_after: float
    displacement: float
    overlap: float
    is_unmoved: bool


@dataclass(frozen=True, kw_only=True)
class Registered(Quality):
    """What registration found; ``transform``: points of the fixed image to points of the moving one."""

    transform: Linear


class Backend(Protocol):
    """What finds the optimum near a start."""

    def refined(self, moving: sitk.Image, fixed: sitk.Image, start: Linear, kind: Kind) -> Linear:
        """The rigid or affine transform near the rigid ``start``; images have float32 voxels."""


class SimpleITKBackend:
    """All voxels of images of moderate size, smoothed less and less; then a random part of those of larger ones.

    Without the smoothing, noise catches the search in optima up to a voxel beside the best one.
    """

    def refined(self, moving: sitk.Image, fixed: sitk.Image, start: Linear, kind: Kind) -> Linear:
        smaller = coarser(moving, _MEDIUM_VOXELS), coarser(fixed, _MEDIUM_VOXELS)
        step = max(smaller[1].GetSpacing())
        found = _single(optimum(*smaller, start if kind == "rigid" else affine_from(start), factors=(1, 1, 1),
                                sigmas=(2, 1, 0.5), steps=(step / 2, step / 200)))
        if all(image.GetSize() == whole.GetSize() for image, whole in zip(smaller, (moving, fixed), strict=True)):
            return found
        step, share = max(fixed.GetSpacing()), min(1.0, _FINE_SAMPLES / fixed.GetNumberOfPixels())
        return _single(optimum(moving, fixed, found, share=share, steps=(step / 2, step / 200)))


def register(moving: sitk.Image, fixed: sitk.Image, kind: Kind, backend: Backend) -> Registered:
    """Register two scalar images of two or three axes.

    Searches begin at three positions (the headers', common centres of the images, common centres of intensity), each
    also turned about every axis. The starts of most mutual information are improved on coarse images, and the
    best of these is refined. The same images always give the same result.

    Raises:
        RuntimeError: an image is constant or has voxels that are not finite; the images do not overlap; mutual
            information is worse than before; or an optimiser's own.
    """
    moving, fixed = _checked(moving, "moving"), _checked(fixed, "fixed")
    unmoved = rigid_transform(np.eye(fixed.GetDimension()), _centre(fixed), np.zeros(fixed.GetDimension()))
    if not overlap(unmoved, moving, fixed):
        distance = float(np.linalg.norm(_centre(moving) - _centre(fixed)))
        raise RuntimeError(f"the images do not overlap: their headers place the centres {distance:.0f} mm apart")
    name, start = _best_start(moving, fixed)
    found = backend.refined(moving, fixed, start, kind)
    judged = coarser(moving, _JUDGED_VOXELS), coarser(fixed, _JUDGED_VOXELS)
    before, after = (mutual_information(*judged, transform) for transform in (unmoved, found))
    moved = mean_displacement(found, fixed)
    if after < before:
        if moved >= max(fixed.GetSpacing()):
            raise RuntimeError(f"mutual information is worse after registration: {before:.3f}, then {after:.3f}")
        found, name, after, moved = unmoved, "header", before, 0.0
    return Registered(transform=found, start=name, information_before=before, information_after=after,
                      displacement=moved, overlap=overlap(found, moving, fixed), is_unmoved=found is unmoved)


def optimum(moving: sitk.Image, fixed: sitk.Image, start: sitk.Transform, *, factors: Sequence[int] = (1,),
            sigmas: Sequence[float] = (), share: float = 1.0,
            steps: tuple[float, float] = (1.0, 1e-3)) -> sitk.Transform:
    """The transform of the kind of ``start`` that has most mutual information, found from there by gradient descent.

    One thread, so that the same images always give the same transform.

    Args:
        moving, fixed: of float32 voxels.
        start: is not changed.
        factors: by which the images are made coarser, one resolution after the other.
        sigmas: voxels, of the Gaussian that smooths each resolution; half the factor by default.
        share: of the voxels that is used, drawn at random; with 1 all are.
        steps: mm, the first and the smallest one.

    Raises:
        RuntimeError: the images do not overlap (SimpleITK's), or volumes would change by more than a factor of two:
            mutual information was led astray.
    """
    method = _method()
    if share < 1:
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(share, _SEED)
    method.SetOptimizerAsRegularStepGradientDescent(*steps, _ITERATIONS, relaxationFactor=0.7)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(list(factors))
    method.SetSmoothingSigmasPerLevel(list(sigmas or (factor / 2 for factor in factors)))
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    method.SetInitialTransform(start, inPlace=False)
    with _one_thread():
        found = method.Execute(fixed, moving)
    volume = float(np.linalg.det(matrix_and_offset(found)[0]))
    if not 1 / _LARGEST_CHANGE < volume < _LARGEST_CHANGE:
        raise RuntimeError(f"volumes would change by a factor of {volume:.2f}")
    return found


def mutual_information(moving: sitk.Image, fixed: sitk.Image, transform: sitk.Transform) -> float:
    """Mattes' mutual information (nats) of all voxels of ``fixed`` that ``moving`` shows; more is better.

    Raises:
        RuntimeError: the images do not overlap.
    """
    method = _method()
    method.SetInitialTransform(transform)
    with _one_thread():
        return -float(method.MetricEvaluate(fixed, moving))


def rigid_transform(rotation: np.ndarray, centre: np.ndarray, translation: np.ndarray) -> Linear:
    """``rotation`` (N, N) about ``centre`` (mm), then ``translation`` (mm), N = 2 or 3."""
    transform = sitk.Euler2DTransform() if len(centre) == 2 else sitk.Euler3DTransform()
    transform.SetCenter(centre.tolist())
    transform.SetMatrix(rotation.ravel().tolist())
    transform.SetTranslation(translation.tolist())
    return transform


def affine_from(transform: Linear) -> sitk.AffineTransform:
    """A rigid or affine transform as an affine one."""
    affine = sitk.AffineTransform(transform.GetDimension())
    affine.SetCenter(transform.GetCenter())
    affine.SetMatrix(transform.GetMatrix())
    affine.SetTranslation(transform.GetTranslation())
    return affine


def matrix_and_offset(transform: sitk.Transform) -> tuple[np.ndarray, np.ndarray]:
    """Of a linear transform x -> matrix x + offset."""
    dims = transform.GetDimension()
    origin, *ends = (np.array(transform.TransformPoint(point)) for point in np.eye(dims + 1, dims, -1))
    return np.stack([end - origin for end in ends], 1), origin


def mean_displacement(transform: sitk.Transform, image: sitk.Image) -> float:
    """mm by which ``transform`` moves the points of ``image`` on average."""
    points = grid_points(image)
    return float(np.linalg.norm(mapped(transform, points) - points, axis=1).mean())


def overlap(transform: sitk.Transform, moving: sitk.Image, fixed: sitk.Image) -> float:
    """Share of the smaller image that the other one shows."""
    inverse = transform.GetInverse()
    return max(_share_within(mapped(transform, grid_points(fixed)), moving),
               _share_within(mapped(inverse, grid_points(moving)), fixed))


def grid_points(image: sitk.Image) -> np.ndarray:
    """Points (mm) spread evenly over an image, corners included: (points, axes)."""
    indices = np.array(list(itertools.product(*(np.linspace(0, size - 1, min(size, _POINTS_PER_AXIS))
                                                for size in image.GetSize()))))
    direction = np.array(image.GetDirection()).reshape(image.GetDimension(), -1)
    return indices * image.GetSpacing() @ direction.T + image.GetOrigin()


def mapped(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    """``points`` (points, axes) by a linear transform."""
    matrix, offset = matrix_and_offset(transform)
    return points @ matrix.T + offset


def coarser(image: sitk.Image, voxels: int) -> sitk.Image:
    """``image`` of at most ``voxels`` voxels, if 8 stay along an axis; the finest axes are averaged first."""
    while image.GetNumberOfPixels() > voxels:
        finest = min((spacing for spacing, size in zip(image.GetSpacing(), image.GetSize(), strict=True)
                      if size >= 2 * _FEWEST_VOXELS), default=None)
        if finest is None:
            break
        image = sitk.BinShrink(image, [2 if spacing < 1.5 * finest and size >= 2 * _FEWEST_VOXELS else 1
                                       for spacing, size in zip(image.GetSpacing(), image.GetSize(), strict=True)])
    return image


def _best_start(moving: sitk.Image, fixed: sitk.Image) -> tuple[str, Linear]:
    """The start that is best once improved on coarse images: its name, and the improved rigid transform."""
    coarse = coarser(moving, _COARSE_VOXELS), coarser(fixed, _COARSE_VOXELS)
    starts = dict(_starts(*coarse))
    least = _LEAST_OVERLAP * max(overlap(start, *coarse) for name, start in starts.items() if "," not in name)
    ranked = _ranked(starts, coarse, least)
    step = max(coarse[1].GetSpacing())
    improved = {}
    for name in dict.fromkeys(["header", *ranked[:_REFINED_STARTS]]):
        try:
            improved[name] = _single(optimum(*coarse, starts[name], steps=(step / 2, step / 40)))
        except RuntimeError:  # what leads out of the image is no result
            continue
    best = _ranked(improved, coarse, least)
    if not best:
        raise RuntimeError("the images overlap too little to be registered")
    return best[0], improved[best[0]]


def _ranked(transforms: Mapping[str, Linear], images: tuple[sitk.Image, sitk.Image], least: float) -> list[str]:
    """Names of transforms by which the images overlap enough, those of most mutual information first."""
    information = {}
    for name, transform in transforms.items():
        if overlap(transform, *images) >= least:
            try:
                information[name] = mutual_information(*images, transform)
            except RuntimeError:  # no sample of the one image lies in the other
                continue
    return sorted(information, key=lambda name: -information[name])


def _starts(moving: sitk.Image, fixed: sitk.Image) -> Iterator[tuple[str, Linear]]:
    centre = _centre(fixed)
    mass_fixed, mass_moving = (_centre_of_mass(image) for image in (fixed, moving))
    shifts = {"header": np.zeros_like(centre), "geometry": _centre(moving) - centre,
              "moments": mass_moving - mass_fixed}
    for position, shift in shifts.items():
        pivot = mass_fixed if position == "moments" else centre
        yield position, rigid_transform(np.eye(len(centre)), pivot, shift)
        for name, rotation in _turns(len(centre)):
            yield f"{position}, {name}", rigid_transform(rotation, pivot, shift)


def _turns(dims: int) -> Iterator[tuple[str, np.ndarray]]:
    for axis, sign in itertools.product(range(3 if dims == 3 else 1), (1, -1)):
        angle = sign * _TURN
        first, second = [index for index in range(dims) if dims == 2 or index != axis]
        rotation = np.eye(dims)
        rotation[first, first] = rotation[second, second] = math.cos(angle)
        rotation[second, first], rotation[first, second] = math.sin(angle), -math.sin(angle)
        yield f"{f'axis {axis} ' if dims == 3 else ''}turned by {math.degrees(angle):+.0f} degrees", rotation


def _method() -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetMetricSamplingStrategy(method.NONE)
    method.SetInterpolator(sitk.sitkLinear)
    return method


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums of several threads differ in the last digits."""
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


def _single(transform: sitk.Transform) -> Linear:
    """The one transform in what SimpleITK returns as a composite."""
    if transform.GetName() == "CompositeTransform":
        transform = sitk.CompositeTransform(transform).GetNthTransform(0)
    return transform.Downcast()


def _checked(image: sitk.Image, name: str) -> sitk.Image:
    voxels = sitk.GetArrayViewFromImage(image)
    if not np.isfinite(voxels).all():
        raise RuntimeError(f"the {name} image has voxels that are not finite")
    if voxels.min() == voxels.max():
        raise RuntimeError(f"all voxels of the {name} image are equal")
    return sitk.Cast(image, sitk.sitkFloat32)


def _centre(image: sitk.Image) -> np.ndarray:
    return np.array(image.TransformContinuousIndexToPhysicalPoint([(size - 1) / 2 for size in image.GetSize()]))


def _centre_of_mass(image: sitk.Image) -> np.ndarray:
    voxels = sitk.GetArrayViewFromImage(image).astype(np.float64)
    weights = voxels - voxels.min()
    index = [float(weights.sum(tuple(other for other in range(voxels.ndim) if other != axis)) @ np.arange(size))
             / float(weights.sum()) for axis, size in enumerate(voxels.shape)]
    return np.array(image.TransformContinuousIndexToPhysicalPoint(index[::-1]))


def _share_within(points: np.ndarray, image: sitk.Image) -> float:
    direction = np.array(image.GetDirection()).reshape(image.GetDimension(), -1)
    index = (points - image.GetOrigin()) @ direction / image.GetSpacing()
    return float(((index >= -0.5) & (index <= np.array(image.GetSize()) - 0.5)).all(1).mean())
