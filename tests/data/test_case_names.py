from __future__ import annotations

import os

import pytest

from nnunetv2_semi.data import case_names
from nnunetv2_semi.data.case_names import (
    case_name_mistakes,
    check_case_names_can_be_told_apart,
    folds_case,
    names_that_differ_in_case_only,
)
from nnunetv2_semi.errors import UserError


def test_ordinary_names_are_fine():
    assert case_name_mistakes(["case_1", "a.b", "seg", "x_segment", "dataset"], ".nii.gz", "imagesTr") == []


def test_a_name_that_nnunet_takes_for_a_segmentation_is_refused():
    mistake, = case_name_mistakes(["b", "b_seg"], ".nii.gz", "imagesUn")
    assert "in imagesUn end with _seg: b_seg. " in mistake and "rename them" in mistake


@pytest.mark.parametrize("ending", [".tif", ".TIFF"])
def test_a_tiff_named_as_a_file_beside_predictions_is_refused(ending):
    mistake, = case_name_mistakes(["plans", "b", "summary"], ending, "imagesTr")
    assert "plans (plans.json), summary (summary.json)" in mistake and "Rename" in mistake


def test_names_that_differ_in_case_or_in_how_an_umlaut_is_written_are_found():
    assert names_that_differ_in_case_only(["Case", "case", "other", "f\u00fcr", "fu\u0308r"]) == [
        "Case = case", "fu\u0308r = f\u00fcr"]
    assert names_that_differ_in_case_only(["a", "b"]) == []


def test_they_are_refused_where_the_file_system_folds_case(tmp_path, monkeypatch):
    monkeypatch.setattr(case_names, "folds_case", lambda folder: True)
    with pytest.raises(UserError, match="imagesTr differ only in upper and lower case: Case = case"):
        check_case_names_can_be_told_apart(["case", "Case"], str(tmp_path), "imagesTr")
    check_case_names_can_be_told_apart(["case", "other"], str(tmp_path), "imagesTr")
    monkeypatch.setattr(case_names, "folds_case", lambda folder: False)
    check_case_names_can_be_told_apart(["case", "Case"], str(tmp_path), "imagesTr")


def test_whether_a_folder_folds_case_is_tried_there_or_above_it(tmp_path, monkeypatch):
    (tmp_path / "a").touch()
    expected = os.path.exists(tmp_path / "A")
    assert folds_case(str(tmp_path / "not" / "there")) is expected
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    assert folds_case(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
