"""Where the network finds foreground in unlabelled cases, and that patches are drawn there."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunetv2_semi.training.unlabelled_foreground import cases_to_predict, find_foreground, is_due


def stored(image):
    return SimpleNamespace(load_case=lambda case: (image, None, None, {}))


@pytest.mark.parametrize("regions, heads", [(False, 3), (True, 2)])
def test_voxels_are_those_that_the_network_takes_for_each_label(regions, heads):
    generator = np.random.default_rng(0)
    image = generator.normal(size=(heads, 6, 7, 8)).astype(np.float32)
    found = find_foreground(["a", "b"], stored(image), lambda x: x, regions, seed=1)
    assert list(found) == ["a", "b"]
    decided = image > 0 if regions else np.stack([image.argmax(0) == label for label in (1, 2)])
    for label, mask in enumerate(decided):
        rows = found["a"][label]
        assert len(rows) == min(mask.sum(), 200) == len(np.unique(rows, axis=0))
        assert (rows[:, 0] == 0).all() and mask[tuple(rows[:, 1:].T)].all()


def test_a_label_that_is_nowhere_is_left_out():
    found = find_foreground(["a"], stored(np.zeros((3, 4, 4, 4), np.float32)), lambda x: x, False, seed=0)
    assert found == {"a": {}}


def test_the_cost_decides_how_many_cases_are_predicted_and_the_seed_which():
    shapes = {f"case_{i}": (8, 16, 16) for i in range(50)}  # 8 windows each in 3D, 32 in 2D
    assert len(cases_to_predict(shapes, (8, 8, 4), 4000, seed=0)) == 10
    assert len(cases_to_predict(shapes, (8, 8), 4000, seed=0)) == 2
    assert len(cases_to_predict(shapes, (8, 8, 4), 1, seed=0)) == 1
    assert sorted(cases_to_predict(shapes, (8, 8, 4), 10**9, seed=0)) == sorted(shapes)
    first, again, other = (cases_to_predict(shapes, (8, 8, 4), 4000, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_the_network_looks_at_three_points_of_training():
    assert [epoch for epoch in range(1000) if is_due(epoch, 1000)] == [100, 300, 600]
    assert [epoch for epoch in range(4) if is_due(epoch, 4)] == [1, 2, 3]
    assert not is_due(0, 1)


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_a_third_of_the_patches_is_drawn_where_the_network_found_foreground(tools, tmp_path, monkeypatch,
                                                                            configuration):
    tools.prepare(tmp_path, configuration, monkeypatch, shape=(48, 48, 48))
    tools.set_semi(tmp_path, num_epochs=2, unlabelled_foreground=0.5, unlabelled_batch_size=6)
    trainer = tools.trainer(tmp_path, "nnUNetTrainerSemiMix", configuration)
    corner, seen = (3, 4, 5), []

    def predict(image):
        logits = torch.zeros(5, *image.shape[1:])
        logits[(1, *corner)] = 1.0  # one voxel of the first label
        return logits
    monkeypatch.setattr("nnunetv2_semi.compat.sliding_window", lambda trainer, network: predict)

    at_start = trainer.on_train_epoch_start

    def recorded():
        at_start()
        loader = trainer.dataloader_train.batches.loaders["unlabelled"]
        drawn = loader.get_bbox

        def get_bbox(shape, forced, voxels):
            seen.append((trainer.current_epoch, forced, drawn(shape, forced, voxels)[0]))
            return seen[-1][2], [a + b for a, b in zip(seen[-1][2], loader.patch_size, strict=True)]
        loader.get_bbox = get_bbox
    trainer.on_train_epoch_start = recorded
    trainer.run_training()
    assert not any(forced for epoch, forced, _ in seen if epoch == 0)
    forced = [lower for epoch, forced, lower in seen if epoch == 1 and forced]
    share = len(forced) / sum(epoch == 1 for epoch, *_ in seen)
    known = len(trainer.foreground)
    assert known in (1, 2) and share == pytest.approx(0.5) if known == 2 else 0 < share <= 0.5
    size = trainer.dataloader_train.batches.loaders["unlabelled"].patch_size
    for lower in forced:
        assert all(first <= voxel < first + side for first, voxel, side in zip(lower, corner, size, strict=True))
    assert math.isfinite(trainer.logger.get_value("train_losses", step=None)[-1])
