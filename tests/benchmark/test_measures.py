"""The metrics of predictions: against values worked out by hand, and against second libraries."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import medpy.metric.binary
import numpy as np
import pytest
import SimpleITK as sitk
import surface_distance
from scipy.ndimage import binary_erosion, gaussian_filter
from skimage import io

from nnunetv2_semi.benchmark.report.measures import METRICS, measure_runs, measures_of_masks, reader_name
from nnunetv2_semi.benchmark.report.runs import PredictedRun
from nnunetv2_semi.errors import UserError

LABELS = {"background": 0, "liver": 1, "kidney": 2}
SPACING = (3.0, 1.0, 0.5)  # mm along Z, Y, X


def box(shape: tuple[int, ...], *ranges: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*limits) for limits in ranges)] = True
    return mask


def write_volume(array: np.ndarray, file: Path, spacing: tuple[float, ...] = SPACING, origin: float = 0.0) -> None:
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    image.SetSpacing(spacing[::-1])
    image.SetOrigin([origin] * array.ndim)
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))


def run_in(folder: Path, labels: Mapping[str, object] = LABELS, ending: str = ".nii.gz") -> PredictedRun:
    """A run whose truth and predictions lie in ``folder``."""
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ending}))
    return PredictedRun("Dataset001_Test", "Test", 4, "Ours", "method", 0, "all", folder / "predicted",
                        folder / "labelsTs", None, folder / "dataset.json")  # fmt: skip


def measured(folder: Path, truth: np.ndarray, prediction: np.ndarray, labels: Mapping[str, object] = LABELS):
    """Rows of one case, by label."""
    write_volume(truth, folder / "labelsTs" / "a.nii.gz")
    write_volume(prediction, folder / "predicted" / "a.nii.gz")
    return measure_runs([run_in(folder, labels)], 1.0, num_processes=1).set_index("label")


def smooth_masks(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Two overlapping random shapes."""
    noise = np.random.default_rng(seed).normal(size=(3, *shape))
    base, first, second = (gaussian_filter(volume, 2) for volume in noise)
    threshold = 0.4 * base.std()
    return base + 0.4 * first > threshold, base + 0.4 * second > threshold


def test_shifted_bar_has_the_values_worked_out_by_hand() -> None:
    # A bar of one voxel in Z and Y and of 4 voxels in X, each 0.5 mm, and the same bar shifted by 2 voxels. All voxels
    # are surface. Distances to the other bar: 1 mm, 0.5 mm, 0, 0, in both directions.
    # 95th percentile of (0, 0, 0.5, 1): at position 0.95 * 3 = 2.85 of the sorted values, 0.5 + 0.85 * 0.5 = 0.925 mm.
    # Mean of both directions: (1 + 0.5) / 4 = 0.375 mm. 2 of 4 and 4 voxels overlap.
    truth = box((5, 7, 12), (2, 3), (3, 4), (3, 7))
    measures = measures_of_masks(truth, np.roll(truth, 2, axis=2), SPACING, 1.0)
    assert measures["hd95_mm"] == pytest.approx(0.925)
    assert measures["asd_mm"] == pytest.approx(0.375)
    assert measures["dice"] == pytest.approx(2 * 2 / 8)
    assert measures["jaccard"] == pytest.approx(2 / 6)
    assert not measures["truth_empty"] and not measures["prediction_empty"]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shift_of_a_sheet_is_measured_with_the_spacing_of_its_axis(axis: int) -> None:
    # A sheet one voxel thick through the whole image, shifted by 3 voxels across: every voxel of either is surface, and
    # 3 voxels away from the other.
    shape = (12, 12, 12)
    truth = box(shape, *[(4, 5) if other == axis else (0, 12) for other in range(3)])
    distance = 3 * SPACING[axis]
    measures = measures_of_masks(truth, np.roll(truth, 3, axis), SPACING, 1.0)
    assert measures["hd95_mm"] == pytest.approx(distance)
    assert measures["asd_mm"] == pytest.approx(distance)
    assert measures["dice"] == measures["jaccard"] == 0


def test_nsd_counts_surface_by_its_length_within_the_tolerance() -> None:
    # In two dimensions, pixels of 1 mm: a square of 8 x 8, and one that is 2 mm wider to the right. The elements of
    # contours lie between four pixels: 1 mm long on a side, sqrt(2) / 2 mm at a corner.
    truth = box((20, 20), (5, 13), (5, 13))
    prediction = box((20, 20), (5, 13), (5, 15))
    nsd = {t: float(measures_of_masks(truth, prediction, (1.0, 1.0), t)["nsd"]) for t in (0.0, 1.0, 2.0)}
    corner = math.sqrt(0.5)
    # Truth: 4 corners and 4 sides of 7 elements. Prediction: 4 corners, 2 sides of 7 and 2 of 9.
    total = (4 * corner + 28) + (4 * corner + 32)
    # No tolerance. Truth: all but the 7 elements of its right side; its right corners lie where the prediction has
    # elements of its upper and lower side. Prediction: left corners, left side, and above and below the 7 elements of
    # the truth's sides and the one at its corner.
    exact = (4 * corner + 21) + (2 * corner + 7 + 2 * 8)
    # 1 mm. Truth: the first and last element of the right side come in. Prediction: the elements right of the truth's
    # corners; its own corners are 2 mm away.
    one = exact + 2 + 2
    assert nsd[0.0] == pytest.approx(exact / total, abs=1e-5)
    assert nsd[1.0] == pytest.approx(one / total, abs=1e-5)
    assert nsd[2.0] == pytest.approx(1)


def test_tolerance_of_whole_voxels_holds_for_spacings_of_32_bit_headers() -> None:
    spacing = [float(np.float32(0.3))] * 2
    truth = box((30, 30), (5, 15), (5, 15))
    assert measures_of_masks(truth, box((30, 30), (5, 15), (5, 25)), spacing, 3.0)["nsd"] == pytest.approx(1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape, spacing", [((14, 18, 20), SPACING), ((14, 18, 20), (1.0, 1.0, 1.0)),
                                            ((30, 40), (0.7, 1.3))])  # fmt: skip
def test_metrics_equal_those_of_second_libraries(seed: int, shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    truth, prediction = smooth_masks(seed, shape)
    measures = measures_of_masks(truth, prediction, spacing, 1.0)
    intersection = np.logical_and(truth, prediction).sum()
    assert measures["dice"] == pytest.approx(2 * intersection / (truth.sum() + prediction.sum()))
    assert measures["jaccard"] == pytest.approx(intersection / np.logical_or(truth, prediction).sum())

    # medpy has each direction of the mean; of the percentile, the distances that it pools.
    directed = getattr(medpy.metric.binary, "__surface_distances")
    there, back = directed(prediction, truth, spacing), directed(truth, prediction, spacing)
    assert measures["hd95_mm"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-5)
    size_there, size_back = (int((mask & ~binary_erosion(mask)).sum()) for mask in (prediction, truth))
    pooled = size_there * medpy.metric.binary.asd(prediction, truth, spacing) + size_back * medpy.metric.binary.asd(
        truth, prediction, spacing
    )
    assert measures["asd_mm"] == pytest.approx(pooled / (size_there + size_back), rel=1e-5)

    surfaces = surface_distance.compute_surface_distances(truth, prediction, spacing)
    expected = surface_distance.compute_surface_dice_at_tolerance(surfaces, 1.0)
    assert measures["nsd"] == pytest.approx(expected, rel=1e-5)


def test_cropping_does_not_change_structures_at_the_border_of_the_image() -> None:
    truth, prediction = smooth_masks(0, (14, 18, 20))
    assert truth[0].any() and truth[:, 0].any() and truth[..., -1].any()
    small = measures_of_masks(truth, prediction, SPACING, 1.0)
    large = measures_of_masks(np.pad(truth, 7), np.pad(prediction, 7), SPACING, 1.0)
    assert small == pytest.approx(large)


def test_empty_structures_count_as_defined(tmp_path: Path) -> None:
    shape = (4, 6, 10)
    truth = box(shape, (1, 3), (1, 4), (2, 6)).astype(np.uint8)
    diagonal = math.sqrt((4 * 3.0) ** 2 + (6 * 1.0) ** 2 + (10 * 0.5) ** 2)
    one_empty = {"dice": 0, "jaccard": 0, "nsd": 0, "hd95_mm": diagonal, "asd_mm": diagonal}

    rows = measured(tmp_path, truth, np.zeros(shape))
    assert rows.loc["kidney", list(METRICS)].to_dict() == {"dice": 1, "jaccard": 1, "nsd": 1, "hd95_mm": 0, "asd_mm": 0}
    assert rows.loc["kidney", ["truth_empty", "prediction_empty"]].tolist() == [True, True]
    assert rows.loc["liver", list(METRICS)].to_dict() == pytest.approx(one_empty)
    assert rows.loc["liver", ["truth_empty", "prediction_empty"]].tolist() == [False, True]

    rows = measured(tmp_path, np.zeros(shape), truth)
    assert rows.loc["liver", list(METRICS)].to_dict() == pytest.approx(one_empty)
    assert rows.loc["liver", ["truth_empty", "prediction_empty"]].tolist() == [True, False]


def test_regions_are_measured_as_unions_of_their_labels(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    truth, prediction = np.zeros((2, 3, 8, 8), np.uint8)
    truth[1, 2:6, 2:6] = 1
    truth[1, 2:4, 2:4] = 2
    prediction[1, 2:6, 2:6] = 2
    rows = measured(tmp_path, truth, prediction, labels)
    assert rows.index.tolist() == ["whole", "core"]
    assert rows["dice"].tolist() == pytest.approx([1, 2 * 4 / (4 + 16)])


def test_ignored_voxels_count_on_neither_side(tmp_path: Path) -> None:
    labels = {**LABELS, "ignore": 3}
    truth = np.zeros((3, 8, 8), np.uint8)
    truth[1, 2:6, 2:5] = 1
    truth[1, :, 5:] = 3
    prediction = np.zeros_like(truth)
    prediction[1, 2:6, 2:8] = 1
    rows = measured(tmp_path, truth, prediction, labels)
    assert rows.index.tolist() == ["liver", "kidney"]
    assert rows.loc["liver", ["dice", "hd95_mm", "nsd"]].tolist() == [1, 0, 1]
    prediction[:] = 0
    prediction[1, 2:6, 5:8] = 1
    assert measured(tmp_path, truth, prediction, labels).loc["liver", "prediction_empty"]


def test_png_images_are_measured_in_pixels(tmp_path: Path) -> None:
    run = run_in(tmp_path, ending=".png")
    for folder, shift in (("labelsTs", 0), ("predicted", 3)):
        (tmp_path / folder).mkdir()
        image = np.zeros((10, 12), np.uint8)
        image[:, 4 + shift] = 1
        io.imsave(tmp_path / folder / "a.png", image, check_contrast=False)
    rows = measure_runs([run], 1.0, num_processes=1).set_index("label")
    assert rows.loc["liver", ["hd95_mm", "asd_mm"]].tolist() == [3, 3]


@pytest.mark.parametrize("beside", ["labelsTs", "predicted"])
def test_tif_volumes_are_measured_with_the_spacing_beside_truth_or_prediction(tmp_path: Path, beside: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    run = run_in(tmp_path, ending=".tif")
    for folder, shift in (("labelsTs", 0), ("predicted", 2)):
        (tmp_path / folder).mkdir()
        volume = np.zeros((8, 10, 12), np.uint8)
        volume[2 + shift] = 1
        tifffile.imwrite(tmp_path / folder / "a.tif", volume)
    (tmp_path / beside / "a.json").write_text(json.dumps({"spacing": [2.5, 1, 1]}))
    assert measure_runs([run], 1.0, num_processes=1).set_index("label").loc["liver", "asd_mm"] == 5


def test_rows_follow_runs_cases_and_labels_whatever_process_is_first(tmp_path: Path) -> None:
    volume = box((3, 4, 5), (1, 2), (1, 3), (1, 3))
    for name in ("b", "a"):
        write_volume(volume, tmp_path / "labelsTs" / f"{name}.nii.gz")
        write_volume(volume, tmp_path / "predicted" / f"{name}.nii.gz")
    run = run_in(tmp_path)
    table = measure_runs([run, run], 1.0, num_processes=2)
    assert table["case"].tolist() == ["a", "a", "b", "b"] * 2
    assert table["label"].tolist() == ["liver", "kidney"] * 4
    assert (table["dice"] == 1).all()


def test_missing_predictions_are_told_in_one_message(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_volume(np.zeros((3, 4, 5)), tmp_path / "labelsTs" / f"{name}.nii.gz")
    run = run_in(tmp_path)
    expected = (
        r"2 run\(s\) lack test cases: Dataset001_Test, Ours, fold all, seed 0, 2 prediction\(s\) missing: a, b "
        r"\(in .*predicted\); Dataset001_Test, Ours, fold all, seed 1, 2 .*'nnunetv2_semi benchmark run' predicts them"
    )
    with pytest.raises(UserError, match=expected):
        measure_runs([run, replace(run, seed=1)], 1.0, num_processes=1)


@pytest.mark.parametrize("change, message", [
    ({"array": np.zeros((3, 4, 6))}, r"predicted.a.nii.gz has \(3, 4, 6\) voxels, its truth \(3, 4, 5\)"),
    ({"origin": 2.0}, "predicted.a.nii.gz has another spacing, origin or direction"),
    ({"spacing": (3.0, 1.0, 1.0)}, "predicted.a.nii.gz has another spacing, origin or direction"),
    ({"array": np.full((3, 4, 5), 255)}, r"predicted.a.nii.gz holds the label\(s\) 255"),
])  # fmt: skip
def test_predictions_that_do_not_belong_to_the_truth_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    write_volume(np.zeros((3, 4, 5)), tmp_path / "labelsTs" / "a.nii.gz")
    write_volume(**{"array": np.zeros((3, 4, 5)), "file": tmp_path / "predicted" / "a.nii.gz", **change})
    with pytest.raises(UserError, match=message):
        measure_runs([run_in(tmp_path)], 1.0, num_processes=1)


def test_unreadable_prediction_is_named(tmp_path: Path) -> None:
    write_volume(np.zeros((3, 4, 5)), tmp_path / "labelsTs" / "a.nii.gz")
    (tmp_path / "predicted").mkdir()
    (tmp_path / "predicted" / "a.nii.gz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="predicted.a.nii.gz cannot be read"):
        measure_runs([run_in(tmp_path)], 1.0, num_processes=1)


def test_folder_without_truth_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no files \*.nii.gz in .*labelsTs"):
        measure_runs([run_in(tmp_path)], 1.0, num_processes=1)


def test_a_file_that_nnunet_cannot_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nnU-Net has no reader for .*a.dcm"):
        reader_name(run_in(tmp_path, ending=".dcm"), tmp_path / "a.dcm")
