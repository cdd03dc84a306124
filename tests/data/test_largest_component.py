import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage

from nnunetv2_semi.data.largest_component import largest_components, numbers_of_components


def flooded(mask, start):
    """Voxels connected with ``start``, over corners too."""
    found, edge = {start}, [start]
    while edge:
        voxel = edge.pop()
        for step in itertools.product((-1, 0, 1), repeat=mask.ndim):
            other = tuple(a + b for a, b in zip(voxel, step, strict=True))
            inside = all(0 <= a < n for a, n in zip(other, mask.shape, strict=True))
            if inside and other not in found and mask[other]:
                found.add(other)
                edge.append(other)
    return found


@pytest.mark.parametrize("shape, channels", [((9, 11), 1), ((5, 6, 7), 1), ((9, 11), 3)])
def test_what_stays_is_the_largest_component_of_each_label_and_what_touches_the_border(shape, channels):
    torch.manual_seed(0)
    labels = torch.randint(0, 2 if channels > 1 else 4, (2, channels, *shape))
    labels[torch.rand(labels.shape) < 0.7] = 0
    given = labels.clone()
    kept = largest_components(labels)
    assert torch.equal(labels, given) and kept.dtype == labels.dtype
    for before, after in zip(labels.flatten(0, 1), kept.flatten(0, 1), strict=True):
        assert (after[after > 0] == before[after > 0]).all()
        for label in range(1, 4):
            components = [flooded(before == label, tuple(v)) for v in (before == label).nonzero().tolist()]
            stayed = {tuple(v) for v in (after == label).nonzero().tolist()}
            at_border = {v for component in components for v in component if any(
                a in (0, n - 1) for w in component for a, n in zip(w, before.shape, strict=True))}
            largest = max(map(len, components), default=0)
            assert any(stayed == at_border | component for component in components if len(component) == largest) \
                or not components and not stayed


def test_a_map_without_foreground_and_one_without_islands_stay():
    labels = torch.zeros(1, 1, 5, 5, dtype=torch.long)
    assert torch.equal(largest_components(labels), labels)
    labels[0, 0, 1, 1] = labels[0, 0, 2, 2] = 3
    assert torch.equal(largest_components(labels), labels)
    labels = torch.zeros(1, 1, 7, 7, dtype=torch.long)
    labels[0, 0, 1:3, 1] = labels[0, 0, 5, 5] = 3
    assert largest_components(labels)[0, 0, 5, 5] == 0 and largest_components(labels).sum() == 6


def test_what_the_border_of_the_patch_cuts_into_two_stays():
    labels = torch.zeros(1, 1, 8, 12, dtype=torch.long)
    labels[0, 0, :6, 1:3], labels[0, 0, :5, 7:9], labels[0, 0, 6, 10] = 1, 1, 1  # two arms, and an island
    kept = largest_components(labels)
    assert kept[0, 0, :, :9].sum() == labels[0, 0, :, :9].sum() and kept[0, 0, 6, 10] == 0


def test_only_of_the_classes_that_are_asked_for():
    labels = torch.zeros(1, 2, 7, 7, dtype=torch.long)
    labels[..., 1:3, 1], labels[..., 5, 5], labels[..., 1:3, 4], labels[..., 5, 2] = 1, 1, 2, 2
    kept = largest_components(labels, {(0, 2), (1, 1)})
    assert [[(channel == label).sum().item() for label in (1, 2)] for channel in kept[0]] == [[3, 2], [2, 3]]
    assert torch.equal(largest_components(labels, set()), labels)


@pytest.mark.parametrize("shape", [(9, 11), (5, 6, 7)])
@pytest.mark.parametrize("share", [0.05, 0.2, 1.0])
def test_components_are_counted(shape, share):
    torch.manual_seed(0)
    labels = torch.randint(1, 4, shape)
    labels[torch.rand(shape) >= share] = 0
    labels[torch.rand(shape) < 0.1] = -1
    classes = {"one": (1,), "two": (2,), "both": (1, 2), "none": (7,), "all": (3, 2, 1)}
    counts = dict.fromkeys(classes, 0)
    for name, members in classes.items():
        mask = sum(labels == label for label in members) > 0
        unseen = {tuple(voxel) for voxel in mask.nonzero().tolist()}
        while unseen:
            unseen -= flooded(mask, next(iter(unseen)))
            counts[name] += 1
    assert numbers_of_components(labels.numpy(), classes) == counts and counts["none"] == 0


def test_voxels_that_share_a_corner_are_one_component_and_nothing_is_none():
    classes = {1: (1,)}
    assert numbers_of_components(np.eye(4, dtype=np.int16), classes) == {1: 1}
    assert numbers_of_components(np.zeros((4, 4, 4), dtype=np.uint8), classes) == {1: 0}
    assert numbers_of_components(np.diag([1.0, 0.0, 1.0]), classes) == {1: 2}


@pytest.mark.parametrize("shape", [(64, 71), (39, 37), (96, 96), (1, 30), (20, 24, 31), (1, 40, 41)])
@pytest.mark.parametrize("labels", [1, 3])
def test_smooth_objects_have_the_components_that_scipy_finds(shape, labels):
    random, corners = np.random.default_rng(0), np.ones((3,) * len(shape))
    for smoothness in (0.0, 1.0, 2.0, 4.0):
        place = ndimage.gaussian_filter(random.normal(size=shape), smoothness)
        drawn = np.digitize(place, np.quantile(place, np.linspace(0.4, 1, labels + 1)[:-1])).astype(np.int16)
        kept = largest_components(torch.from_numpy(drawn)[None, None])[0, 0].numpy()
        counts = numbers_of_components(drawn, {label: (label,) for label in range(1, labels + 1)})
        for label in range(1, labels + 1):
            components, count = ndimage.label(drawn == label, corners)
            sizes = np.bincount(components.ravel())[1:]
            touching = {int(n) for axis in range(len(shape)) for end in (0, -1)
                        for n in components.take(end, axis).flat}
            largest = {n + 1 for n in range(count) if sizes[n] == sizes.max()}
            stayed = {int(n) for n in np.unique(components[kept == label])}
            assert counts[label] == count
            assert (kept == label).sum() == sum(sizes[n - 1] for n in stayed)  # whole components
            assert touching - {0} <= stayed <= touching | largest and stayed & largest and len(stayed - touching) <= 1
