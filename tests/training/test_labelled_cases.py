from types import SimpleNamespace

import numpy as np
import pytest

from nnunetv2_semi.training import labelled_cases


class Dataset:
    """One case of three slices: 9 labelled voxels in the second, the ignore label all over the third."""

    def __init__(self, folder, names):
        pass

    def load_case(self, name):
        segmentation = np.zeros((1, 3, 6, 6), dtype=np.int16)
        segmentation[0, 1, :3, :3] = 1
        segmentation[0, 2] = 2
        image = np.stack([np.full((3, 6, 6), 1.0), np.full((3, 6, 6), -0.0)])
        return image, segmentation, None, {"present_channels": [0]}


@pytest.mark.parametrize("ignore_label, labelled_voxels", [(2, 9), (None, 0)])
def test_of_a_3d_case_in_2d_the_slice_with_most_labels_counts(monkeypatch, ignore_label, labelled_voxels):
    monkeypatch.setattr(labelled_cases, "infer_dataset_class", lambda folder: Dataset)
    trainer = SimpleNamespace(
        do_split=lambda: (["case"], []), preprocessed_dataset_folder="",
        label_manager=SimpleNamespace(foreground_labels=[1], has_regions=False, ignore_label=ignore_label),
        get_validation_transforms=lambda *_args, **_kwargs: lambda **sample: sample,
        configuration_manager=SimpleNamespace(patch_size=(6, 6)))
    (case,) = labelled_cases.whole_training_cases(trainer, {"CT": [0], "MR": [1]})
    assert case.image.shape == (2, 6, 6) and case.modalities == [0]
    assert int((case.target == 1).sum()) == labelled_voxels


def connected_classes(monkeypatch, segmentations, patch_size=(6, 6, 6), regions=None, labels=(1, 2),
                      ignore_label=None):
    """What ``labelled_cases.connected_classes`` says of training cases with these label maps (Z, Y, X)."""
    read = []

    class Cases:
        def __init__(self, folder, names):
            pass

        def load_case(self, name):
            read.append(name)
            return None, np.asarray(segmentations[name], dtype=np.int16)[None], None, {}

    monkeypatch.setattr(labelled_cases, "infer_dataset_class", lambda folder: Cases)
    trainer = SimpleNamespace(
        do_split=lambda: (list(segmentations), ["validation case"]), preprocessed_dataset_folder="",
        label_manager=SimpleNamespace(foreground_labels=list(labels), foreground_regions=regions,
                                      has_regions=regions is not None, ignore_label=ignore_label),
        configuration_manager=SimpleNamespace(patch_size=patch_size))
    answer = labelled_cases.connected_classes(trainer)
    assert sorted(read) == sorted(segmentations)
    return {channel + 1 if regions else label for channel, label in answer}


def blocks(*corners):
    """A label map (6, 6, 6) with a block of 2 x 2 x 2 of a label at each corner (z, y, x, label)."""
    segmentation = np.zeros((6, 6, 6))
    for z, y, x, label in corners:
        segmentation[z:z + 2, y:y + 2, x:x + 2] = label
    return segmentation


@pytest.mark.parametrize("corners, expected", [
    ([(0, 0, 0, 1), (4, 4, 4, 2)], {1, 2}),  # one of each label
    ([(0, 0, 0, 1), (4, 4, 4, 1), (0, 4, 4, 2)], {2}),  # two of one
    ([(0, 0, 0, 1), (2, 2, 2, 1)], {1}),  # they share a corner; no case has 2
    ([(0, 0, 0, 1), (4, 4, 4, 3)], {1}),  # 3, such as the ignore label, is not a foreground label
    ([(0, 0, 0, 3), (4, 4, 4, 3)], set()), ([], set()), ([(0, 0, 0, -1), (4, 4, 4, -1)], set())])
def test_labels_that_are_one_component_in_a_case(monkeypatch, corners, expected):
    assert connected_classes(monkeypatch, {"case": blocks(*corners)}) == expected


def test_what_the_ignore_label_may_hide_is_not_taken_for_one_component(monkeypatch):
    whole, in_part, in_pieces = (blocks(*corners) for corners in (
        [(0, 0, 0, 1), (4, 4, 4, 2)], [(0, 0, 0, 1), (4, 4, 4, 3)], [(0, 0, 0, 1), (4, 4, 4, 1), (0, 4, 4, 3)]))
    assert connected_classes(monkeypatch, {"a": in_part}, ignore_label=3) == set()
    assert connected_classes(monkeypatch, {"a": in_part, "b": whole}, ignore_label=3) == {1, 2}
    assert connected_classes(monkeypatch, {"a": whole, "b": in_pieces}, ignore_label=3) == {2}
    # in 2D each slice without it is a proof
    assert connected_classes(monkeypatch, {"a": in_part}, (6, 6), ignore_label=3) == {1}


def test_every_training_case_counts(monkeypatch):
    one, two = blocks((0, 0, 0, 1)), blocks((0, 0, 0, 1), (4, 4, 4, 1))
    other = blocks((0, 0, 0, 2))
    assert connected_classes(monkeypatch, {"a": one, "b": one, "c": other}) == {1, 2}
    for order in ((one, two, other), (two, one, other), (other, one, two)):
        assert connected_classes(monkeypatch, dict(zip("abc", order, strict=True))) == {2}


def test_in_2d_every_slice_counts(monkeypatch):
    joined_above = blocks((0, 0, 0, 1), (0, 4, 4, 1))
    joined_above[2] = 1  # in slices 0 and 1 two objects, together one in 3D
    apart = blocks((0, 0, 0, 1), (4, 4, 4, 1))  # two in 3D, one in each slice
    assert connected_classes(monkeypatch, {"case": joined_above}) == {1}
    assert connected_classes(monkeypatch, {"case": joined_above}, (6, 6)) == set()
    assert connected_classes(monkeypatch, {"case": apart}, (6, 6)) == {1}


@pytest.mark.parametrize("regions, corners, expected", [
    (((1, 2), 2), [(0, 0, 0, 1), (0, 0, 2, 2)], {1, 2}),
    (((1, 2), 2), [(0, 0, 0, 1), (4, 4, 4, 2)], {2}),
    (((1, 2), 2), [(0, 0, 0, 2), (0, 0, 2, 1), (0, 0, 4, 2)], {1}),  # the whole is one, its core two
    (((1, 2),), [(0, 0, 0, 2), (0, 0, 2, 1), (0, 0, 4, 2)], {1})])
def test_of_regions_each_region_counts(monkeypatch, regions, corners, expected):
    assert connected_classes(monkeypatch, {"case": blocks(*corners)}, regions=regions) == expected
