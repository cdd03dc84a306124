"""Voxels that are predicted differently are ignored, in the form that nnU-Net wants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_semi.benchmark.self_training.unstable_voxels import stable_labels, with_ignore_label, write_stable_labels

FINAL = np.array([[[0, 1, 2, 2, 0]]])
OTHERS = [np.array([[[0, 1, 1, 2, 0]]]), np.array([[[0, 1, 2, 2, 1]]])]


def test_voxels_where_any_prediction_differs_are_ignored() -> None:
    assert stable_labels(FINAL, OTHERS, 3).tolist() == [[[0, 1, 3, 2, 3]]]
    assert stable_labels(FINAL, [FINAL], 3).tolist() == FINAL.tolist()
    assert stable_labels(FINAL, OTHERS, 255).dtype == np.uint8 and stable_labels(FINAL, OTHERS, 256).max() == 256


@pytest.mark.parametrize("labels, order, ignore", [
    ({"background": 0, "liver": 1, "spleen": 2}, None, 3),
    ({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}, [1, 2, 3], 4),
    ({"background": 0, "liver": 1, "ignore": 2}, None, 2),
])  # fmt: skip
def test_the_ignore_label_is_one_that_nnunet_takes(labels: dict, order: list[int] | None, ignore: int) -> None:
    content = {"labels": labels, "regions_class_order": order, "file_ending": ".nii.gz"}
    changed = with_ignore_label(content)
    manager = LabelManager(changed["labels"], order)
    assert manager.ignore_label == ignore and manager.num_segmentation_heads == LabelManager(
        labels, order).num_segmentation_heads  # fmt: skip
    assert {**changed, "labels": {name: changed["labels"][name] for name in labels}} == content
    assert ("ignore" in content["labels"]) == ("ignore" in labels and ignore == 2)


def test_files_keep_their_geometry_and_the_folder_is_whole_or_absent(tmp_path: Path) -> None:
    for name, labels in (("final", FINAL), ("first", OTHERS[0]), ("second", OTHERS[1])):
        image = sitk.GetImageFromArray(labels.astype(np.uint8))
        image.SetSpacing((0.5, 1.5, 3))
        (tmp_path / name).mkdir()
        sitk.WriteImage(image, str(tmp_path / name / "a.nii.gz"))
    others, out = [tmp_path / "first", tmp_path / "second"], tmp_path / "labels"
    with pytest.raises(RuntimeError):
        write_stable_labels(tmp_path / "final", others, ["a.nii.gz", "missing.nii.gz"], 3, SimpleITKIO, out, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "first", "second"]
    write_stable_labels(tmp_path / "final", others, ["a.nii.gz"], 3, SimpleITKIO, out, 1)
    written = sitk.ReadImage(str(out / "a.nii.gz"))
    assert sitk.GetArrayFromImage(written).tolist() == [[[0, 1, 3, 2, 3]]]
    assert written.GetSpacing() == pytest.approx((0.5, 1.5, 3))
    assert [file.name for file in out.iterdir()] == ["a.nii.gz"]
