import sys

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_semi.data.elastix_registration import ElastixBackend
from nnunetv2_semi.data.phantom_anatomy import make_phantom_case
from nnunetv2_semi.data.registration import (
    SimpleITKBackend,
    coarser,
    grid_points,
    mapped,
    mean_displacement,
    mutual_information,
    overlap,
    register,
    rigid_transform,
)
from nnunetv2_semi.errors import UserError

SHAPES = {2: (72, 80), 3: (32, 40, 36)}
SPACING = 3.0


def image_of(voxels, spacing=SPACING, origin=()):
    image = sitk.GetImageFromArray(voxels.astype(np.float32))
    image.SetSpacing([spacing] * voxels.ndim)
    image.SetOrigin(origin or [0.0] * voxels.ndim)
    return image


def pair(dims, number=0):
    """The two modalities of a phantom."""
    images = make_phantom_case(number, SHAPES[dims], 2, 0).images
    return image_of(images[0]), image_of(images[1])


def displaced(image, degrees, millimetres):
    """The image turned about its centre (in 3D about an oblique axis) and shifted; and the map of old points to new."""
    dims, angle = image.GetDimension(), np.radians(degrees)
    centre = np.array(image.TransformContinuousIndexToPhysicalPoint([(size - 1) / 2 for size in image.GetSize()]))
    if dims == 2:
        turned = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    else:
        axis = np.array([1.0, 2.0, 2.0]) / 3
        cross = np.cross(np.eye(3), axis)
        turned = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    shift = np.array([2.0, -1.0, 2.0][:dims])
    truth = rigid_transform(turned, centre, shift / np.linalg.norm(shift) * millimetres)
    return sitk.Resample(image, image, truth.GetInverse(), sitk.sitkLinear, 0.0), truth


def error(transform, truth, image):
    """Mean distance in voxels."""
    points = grid_points(image)
    return np.linalg.norm(mapped(transform, points) - mapped(truth, points), axis=1).mean() / SPACING


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("degrees, millimetres", [(15, 5), (-9, 20)])
def test_a_known_displacement_is_found(dims, degrees, millimetres):
    fixed, moving = pair(dims)
    moved, truth = displaced(moving, degrees, millimetres)
    found = register(moved, fixed, "rigid", SimpleITKBackend())
    assert error(found.transform, truth, fixed) < 1 < error(rigid_transform(np.eye(dims), np.zeros(dims),
                                                                            np.zeros(dims)), truth, fixed)
    assert found.information_after > found.information_before and not found.is_unmoved
    assert found.displacement == pytest.approx(mean_displacement(truth, fixed), abs=SPACING)


def test_an_affine_transform_follows_what_a_rigid_one_cannot():
    fixed, moving = pair(2)
    stretch = sitk.AffineTransform(2)
    stretch.SetCenter([100.0, 100.0])
    stretch.Scale([1.15, 0.95])
    moved = sitk.Resample(moving, moving, stretch, sitk.sitkLinear, 0.0)
    errors = {kind: error(register(moved, fixed, kind, SimpleITKBackend()).transform, stretch.GetInverse(), fixed)
              for kind in ("rigid", "affine")}
    assert errors["affine"] < 1 < errors["rigid"]


def test_thick_slices_are_registered():
    case = make_phantom_case(3, (40, 40, 36), 2, 0)
    fixed, moving = image_of(case.images[0]), image_of(case.images[1])
    moved, truth = displaced(moving, 6, 6)
    thick = sitk.BinShrink(moved, [1, 1, 4])
    assert thick.GetSize()[2] == 10
    assert error(register(thick, fixed, "rigid", SimpleITKBackend()).transform, truth, fixed) < 1


def test_the_same_images_give_the_same_transform():
    fixed, moving = pair(2)
    moved, _ = displaced(moving, 5, 5)
    found = [register(moved, fixed, "rigid", SimpleITKBackend()).transform.GetParameters() for _ in range(2)]
    assert found[0] == found[1]


def test_larger_images_are_refined_on_a_part_of_their_voxels(monkeypatch):
    fixed, moving = pair(2)
    moved, truth = displaced(moving, 8, 10)
    monkeypatch.setattr("nnunetv2_semi.data.registration._MEDIUM_VOXELS", 2000)
    monkeypatch.setattr("nnunetv2_semi.data.registration._FINE_SAMPLES", 3000)
    assert error(register(moved, fixed, "rigid", SimpleITKBackend()).transform, truth, fixed) < 1


def test_images_apart_are_refused_with_their_distance():
    fixed, moving = pair(2)
    moving.SetOrigin([3000.0, 0.0])
    with pytest.raises(RuntimeError, match="do not overlap.* 3000 mm apart"):
        register(moving, fixed, "rigid", SimpleITKBackend())


@pytest.mark.parametrize("value, message", [(0.0, "all voxels of the moving image are equal"),
                                            (np.nan, "not finite")])
def test_images_that_show_nothing_are_refused(value, message):
    fixed, _ = pair(2)
    with pytest.raises(RuntimeError, match=message):
        register(image_of(np.full(SHAPES[2], value)), fixed, "rigid", SimpleITKBackend())


class Astray:
    """A backend that finds a shift."""

    def __init__(self, millimetres):
        self.millimetres = millimetres

    def refined(self, moving, fixed, start, kind):
        return rigid_transform(np.eye(2), np.zeros(2), np.array([self.millimetres, 0.0]))


def test_images_of_which_no_place_overlaps_enough_are_refused(monkeypatch):
    fixed, moving = pair(2)
    monkeypatch.setattr("nnunetv2_semi.data.registration._ranked", lambda transforms, images, least: [])
    with pytest.raises(RuntimeError, match="the images overlap too little to be registered"):
        register(moving, fixed, "rigid", SimpleITKBackend())


def test_a_result_worse_than_before_is_refused():
    fixed, moving = pair(2)
    with pytest.raises(RuntimeError, match="worse after registration"):
        register(moving, fixed, "rigid", Astray(10 * SPACING))


def test_images_that_a_small_move_makes_worse_stay_where_they_are():
    fixed, moving = pair(2)
    found = register(moving, fixed, "rigid", Astray(0.9 * SPACING))
    assert found.is_unmoved and found.displacement == 0 and found.information_after == found.information_before
    points = grid_points(fixed)
    assert np.array_equal(mapped(found.transform, points), points)


def test_mutual_information_is_that_of_the_joint_histogram():
    """Of an image with itself it is the entropy; of independent ones nothing."""
    rng = np.random.default_rng(0)
    first, second = (image_of(rng.integers(0, 2, (64, 64))) for _ in range(2))
    identity = rigid_transform(np.eye(2), np.zeros(2), np.zeros(2))
    assert mutual_information(first, first, identity) == pytest.approx(np.log(2), abs=0.01)
    assert mutual_information(first, second, identity) == pytest.approx(0, abs=0.01)


def test_overlap_is_the_share_of_the_smaller_image():
    whole, half = image_of(np.zeros((41, 41)), 1.0), image_of(np.zeros((41, 21)), 1.0)
    unmoved = rigid_transform(np.eye(2), np.zeros(2), np.zeros(2))
    beside = rigid_transform(np.eye(2), np.zeros(2), np.array([10.0, 0.0]))  # shows half of the half
    assert overlap(unmoved, half, whole) == 1
    assert overlap(beside.GetInverse(), half, whole) == pytest.approx(1)
    assert overlap(beside, half, half) == pytest.approx(0.5, abs=0.1)
    assert overlap(rigid_transform(np.eye(2), np.zeros(2), np.array([0.0, 50.0])), half, whole) == 0


def test_the_finest_axes_are_made_coarser_first_and_thin_ones_kept():
    image = sitk.Image([64, 64, 12], sitk.sitkFloat32)
    image.SetSpacing([1.0, 1.0, 4.0])
    assert coarser(image, 20000).GetSize() == (32, 32, 12)
    assert coarser(image, 1).GetSize() == (8, 8, 12)


def test_without_elastix_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "itk", None)
    with pytest.raises(UserError, match=r'pip install "nnunetv2-semi\[elastix\]"'):
        ElastixBackend()


@pytest.mark.parametrize("dims, kind", [(2, "rigid"), (3, "rigid"), (2, "affine")])
def test_elastix_finds_a_known_displacement(dims, kind):
    itk = pytest.importorskip("itk")
    if not hasattr(itk, "ElastixRegistrationMethod"):
        pytest.skip("itk has no elastix")
    fixed, moving = pair(dims)
    moved, truth = displaced(moving, 12, 15)
    found = register(moved, fixed, kind, ElastixBackend())
    assert error(found.transform, truth, fixed) < 1
    assert found.transform.GetName().startswith("Euler" if kind == "rigid" else "Affine")
