from __future__ import annotations

import gzip

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_semi.data.file_integrity import check_file_complete


@pytest.fixture
def image():
    return sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(8, 9, 10)).astype(np.float32))


@pytest.mark.parametrize("ending", ["nii.gz", "nii", "nrrd"])
def test_a_whole_file_passes(tmp_path, image, ending):
    path = tmp_path / f"a.{ending}"
    sitk.WriteImage(image, str(path))
    assert check_file_complete(str(path)) is None


def test_what_readers_put_up_with_passes(tmp_path, image):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(sitk_bytes(tmp_path, image)) + b"more")
    assert check_file_complete(str(path)) is None
    path.write_bytes(sitk_bytes(tmp_path, image))  # not compressed
    assert check_file_complete(str(path)) is None
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(OSError, match="cut off"):
        check_file_complete(str(path))


@pytest.mark.parametrize("ending", ["nii.gz", "nii"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_truncated_nifti_is_refused(tmp_path, image, ending, kept):
    path = tmp_path / f"a.{ending}"
    sitk.WriteImage(image, str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises((OSError, EOFError, nibabel.filebasedimages.ImageFileError)):
        check_file_complete(str(path))


def test_a_whole_stream_with_too_little_in_it_is_refused(tmp_path, image):
    path = tmp_path / "a.nii"
    sitk.WriteImage(image, str(path))
    cut = tmp_path / "b.nii.gz"
    cut.write_bytes(gzip.compress(path.read_bytes()[:-4]))
    with pytest.raises(OSError, match="cut off"):
        check_file_complete(str(cut))


def test_a_flipped_byte_in_the_stream_is_refused(tmp_path, image):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(sitk_bytes(tmp_path, image), compresslevel=0))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(OSError, match="CRC"):
        check_file_complete(str(path))


def sitk_bytes(folder, image):
    sitk.WriteImage(image, str(folder / "plain.nii"))
    return (folder / "plain.nii").read_bytes()


def test_the_second_version_of_the_format_is_understood(tmp_path):
    path = tmp_path / "a.nii.gz"
    voxels = np.random.default_rng(0).normal(size=(8, 9, 10)).astype(np.float32)
    nibabel.save(nibabel.Nifti2Image(voxels, np.eye(4)), path)
    assert check_file_complete(str(path)) is None
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-4]))
    with pytest.raises(OSError, match="cut off"):
        check_file_complete(str(path))


def test_a_file_that_is_not_there_or_a_link_to_none_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        check_file_complete(str(tmp_path / "gone.nii.gz"))
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    with pytest.raises(FileNotFoundError, match="a link to .*gone.nii.gz, which is not there"):
        check_file_complete(str(tmp_path / "link.nii.gz"))


def test_an_orientation_that_nibabel_refuses_and_itk_reads_is_no_damage(tmp_path, image):
    path = tmp_path / "a.nii"
    sitk.WriteImage(image, str(path))
    header = bytearray(path.read_bytes())
    header[252:256] = (1).to_bytes(2, "little") + (0).to_bytes(2, "little")  # the quaternion alone
    header[256:268] = np.array([1.000001, 0, 0], "<f4").tobytes()  # a little longer than 1
    path.write_bytes(bytes(header))
    with pytest.raises(ValueError, match="w2 should be positive"):
        nibabel.load(path)
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(path))).shape == (10, 9, 8)[::-1]
    assert check_file_complete(str(path)) is None


def test_a_header_that_is_none_is_refused(tmp_path):
    path = tmp_path / "a.nii"
    path.write_bytes(b"x" * 2000)
    with pytest.raises(nibabel.filebasedimages.ImageFileError, match="no valid NIfTI header"):
        check_file_complete(str(path))
