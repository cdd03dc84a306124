from __future__ import annotations

import base64
import itertools

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, zoom

from nnunetv2_semi.data.thumbnails import look_alikes, thumbnail


def scan(seed, shape=(40, 36, 30)):
    """Smooth structures in a dark surrounding, as a scan of a part of the body."""
    smooth = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3)
    inside = sum(np.linspace(-1, 1, size + 2)[1:-1].reshape([-1 if a == axis else 1 for a in range(len(shape))]) ** 2
                 for axis, size in enumerate(shape)) < 0.9
    return (inside * (500 + 300 * smooth / smooth.std())).astype(np.float32)


@pytest.mark.parametrize("change", [
    lambda image: image[::-1], lambda image: image.swapaxes(0, 2)[:, ::-1], lambda image: 0.4 * image - 90,
    lambda image: np.pad(image, ((3, 9), (0, 2), (5, 0))), lambda image: zoom(image, (1.5, 1, 0.8), order=1),
    lambda image: np.round(image).astype(np.int16), lambda image: np.rot90(image, axes=(0, 1)),
], ids=["flipped", "axes swapped", "rescaled", "padded", "resampled", "rounded", "turned"])  # fmt: skip
def test_a_changed_copy_is_alike_and_another_scan_is_not(change):
    first = [thumbnail(scan(seed)) for seed in (1, 2, 3)]
    assert look_alikes([thumbnail(change(scan(2)))], first) == [(0, 1)]


def test_every_way_to_lie_is_found():
    image = scan(0, (12, 14, 16))
    ways = [image.transpose(order)[tuple(slice(None, None, step) for step in steps)]
            for order in itertools.permutations(range(3)) for steps in itertools.product((1, -1), repeat=3)]
    assert look_alikes([thumbnail(image)], [thumbnail(way) for way in ways]) == [(0, place) for place in range(48)]


def test_2d_images():
    image = scan(0, (1, 64, 80))
    assert look_alikes([thumbnail(image)], [thumbnail(image[:, ::-1]), thumbnail(scan(1, (1, 64, 80)))]) == [(0, 0)]
    assert look_alikes([thumbnail(image)], [thumbnail(scan(0))]) == []  # 2D and 3D


def test_an_image_without_contrast_is_like_nothing():
    assert thumbnail(np.full((3, 4, 5), 7.0)) == ""
    assert look_alikes(["", ""], ["", thumbnail(scan(0))]) == []
    assert look_alikes([], [thumbnail(scan(0))]) == []


@pytest.mark.filterwarnings("error")
def test_values_too_large_to_be_averaged_are_like_nothing():
    image = scan(0)
    image[:8] = np.finfo(np.float32).min
    assert thumbnail(image) == ""


def test_pairs_are_those_of_a_plain_correlation():
    rng = np.random.default_rng(0)
    images = [scan(seed, (10, 11, 12)) for seed in range(4)]
    noisy = [image + (image != 0) * rng.normal(scale=level, size=image.shape)
             for image in images for level in (1, 100, 500)]
    first, second = ([thumbnail(image) for image in group] for group in (images, noisy))

    def similar(one, other):
        values = [np.frombuffer(base64.b64decode(text), np.int8).astype(float) for text in (one, other)]
        cube = values[0].reshape(16, 16, 16)
        return max(np.corrcoef(cube.transpose(order)[tuple(slice(None, None, step) for step in steps)].ravel(),
                               values[1])[0, 1]
                   for order in itertools.permutations(range(3)) for steps in itertools.product((1, -1), repeat=3))

    expected = [(i, j) for i, one in enumerate(first) for j, other in enumerate(second) if similar(one, other) >= 0.9]
    assert look_alikes(first, second) == expected and 4 <= len(expected) < 12
