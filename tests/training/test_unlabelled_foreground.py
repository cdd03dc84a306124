"""Where the network finds foreground in unlabelled cases, and that patches are drawn there."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunetv2_semi.training.unlabelled_foreground import (
    Window,
    brought_up_to_date,
    find_foreground,
    is_due,
    windows_to_predict,
)


def stored(image):
    return SimpleNamespace(load_case=lambda case: (image, None, None, {}))


def whole(case, image):
    return Window(case, (0,) * (image.ndim - 1), image.shape[1:])


@pytest.mark.parametrize("regions, heads", [(False, 3), (True, 2)])
def test_voxels_are_those_that_the_network_takes_for_each_label(regions, heads):
    generator = np.random.default_rng(0)
    image = generator.normal(size=(heads, 6, 7, 8)).astype(np.float32)
    found = find_foreground([whole("a", image), whole("b", image)], stored(image), lambda x: x, regions, seed=1)
    assert list(found) == ["a", "b"]
    decided = image > 0 if regions else np.stack([image.argmax(0) == label for label in (1, 2)])
    for label, mask in enumerate(decided):
        rows = found["a"][label]
        assert len(rows) == min(mask.sum(), 200) == len(np.unique(rows, axis=0))
        assert (rows[:, 0] == 0).all() and mask[tuple(rows[:, 1:].T)].all()


def test_voxels_of_several_windows_of_a_case_are_told_in_the_coordinates_of_the_case():
    image = np.zeros((2, 6, 7, 8), np.float32)
    foreground = [(1, 2, 3), (4, 6, 7), (5, 0, 0)]
    for voxel in foreground:
        image[(1, *voxel)] = 1.0
    windows = [Window("a", (0, 0, 0), (3, 7, 8)), Window("a", (3, 1, 1), (6, 7, 8))]
    found = find_foreground(windows, stored(image), lambda x: x, False, seed=0)
    assert sorted(map(tuple, found["a"][0].tolist())) == [(0, 1, 2, 3), (0, 4, 6, 7)]


def test_a_label_that_is_nowhere_is_left_out():
    image = np.zeros((3, 4, 4, 4), np.float32)
    assert find_foreground([whole("a", image)], stored(image), lambda x: x, False, seed=0) == {"a": {}}


@pytest.mark.parametrize("patch_size, number", [((8, 8, 4), 8), ((8, 8), 32)])
def test_the_windows_cover_every_case_and_are_as_large_as_a_patch(patch_size, number):
    shapes = {"a": (8, 16, 16), "b": (8, 15, 14), "c": (8, 5, 16)}
    windows = windows_to_predict(shapes, patch_size, 10**9, seed=0)
    assert len([window for window in windows if window.case == "a"]) == number
    side = (1,) * (3 - len(patch_size)) + patch_size
    for case, shape in shapes.items():
        seen = np.zeros(shape, bool)
        for _, lower, upper in (window for window in windows if window.case == case):
            seen[tuple(slice(*ends) for ends in zip(lower, upper, strict=True))] = True
            assert [b - a for a, b in zip(lower, upper, strict=True)] == [min(s, n) for s, n in
                                                                          zip(side, shape, strict=True)]
        assert seen.all()


def test_the_cost_decides_how_many_windows_are_predicted_and_the_seed_which():
    shapes = {f"case_{i}": (8, 16, 16) for i in range(50)}
    windows = windows_to_predict(shapes, (8, 8, 4), 4000, seed=0)
    assert len(windows) == len(set(windows)) == 80 and len({window.case for window in windows}) > 30
    assert len(windows_to_predict(shapes, (8, 8, 4), 1, seed=0)) == 1
    first, again, other = (windows_to_predict(shapes, (8, 8, 4), 4000, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_a_later_look_replaces_what_an_earlier_one_found_in_the_same_windows_alone():
    def rows(*voxels):
        return np.array([(0, *voxel) for voxel in voxels])
    known = {"a": {0: rows((0, 0, 0), (5, 5, 5)), 1: rows((1, 1, 1))}, "b": {0: rows((2, 2, 2))}}
    windows = [Window("a", (0, 0, 0), (4, 4, 4)), Window("c", (0, 0, 0), (4, 4, 4)), Window("d", (0, 0, 0), (4, 4, 4))]
    found = {"a": {0: rows((3, 3, 3))}, "c": {1: rows((2, 0, 0))}, "d": {}}
    new = brought_up_to_date(known, windows, found)
    assert {case: {label: own.tolist() for label, own in voxels.items()} for case, voxels in new.items()} == {
        "a": {0: [[0, 5, 5, 5], [0, 3, 3, 3]]}, "b": {0: [[0, 2, 2, 2]]}, "c": {1: [[0, 2, 0, 0]]}}


def test_the_network_looks_at_three_points_of_training():
    assert [epoch for epoch in range(1000) if is_due(epoch, 1000)] == [100, 300, 600]
    assert [epoch for epoch in range(4) if is_due(epoch, 4)] == [1, 2, 3]
    assert not is_due(0, 1)


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_half_of_the_patches_is_drawn_where_the_network_found_foreground(tools, tmp_path, monkeypatch,
                                                                            configuration):
    tools.prepare(tmp_path, configuration, monkeypatch, shape=(48, 48, 48))
    tools.set_semi(tmp_path, num_epochs=2, unlabelled_foreground=0.5, unlabelled_batch_size=6)
    trainer = tools.trainer(tmp_path, "nnUNetTrainerSemiMix", configuration)
    seen = []

    def predict(image):
        logits = torch.zeros(5, *image.shape[1:])
        logits[1, 0, -1, -1] = 1.0  # one voxel of the first label
        return logits
    monkeypatch.setattr("nnunetv2_semi.compat.sliding_window", lambda trainer, network: predict)
    monkeypatch.setattr("nnunetv2_semi.training.unlabelled_foreground._COST", 0.5)

    at_start = trainer.on_train_epoch_start

    def recorded():
        at_start()
        loader = trainer.dataloader_train.batches.loaders["unlabelled"]
        drawn = loader.get_bbox

        def get_bbox(shape, forced, voxels):
            lower, upper = drawn(shape, forced, voxels)
            seen.append((trainer.current_epoch, forced, np.array(lower), voxels))
            return lower, upper
        loader.get_bbox = get_bbox
    trainer.on_train_epoch_start = recorded
    trainer.run_training()
    assert not any(forced for epoch, forced, *_ in seen if epoch == 0)
    forced = [(lower, voxels) for epoch, forced, lower, voxels in seen if epoch == 1 and forced]
    share = len(forced) / sum(epoch == 1 for epoch, *_ in seen)
    assert share == pytest.approx(0.5)
    loader = trainer.dataloader_train.batches.loaders["unlabelled"]
    shapes = {case: loader._data.load_case(case)[0].shape[1:] for case in loader._data.identifiers}
    patches = trainer.num_epochs * trainer.num_iterations_per_epoch * 6
    windows = windows_to_predict(shapes, trainer.configuration_manager.patch_size, patches, trainer.settings.seed + 1)
    assert len(windows) > 2
    marked = {(window.case, 0, window.lower[0], window.upper[1] - 1, window.upper[2] - 1) for window in windows}
    assert marked == {(case, *voxel) for case, voxels in trainer.foreground.items() for voxel in voxels[0].tolist()}
    for lower, voxels in forced:
        assert any((lower <= voxel).all() and (voxel < lower + loader.patch_size).all() for voxel in voxels[0][:, 1:])
    assert math.isfinite(trainer.logger.get_value("train_losses", step=None)[-1])
