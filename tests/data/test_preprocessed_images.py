import numpy as np
import pytest

from nnunetv2_semi.data.preprocessed_images import image_problem


@pytest.fixture
def image():
    return np.random.default_rng(0).normal(size=(2, 10, 12, 14)).astype(np.float32)


@pytest.fixture
def mask():
    return np.zeros((1, 10, 12, 14), np.int16)


def test_noise_is_an_image_and_so_is_one_channel_of_it_beside_a_filler(image, mask):
    assert image_problem(image, mask) is None
    image[1] = 0
    assert image_problem(image, mask) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_voxel_that_is_no_number_is_enough(image, mask, value):
    image[1, 2, 3, 4] = value
    assert "channel 1 has voxels that are NaN or infinite" in image_problem(image, mask)
    assert image_problem(image, mask, [0]) is None, "a channel that the case lacks"


def test_images_of_one_value_are_none_whatever_is_outside(image, mask):
    image[:] = 3
    assert image_problem(image, mask) == "all voxels have the same value"
    image[:, 0], mask[:, 0] = 0, -1
    assert image_problem(image, mask) == "all voxels have the same value"


def test_a_voxel_beside_which_all_others_are_the_same_is_told(image, mask):
    image[0, 0, 0, 0] = 1e6
    assert "99.9 % of the voxels of channel 0" in image_problem(image, mask) and "1e+06" in image_problem(image, mask)
    image[0, 0, 0, 0] = 100
    assert image_problem(image, mask) is None


def test_sparse_bright_structures_on_nothing_are_an_image(image, mask):
    image[:] = 0
    image[:, 2:4, 2:4, 2:4] = 5
    assert image_problem(image, mask) is None
