from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_semi.data.duplicates import find_duplicates, find_look_alikes
from nnunetv2_semi.data.file_contents import read_image


def write(path, voxels):
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path))
    return str(path)


@pytest.fixture
def voxels():
    return np.random.default_rng(0).integers(0, 200, (4, 5, 6)).astype(np.int16)


def test_duplicates_are_found_by_any_channel_but_not_by_constant_ones(tmp_path, voxels):
    filler = np.zeros_like(voxels)
    labelled = {"lab": [write(tmp_path / "lab_0.nii.gz", voxels), write(tmp_path / "lab_1.nii.gz", filler)]}
    unlabelled = {
        "same": [write(tmp_path / "s_0.nii.gz", voxels + 5), write(tmp_path / "s_1.nii.gz", voxels)],
        "other": [write(tmp_path / "o_0.nii.gz", voxels + 9), write(tmp_path / "o_1.nii.gz", filler)],
        "twin": [write(tmp_path / "t_0.nii.gz", voxels + 9), write(tmp_path / "t_1.nii.gz", filler)],
    }
    files = [file for cases in (labelled, unlabelled) for names in cases.values() for file in names]
    contents = {file: read_image(file, "SimpleITKIO") for file in files}
    against_labelled = find_duplicates(unlabelled, contents, labelled)
    assert [(found.case, found.other_case) for found in against_labelled] == [("same", "lab")]
    assert against_labelled[0].file.endswith("s_1.nii.gz") and against_labelled[0].other_file.endswith("lab_0.nii.gz")
    among_themselves = find_duplicates(unlabelled, contents)
    assert [(found.case, found.other_case) for found in among_themselves] == [("twin", "other")]


def cases_of(tmp_path, **images):
    cases = {case: [write(tmp_path / f"{case}_0000.nii.gz", voxels)] for case, voxels in images.items()}
    return cases, {file: read_image(file, "SimpleITKIO") for files in cases.values() for file in files}


def test_a_changed_copy_of_a_labelled_image_is_found(tmp_path, voxels):
    changed = np.flip(voxels.swapaxes(0, 2), 1) * 3 + 7
    unlabelled, contents = cases_of(tmp_path, copy=changed, other=np.roll(voxels, 2, axis=1), same=voxels)
    labelled, more = cases_of(tmp_path, lab=voxels, empty=np.zeros_like(voxels))
    found = find_look_alikes(unlabelled, {**contents, **more}, labelled)
    assert [(pair.case, pair.other_case) for pair in found] == [("copy", "lab")]  # same has equal voxels: a duplicate
    assert found[0].file.endswith("copy_0000.nii.gz") and found[0].other_file.endswith("lab_0000.nii.gz")


def test_among_themselves_each_pair_is_found_once(tmp_path, voxels):
    cases, contents = cases_of(tmp_path, first=voxels, second=voxels[::-1], third=np.roll(voxels, 1, axis=0))
    assert [(pair.case, pair.other_case) for pair in find_look_alikes(cases, contents)] == [("second", "first")]


def test_the_first_channel_that_is_not_constant_is_compared(tmp_path, voxels):
    filler = write(tmp_path / "filler.nii.gz", np.zeros_like(voxels))
    first, second = write(tmp_path / "a.nii.gz", voxels), write(tmp_path / "b.nii.gz", voxels * 2)
    contents = {file: read_image(file, "SimpleITKIO") for file in (filler, first, second)}
    found = find_look_alikes({"a": [filler, first]}, contents, {"b": [second, filler], "c": [filler]})
    assert [(pair.file, pair.other_file) for pair in found] == [(first, second)]
