from __future__ import annotations

import gzip
import json
import os

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_semi.data.file_contents import file_contents, geometry_difference, read_image, read_label


def write(path, voxels, spacing=(1.0, 1.0, 1.0)):
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))
    return str(path)


@pytest.fixture
def voxels():
    return np.random.default_rng(0).integers(0, 200, (4, 5, 6)).astype(np.int16)


def contents_of(tmp_path, *files):
    return file_contents(
        files,
        raw_dataset_folder=str(tmp_path),
        cache_folder=str(tmp_path),
        reader_name="SimpleITKIO",
        num_processes=1,
        show_progress_bar=False,
    )


def test_voxels_count_and_neither_compression_nor_integer_type(tmp_path, voxels):
    first = read_image(write(tmp_path / "a.nii.gz", voxels), "SimpleITKIO")
    other_type = read_image(write(tmp_path / "b.nrrd", voxels.astype(np.float64)), "SimpleITKIO")
    assert other_type.digest == first.digest
    changed = voxels.copy()
    changed[0, 0, 0] += 1
    assert read_image(write(tmp_path / "c.nii.gz", changed), "SimpleITKIO").digest != first.digest
    reshaped = voxels.reshape(5, 4, 6)
    assert read_image(write(tmp_path / "d.nii.gz", reshaped), "SimpleITKIO").digest != first.digest


def test_an_unchanged_file_is_read_once(tmp_path, voxels, monkeypatch):
    path = write(tmp_path / "a.nii.gz", voxels)
    first, _ = contents_of(tmp_path, path)
    monkeypatch.setattr("nnunetv2_semi.data.file_contents.read_image", lambda *_: pytest.fail("read again"))
    again, _ = contents_of(tmp_path, path)
    assert again == first


def test_a_changed_file_is_read_again(tmp_path, voxels):
    path = write(tmp_path / "a.nii.gz", voxels)
    first, _ = contents_of(tmp_path, path)
    write(tmp_path / "a.nii.gz", voxels + 1)
    os.utime(path, ns=(0, 12345))
    again, _ = contents_of(tmp_path, path)
    assert again[path].digest != first[path].digest
    assert len(json.loads((tmp_path / "semi_content_hashes.json").read_text())["files"]) == 1


def test_unreadable_files_are_told_and_not_cached(tmp_path, voxels):
    good = write(tmp_path / "a.nii.gz", voxels)
    truncated = tmp_path / "b.nii.gz"
    truncated.write_bytes(gzip.compress(b"not an image"))
    not_finite = write(tmp_path / "c.nrrd", np.full((3, 3, 3), np.nan, dtype=np.float32))
    contents, unreadable = contents_of(tmp_path, good, str(truncated), not_finite)
    assert list(contents) == [good]
    assert list(unreadable) == [str(truncated), not_finite]
    assert "not finite" in unreadable[not_finite]
    assert list(json.loads((tmp_path / "semi_content_hashes.json").read_text())["files"]) == ["a.nii.gz"]


def test_a_channel_of_other_shape_or_spacing_is_described(tmp_path, voxels):
    first = write(tmp_path / "a.nii.gz", voxels)
    same = write(tmp_path / "b.nii.gz", voxels + 1)
    other_spacing = write(tmp_path / "c.nii.gz", voxels, (1.0, 1.0, 2.0))
    other_shape = write(tmp_path / "d.nii.gz", voxels[:3])
    contents, _ = contents_of(tmp_path, first, same, other_spacing, other_shape)
    assert geometry_difference([first, same], contents) is None
    assert "spacing" in geometry_difference([first, other_spacing], contents)
    assert "shape" in geometry_difference([first, other_shape], contents)


def test_an_image_has_intensities_and_a_label_its_values(tmp_path, voxels):
    image = read_image(write(tmp_path / "a.nii.gz", voxels), "SimpleITKIO")
    assert image.intensities == (voxels.min(), np.median(voxels), voxels.max())
    assert image.values == () and image.thumbnail and not image.constant
    label = read_label(write(tmp_path / "b.nii.gz", (voxels > 100).astype(np.uint8)), "SimpleITKIO")
    assert label.values == (0.0, 1.0) and label.intensities == () and label.thumbnail == ""
    assert label.shape == image.shape and label.grid == image.grid


def test_without_a_cache_folder_files_are_read_and_nothing_is_written(tmp_path, voxels):
    path = write(tmp_path / "a.nii.gz", voxels)
    contents, unreadable = file_contents(
        [path], cache_folder=None, raw_dataset_folder=str(tmp_path), reader_name="SimpleITKIO", num_processes=1,
        show_progress_bar=False, report=pytest.fail,
    )  # fmt: skip
    assert list(contents) == [path] and not unreadable
    assert os.listdir(tmp_path) == ["a.nii.gz"]
