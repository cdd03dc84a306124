"""The overview picture."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from nnunetv2_semi import pictures
from nnunetv2_semi.pictures import COLOURS, PictureRow, save_overview, slice_through_structures


def test_slice_shows_most_labels_and_then_most_of_the_smallest() -> None:
    truth = np.zeros((5, 8, 8), int)
    truth[0, :6] = 1
    truth[1:4, :3] = 1
    truth[1, 7, 0] = 2
    truth[2, 7, :3] = 2
    truth[3, 7, :2] = 2
    assert slice_through_structures(truth, [1, 2]) == 2


def test_without_a_structure_in_the_truth_the_slice_is_a_predictions(tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    empty = np.zeros((6, 8, 8), int)
    predicted = empty.copy()
    predicted[4, 2:5, 2:5] = 1
    image = np.random.default_rng(0).normal(size=empty.shape)
    drawn = []
    monkeypatch.setattr(pictures, "_draw_labels", lambda axes, segmentation, labels: drawn.append(segmentation))
    row = PictureRow("case", {"T1": image}, {"truth": empty, "control": empty, "Mix": predicted}, {})
    save_overview([row], {"liver": 1}, "title", tmp_path / "picture.png")
    assert [single.sum() for single in drawn] == [0, 0, 9]


def test_outlines_have_the_colours_of_their_structures(tmp_path: Path) -> None:
    truth = np.zeros((3, 20, 20), int)
    truth[1, 3:9, 3:9] = 1
    truth[1, 12:18, 12:18] = 2
    image = np.random.default_rng(0).normal(100, 20, truth.shape)
    empty = np.zeros_like(truth)
    labels = {"liver": 1, "kidney": 2}

    def coloured(segmentations: dict[str, np.ndarray], file: Path) -> list[int]:
        save_overview([PictureRow("case", {"T1": image}, segmentations, {})], labels, "title", file)
        pixels = imread(file)[..., :3]
        # The legend at the bottom has the colours in any case.
        panels = pixels[: int(0.8 * len(pixels))]
        return [int((np.abs(panels - to_rgb(colour)).max(-1) < 0.02).sum()) for colour in COLOURS[:2]]

    assert coloured({"Truth": empty, "Other": empty}, tmp_path / "empty.png") == [0, 0]
    both = coloured({"Truth": truth, "Other": empty}, tmp_path / "both.png")
    twice = coloured({"Truth": truth, "Other": np.where(truth == 1, 1, 0)}, tmp_path / "twice.png")
    assert min(both) > 50
    assert twice[0] > 1.5 * both[0]
    assert twice[1] == both[1]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["both.png", "empty.png", "twice.png"]


def test_maps_of_all_epochs_share_one_range_that_shows_what_is_not_near_one():
    from nnunetv2_semi.training.pictures import _with_common_ranges

    def row(certainty: np.ndarray) -> PictureRow:
        return PictureRow("epoch", {"e^-D": certainty, "image": certainty}, {"truth": certainty > 2}, {})

    low = np.linspace(0.4, 1, 1000).reshape(10, 10, 10)
    first, second = _with_common_ranges([row(np.ones((10, 10, 10))), row(low)], ["e^-D"])
    title = "e^-D, 0.41 to 1"
    assert list(first.images) == list(second.images) == [title, "image"]  # the image stays last
    assert first.ranges[title] == second.ranges[title] == (pytest.approx(0.406, abs=1e-3), 1.0)
    certain, = _with_common_ranges([row(np.ones((10, 10, 10)))], ["e^-D"])
    assert certain.ranges["e^-D, 0.99 to 1"] == (0.99, 1.0)
