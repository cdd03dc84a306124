import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_semi.data.affine_alignment import affine_transform, resampled
from nnunetv2_semi.data.phantom_anatomy import make_phantom_case

SHAPES = {2: (48, 40), 3: (24, 32, 28)}


def moved(array, spacing, nearest=False):
    """Turned by 8 degrees about the last axis, shifted, 10 % smaller."""
    transform = sitk.AffineTransform(array.ndim)
    transform.SetCenter([size * step / 2 for size, step in zip(reversed(array.shape), reversed(spacing), strict=True)])
    transform.Rotate(0, 1, 0.14)
    transform.Scale(1.1)
    transform.Translate([3.0] * array.ndim)
    return resampled(array[None], transform, spacing, nearest=nearest)[0]


def dice(a, b):
    return 2 * ((a > 0) & (b > 0)).sum() / ((a > 0).sum() + (b > 0).sum())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [(0, 0), (0, 1)], ids=["same modality", "other modality"])
def test_a_moved_image_is_brought_back(dims, channels):
    case = make_phantom_case(0, SHAPES[dims], 2, 0)
    spacing = (3.0, 2.0, 2.0)[-dims:]
    labels = case.segmentation
    image, other = moved(case.images[channels[0]], spacing), case.images[channels[1]]
    away = moved(labels, spacing, nearest=True)
    transform = affine_transform(image, other, spacing)
    back = resampled(away[None], transform, spacing, nearest=True)[0]
    assert dice(back, labels) > 0.85 > dice(away, labels)
    assert back.dtype == labels.dtype and set(np.unique(back)) <= set(np.unique(labels))


def test_the_same_images_always_give_the_same_map():
    case = make_phantom_case(1, SHAPES[3], 1, 0)
    image = moved(case.images[0], (2.0, 2.0, 2.0))
    maps = [affine_transform(image, case.images[0], (2.0, 2.0, 2.0)).GetParameters() for _ in range(2)]
    assert maps[0] == maps[1]


def test_flat_stacks_are_not_shrunk_away():
    case, spacing = make_phantom_case(2, (12, 32, 32), 1, 0), (4.0, 1.0, 1.0)
    image, labels = case.images[0][2:9], case.segmentation[2:9]
    transform = affine_transform(moved(image, spacing), image, spacing)
    back = resampled(moved(labels, spacing, nearest=True)[None], transform, spacing, nearest=True)[0]
    assert dice(back, labels) > 0.85  # 0.09 at resolutions of one and three slices


def test_a_map_that_changes_volumes_by_more_than_a_factor_of_two_is_refused(monkeypatch):
    case = make_phantom_case(0, SHAPES[3], 1, 0)
    doubled = sitk.AffineTransform(3)
    doubled.Scale(2.0)
    monkeypatch.setattr(sitk.ImageRegistrationMethod, "Execute", lambda *arguments: doubled)
    with pytest.raises(RuntimeError, match="factor of 8.00"):
        affine_transform(case.images[0], case.images[0], (1.0, 1.0, 1.0))
