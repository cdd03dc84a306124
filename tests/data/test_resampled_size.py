from types import SimpleNamespace

import pytest

from nnunetv2_semi.data import resampled_size
from nnunetv2_semi.data.resampled_size import memory_bytes, resampled_shape, size_problem

PLANS = SimpleNamespace(transpose_forward=[2, 0, 1])


def configuration(*spacing, resampling="resample_data_or_seg_to_shape"):
    return SimpleNamespace(spacing=list(spacing), configuration={"resampling_fn_data": resampling})


VOLUME, SLICES = configuration(5.0, 1.0, 2.0), configuration(1.0, 2.0)


def test_axes_are_in_the_order_of_the_plans_and_slices_of_2d_plans_stay():
    assert resampled_shape((10, 20, 30), (1, 2, 3), PLANS, VOLUME) == (18, 10, 20)
    assert resampled_shape((10, 20, 30), (1, 2, 3), PLANS, SLICES) == (30, 10, 20)


def test_an_ordinary_size_is_none_to_speak_of():
    assert size_problem((160, 160, 160), (1, 1, 1), 4, PLANS, VOLUME) is None


@pytest.mark.parametrize("spacing", [(0, 1, 1), (1, -1, 1), (1, 1, float("nan"))])
def test_what_is_no_voxel_size_is_told(spacing):
    assert "no voxel size. Correct the header" in size_problem((8, 8, 8), spacing, 1, PLANS, VOLUME)


def test_no_voxel_left_is_told_with_both_sizes():
    assert "8 x 8 x 2 voxels of 1 x 1 x 1 mm, so that resampled to 5 x 1 x 2 mm it would have no voxel (0 x 8 x 4)" in \
        size_problem((8, 8, 2), (1, 1, 1), 1, PLANS, VOLUME)


def test_plans_without_resampling_take_any_size():
    plans = configuration(5.0, 1.0, 2.0, resampling="no_resampling_hack")
    assert size_problem((8, 8, 2), (1, 1, 1), 1, PLANS, plans) is None
    assert size_problem((100, 100, 100), (1e4, 1e4, 1e4), 1, PLANS, plans) is None


def test_more_than_the_memory_is_told(monkeypatch):
    monkeypatch.setattr(resampled_size, "memory_bytes", lambda: 10_000_000)
    assert size_problem((100, 100, 100), (1, 1, 2), 1, PLANS, VOLUME) is None
    problem = size_problem((100, 100, 1000), (1, 1, 2), 1, PLANS, VOLUME)
    assert "400 x 100 x 50 voxels, which need 26 MB of memory, and there are 10 MB" in problem


def test_the_memory_is_that_of_a_container_if_less(tmp_path, monkeypatch):
    whole = memory_bytes()
    (tmp_path / "limit").write_text("1000\n")
    monkeypatch.setattr(resampled_size, "_MEMORY_LIMITS", (str(tmp_path / "limit"), str(tmp_path / "none")))
    assert memory_bytes() == 1000
    (tmp_path / "limit").write_text("max\n")
    assert memory_bytes() >= whole
