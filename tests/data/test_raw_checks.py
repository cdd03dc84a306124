"""What is refused before an image is read, on the way that planners, preprocessor and trainers share."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_semi.data import case_names
from nnunetv2_semi.data.preprocessing import prepare_unlabelled
from nnunetv2_semi.data.raw_checks import check_case_names
from nnunetv2_semi.errors import UserError


def check(tiny):
    return check_case_names(str(tiny.raw_folder), str(tiny.preprocessed_folder), tiny.dataset_json)


def prepare(tiny, **options):
    return prepare_unlabelled(*tiny.managers(), tiny.dataset_json, num_processes=1, show_progress_bar=False, **options)


def unlabelled_file(tiny, channel=0):
    return tiny.raw_folder / "imagesUn" / f"un_b_{channel:04d}.nii.gz"


def test_names_that_are_fine_give_the_unlabelled_cases(tiny):
    assert list(check(tiny)) == ["un_a", "un_b", "un_c"]


@pytest.mark.parametrize("folder", ["imagesTr", "imagesUn"])
def test_names_that_collide_are_refused_for_labelled_and_unlabelled_cases(tiny, folder):
    (tiny.add_labelled if folder == "imagesTr" else tiny.add_unlabelled)("x_seg", 5)
    with pytest.raises(UserError, match=f"in {folder} end with _seg: x_seg"):
        check(tiny)


@pytest.mark.parametrize("folder", ["imagesTr", "imagesUn"])
def test_names_that_differ_in_case_only_are_refused_where_they_are_one_file(tiny, monkeypatch, folder):
    monkeypatch.setattr(case_names, "folds_case", lambda tried: tried == str(tiny.preprocessed_folder))
    (tiny.add_labelled if folder == "imagesTr" else tiny.add_unlabelled)({"imagesTr": "LAB_a"}.get(folder, "UN_a"), 5)
    with pytest.raises(UserError, match=f"in {folder} differ only in upper and lower case: (LAB_a = lab|UN_a = un)_a"):
        check(tiny)


def test_a_broken_link_of_a_labelled_case_is_refused(tiny):
    path = tiny.raw_folder / "imagesTr" / "lab_a_0001.nii.gz"
    path.unlink()
    path.symlink_to("gone.nii.gz")
    with pytest.raises(UserError, match=r"lab_a_0001\.nii\.gz -> gone\.nii\.gz"):
        check(tiny)


def test_a_splits_file_of_another_form_is_refused(tiny):
    (tiny.preprocessed_folder / "splits_final.json").write_text(json.dumps({"train": ["lab_a"]}))
    with pytest.raises(UserError, match=r"splits_final\.json holds no list of folds"):
        check(tiny)


def test_a_broken_link_of_an_unlabelled_case_is_named_or_skipped(tiny):
    unlabelled_file(tiny).unlink()
    unlabelled_file(tiny).symlink_to("gone.nii.gz")
    with pytest.raises(UserError, match=r"un_b_0000\.nii\.gz"):
        prepare(tiny)
    lines: list[str] = []
    cases = prepare(tiny, skip_unreadable=True, report=lines.append)
    assert cases.identifiers == ["un_a", "un_c"] and cases.skipped == ["un_b"]
    assert any("left out" in line and "un_b_0000.nii.gz" in line for line in lines)


def test_channels_whose_spacing_nnunet_takes_for_the_same_are_preprocessed(tiny):
    image = sitk.ReadImage(str(unlabelled_file(tiny, 1)))
    image.SetSpacing((1.000002, 1.0, 1.0))
    sitk.WriteImage(image, str(unlabelled_file(tiny, 1)))
    assert prepare(tiny, report=lambda line: None).identifiers == ["un_a", "un_b", "un_c"]


@pytest.mark.parametrize("what", ["origin", "direction"])
@pytest.mark.parametrize("case", ["imagesTr/lab_a", "imagesUn/un_b"])
def test_channels_that_lie_elsewhere_are_refused(tiny, what, case):
    path, name = str(tiny.raw_folder / f"{case}_0001.nii.gz"), case.split("/")[1]
    image = sitk.ReadImage(path)
    if what == "origin":
        image.SetOrigin((0.0, 0.0, 7.0))
    else:
        image.SetDirection(np.diag([-1.0, 1.0, 1.0]).ravel().tolist())
    sitk.WriteImage(image, path)
    with pytest.raises(UserError, match=rf"{name} \({what} .* of {name}_0001\.nii\.gz differs from .* of {name}_0000"):
        prepare(tiny, report=lambda line: None)
