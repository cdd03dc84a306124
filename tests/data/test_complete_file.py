from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_semi.data.complete_file import check_file_complete


def write_volume(path: Path) -> Path:
    voxels = np.random.default_rng(0).normal(size=(12, 14, 16)).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path))
    return path


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
@pytest.mark.parametrize("lost_bytes", [9, 30, 5000])
def test_a_file_that_was_not_written_to_its_end_is_refused(tmp_path: Path, ending: str, lost_bytes: int) -> None:
    path = write_volume(tmp_path / f"image{ending}")
    check_file_complete(str(path))
    os.truncate(path, path.stat().st_size - lost_bytes)
    with pytest.raises(ValueError, match="truncated"):
        check_file_complete(str(path))


def test_damaged_compressed_data_are_refused(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "image.nii.gz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="damaged"):
        check_file_complete(str(path))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        check_file_complete(str(path))
