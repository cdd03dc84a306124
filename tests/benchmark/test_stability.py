"""How stable a prediction is: worked out by hand; which cases are kept."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_semi.benchmark.self_training.stability import (
    mean_iou,
    most_stable,
    read_scores,
    stability,
    write_scores,
)

LABELS = [[1], [2]]
# 1: 4 voxels and 4 voxels, 2 in both: 2 / 6. 2: 2 and 3, 2 in both: 2 / 3.
FINAL = np.array([[1, 1, 1, 1, 0, 0, 2, 2, 0, 0]])
SNAPSHOT = np.array([[0, 0, 1, 1, 1, 1, 2, 2, 2, 0]])


def test_mean_iou_is_that_of_the_structures_without_background() -> None:
    assert mean_iou(FINAL, SNAPSHOT, LABELS) == pytest.approx((2 / 6 + 2 / 3) / 2)
    assert mean_iou(SNAPSHOT, FINAL, LABELS) == pytest.approx((2 / 6 + 2 / 3) / 2)
    assert mean_iou(FINAL, FINAL, LABELS) == 1


def test_structures_in_neither_do_not_count_and_those_in_one_count_as_0() -> None:
    assert mean_iou(FINAL, SNAPSHOT, [*LABELS, [3]]) == mean_iou(FINAL, SNAPSHOT, LABELS)
    without_2 = np.where(SNAPSHOT == 2, 0, SNAPSHOT)
    assert mean_iou(FINAL, without_2, LABELS) == pytest.approx((2 / 6 + 0) / 2)
    assert math.isnan(mean_iou(0 * FINAL, 0 * FINAL, LABELS))


def test_regions_are_unions_of_their_labels() -> None:
    # Whole: 6 and 7 voxels, 4 of the final ones (2 of either label) are in both: 4 / 9. Core: 2 / 3.
    assert mean_iou(FINAL, SNAPSHOT, [[1, 2], [2]]) == pytest.approx((4 / 9 + 2 / 3) / 2)
    # Labels that change within a region leave it as it is.
    assert mean_iou(FINAL, np.where(FINAL == 2, 1, FINAL), [[1, 2]]) == 1


def test_volumes_are_compared_voxel_by_voxel() -> None:
    random = np.random.default_rng(0)
    first, second = random.integers(0, 4, (2, 5, 6, 7))
    expected = [np.mean([((first == label) & (second == label)).sum() / ((first == label) | (second == label)).sum()
                         for label in (1, 3)])]  # fmt: skip
    assert mean_iou(first.astype(np.float32), second, [[1], [3]]) == pytest.approx(expected[0])


def test_stability_is_the_mean_over_snapshots() -> None:
    one = (2 / 6 + 2 / 3) / 2
    assert stability(FINAL, [SNAPSHOT], LABELS) == pytest.approx(one)
    assert stability(FINAL, [SNAPSHOT, FINAL, 0 * FINAL], LABELS) == pytest.approx((one + 1 + 0) / 3)
    assert stability(0 * FINAL, [SNAPSHOT], LABELS) is None
    assert stability(0 * FINAL, [0 * FINAL], LABELS) is None


@pytest.mark.parametrize("keep, kept", [(0.01, "b"), (0.4, "bd"), (0.5, "bda"), (0.7, "bdac"), (1, "bdac")])
def test_the_most_stable_are_kept_and_empty_ones_never(keep: float, kept: str) -> None:
    scores = {"c": 0.1, "a": 0.5, "e": None, "b": 0.9, "d": 0.5 + 1e-9}
    assert most_stable(scores, keep) == list(kept)
    assert most_stable({"e": None}, keep) == []


def test_equally_stable_cases_are_kept_by_name() -> None:
    assert most_stable({"z": 0.5, "a": 0.5, "m": 0.5}, 0.67) == ["a", "m"]


def test_scores_are_written_sorted_and_read_as_they_were(tmp_path: Path) -> None:
    scores = {"a": 1 / 3, "b": None, "c,d": 0.9}
    write_scores(tmp_path / "new" / "table.csv", scores, ["c,d"])
    assert read_scores(tmp_path / "new" / "table.csv") == scores
    assert (tmp_path / "new" / "table.csv").read_text().split() == [
        "case,stability,kept", '"c,d",0.9,1', "a,0.3333333333333333,0", "b,,0"]  # fmt: skip
