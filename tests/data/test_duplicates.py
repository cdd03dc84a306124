from __future__ import annotations

import gzip
import json
import os

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_semi.data.duplicates import find_duplicates, geometry_difference, image_contents, read_content


def write(path, voxels, spacing=(1.0, 1.0, 1.0)):
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))
    return str(path)


@pytest.fixture
def voxels():
    return np.random.default_rng(0).integers(0, 200, (4, 5, 6)).astype(np.int16)


def contents_of(tmp_path, *files):
    return image_contents(
        files,
        raw_dataset_folder=str(tmp_path),
        cache_file=str(tmp_path / "hashes.json"),
        reader_name="SimpleITKIO",
        num_processes=1,
        show_progress_bar=False,
    )


def test_voxels_count_and_neither_compression_nor_integer_type(tmp_path, voxels):
    first = read_content(write(tmp_path / "a.nii.gz", voxels), "SimpleITKIO")
    other_type = read_content(write(tmp_path / "b.nrrd", voxels.astype(np.float64)), "SimpleITKIO")
    assert other_type.digest == first.digest
    changed = voxels.copy()
    changed[0, 0, 0] += 1
    assert read_content(write(tmp_path / "c.nii.gz", changed), "SimpleITKIO").digest != first.digest
    reshaped = voxels.reshape(5, 4, 6)
    assert read_content(write(tmp_path / "d.nii.gz", reshaped), "SimpleITKIO").digest != first.digest


def test_an_unchanged_file_is_read_once(tmp_path, voxels, monkeypatch):
    path = write(tmp_path / "a.nii.gz", voxels)
    first, _ = contents_of(tmp_path, path)
    monkeypatch.setattr("nnunetv2_semi.data.duplicates.read_content", lambda *_: pytest.fail("read again"))
    again, _ = contents_of(tmp_path, path)
    assert again == first


def test_a_changed_file_is_read_again(tmp_path, voxels):
    path = write(tmp_path / "a.nii.gz", voxels)
    first, _ = contents_of(tmp_path, path)
    write(tmp_path / "a.nii.gz", voxels + 1)
    os.utime(path, ns=(0, 12345))
    again, _ = contents_of(tmp_path, path)
    assert again[path].digest != first[path].digest
    assert len(json.loads((tmp_path / "hashes.json").read_text())["files"]) == 1


def test_unreadable_files_are_told_and_not_cached(tmp_path, voxels):
    good = write(tmp_path / "a.nii.gz", voxels)
    truncated = tmp_path / "b.nii.gz"
    truncated.write_bytes(gzip.compress(b"not an image"))
    not_finite = write(tmp_path / "c.nrrd", np.full((3, 3, 3), np.nan, dtype=np.float32))
    contents, unreadable = contents_of(tmp_path, good, str(truncated), not_finite)
    assert list(contents) == [good]
    assert list(unreadable) == [str(truncated), not_finite]
    assert "not finite" in unreadable[not_finite]
    assert list(json.loads((tmp_path / "hashes.json").read_text())["files"]) == ["a.nii.gz"]


def test_duplicates_are_found_by_any_channel_but_not_by_constant_ones(tmp_path, voxels):
    filler = np.zeros_like(voxels)
    labelled = {"lab": [write(tmp_path / "lab_0.nii.gz", voxels), write(tmp_path / "lab_1.nii.gz", filler)]}
    unlabelled = {
        "same": [write(tmp_path / "s_0.nii.gz", voxels + 5), write(tmp_path / "s_1.nii.gz", voxels)],
        "other": [write(tmp_path / "o_0.nii.gz", voxels + 9), write(tmp_path / "o_1.nii.gz", filler)],
        "twin": [write(tmp_path / "t_0.nii.gz", voxels + 9), write(tmp_path / "t_1.nii.gz", filler)],
    }
    files = [file for cases in (labelled, unlabelled) for names in cases.values() for file in names]
    contents, _ = contents_of(tmp_path, *files)
    against_labelled = find_duplicates(unlabelled, contents, labelled)
    assert [(found.case, found.other_case) for found in against_labelled] == [("same", "lab")]
    assert against_labelled[0].file.endswith("s_1.nii.gz") and against_labelled[0].other_file.endswith("lab_0.nii.gz")
    among_themselves = find_duplicates(unlabelled, contents)
    assert [(found.case, found.other_case) for found in among_themselves] == [("twin", "other")]


def test_a_channel_of_other_shape_or_spacing_is_described(tmp_path, voxels):
    first = write(tmp_path / "a.nii.gz", voxels)
    same = write(tmp_path / "b.nii.gz", voxels + 1)
    other_spacing = write(tmp_path / "c.nii.gz", voxels, (1.0, 1.0, 2.0))
    other_shape = write(tmp_path / "d.nii.gz", voxels[:3])
    contents, _ = contents_of(tmp_path, first, same, other_spacing, other_shape)
    assert geometry_difference([first, same], contents) is None
    assert "spacing" in geometry_difference([first, other_spacing], contents)
    assert "shape" in geometry_difference([first, other_shape], contents)
