"""`nnunetv2_semi predict`; nnUNetv2_predict is replaced by a command that says what it was given."""

from __future__ import annotations

import gzip
import json
import shutil
import stat
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile

from nnunetv2_semi import cli
from nnunetv2_semi.commands import predict


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three cases of two channels."""
    folder = tmp_path / "imagesTs"
    folder.mkdir()
    for case in "abc":
        for channel in range(2):
            voxels = np.random.default_rng(channel).integers(0, 9, (3, 4, 5)).astype(np.int16)
            sitk.WriteImage(sitk.GetImageFromArray(voxels), str(folder / f"{case}_{channel:04d}.nii.gz"))
    return folder


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What nnUNetv2_predict was told: its arguments, and the files that its folder holds."""
    answer, command = tmp_path / "told.json", tmp_path / "nnUNetv2_predict"
    command.write_text(f"#!{sys.executable}\nimport json, os, sys\n"
                       f"json.dump([sys.argv[1:], sorted(os.listdir(sys.argv[2]))], open({str(answer)!r}, 'w'))\n"
                       "sys.exit(3 if '--fail' in sys.argv else 0)\n")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(predict, "command_path", lambda name: str(command.with_name(name)))
    return answer


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])


def test_a_healthy_folder_and_all_options_go_to_nnunet(images: Path, told: Path) -> None:
    options = ["-o", "out", "-d", "7", "-device", "cpu", "-f", "0", "1", "--disable_tta"]
    assert cli.main(["predict", "-i", str(images), *options]) == 0
    names = sorted(file.name for file in images.iterdir())
    assert json.loads(told.read_text()) == [["-i", str(images), *options], names]


def test_a_damaged_case_is_named_and_the_others_are_predicted(
    images: Path, told: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(images / "b_0001.nii.gz")
    assert cli.main(["predict", "-d", "7", "-i", str(images), "-o", "out"]) == 1
    assert json.loads(told.read_text())[1] == ["a_0000.nii.gz", "a_0001.nii.gz", "c_0000.nii.gz", "c_0001.nii.gz"]
    output = capsys.readouterr().out
    assert f"LEFT OUT: case b, since {images / 'b_0001.nii.gz'} cannot be read: EOFError: the file is trunc" in output
    assert output.endswith("1 case(s) were left out: b. Replace their images and start again with "
                           "--continue_prediction.\n")


def test_the_models_reader_decides_which_images_can_be_read(
    images: Path, told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nibabel reads a sheared image, ITK, which nnUNetv2_predict mostly uses, does not."""
    sheared = np.eye(4)
    sheared[0, 1] = 0.3
    nibabel.save(nibabel.Nifti1Image(np.ones((5, 4, 3), np.int16), sheared), images / "b_0000.nii.gz")
    model = tmp_path / "results" / "Dataset007_Mine" / "nnUNetTrainer__Plans__2d"
    model.mkdir(parents=True)
    monkeypatch.setattr("nnunetv2.utilities.file_path_utilities.nnUNet_results", str(tmp_path / "results"))
    options = ["-i", str(images), "-d", "Dataset007_Mine", "-p", "Plans", "-c", "2d", "-o", "out"]
    for reader, status in (("SimpleITKIO", 1), ("NibabelIO", 0)):
        (model / "plans.json").write_text(json.dumps({"image_reader_writer": reader}))
        assert cli.main(["predict", *options]) == status
        assert ("b_0000.nii.gz" in json.loads(told.read_text())[1]) == (status == 0)


def test_where_the_system_permits_no_links_images_are_copied(
    images: Path, told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(predict.os, "symlink", refuse)
    truncate(images / "b_0001.nii.gz")
    assert cli.main(["predict", "-i", str(images), "-o", "out"]) == 1
    assert json.loads(told.read_text())[1] == ["a_0000.nii.gz", "a_0001.nii.gz", "c_0000.nii.gz", "c_0001.nii.gz"]


def test_voxels_that_are_no_numbers_count_as_damage(tmp_path: Path, told: Path) -> None:
    for case, value in (("a", np.nan), ("b", 1)):
        voxels = np.full((3, 4, 5), value, np.float32)
        sitk.WriteImage(sitk.GetImageFromArray(voxels), str(tmp_path / f"{case}_0000.nrrd"))
    assert cli.main(["predict", "-i", str(tmp_path)]) == 1
    left = json.loads(told.read_text())[1]
    assert "b_0000.nrrd" in left and "a_0000.nrrd" not in left


def test_companion_files_go_with_their_case(tmp_path: Path, told: Path) -> None:
    for case in "ab":
        tifffile.imwrite(tmp_path / f"{case}_0000.tif", np.zeros((3, 8, 9), np.uint8))
        (tmp_path / f"{case}.json").write_text("{}")
    (tmp_path / "a_0000.tif").write_bytes(b"II*")
    assert cli.main(["predict", "-i", str(tmp_path)]) == 1
    left = json.loads(told.read_text())[1]
    assert "b_0000.tif" in left and "b.json" in left and "a_0000.tif" not in left and "a.json" not in left


def test_files_that_are_no_images_and_names_with_dots_leave_no_case_out(images: Path, told: Path) -> None:
    for name in ("a_0000.json", "b_0000.bval", "c_0001.md5", "notes_2021.txt"):
        (images / name).write_text("{}")
    for year in ("2021.5", "2022.5"):
        for channel in ("0000", "0001"):
            shutil.copy(images / f"a_{channel}.nii.gz", images / f"P_{year}_{channel}.nii.gz")
    assert cli.main(["predict", "-i", str(images)]) == 0
    truncate(images / "P_2021.5_0001.nii.gz")
    assert cli.main(["predict", "-i", str(images)]) == 1
    left = json.loads(told.read_text())[1]
    assert "P_2022.5_0000.nii.gz" in left and "a_0000.nii.gz" in left and "P_2021.5_0000.nii.gz" not in left


def test_nnunets_failure_is_passed_on(images: Path, told: Path) -> None:
    assert cli.main(["predict", "-i", str(images), "--fail"]) == 3


def test_nothing_to_predict_is_an_error(images: Path, told: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in images.iterdir():
        file.write_bytes(gzip.compress(b"no image"))
    assert cli.main(["predict", "-i", str(images)]) == 1
    assert "No case in" in capsys.readouterr().err
    assert cli.main(["predict", "-i", str(images / "absent")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    (images / "empty").mkdir()
    assert cli.main(["predict", "-i", str(images / "empty")]) == 1
    assert "holds no images named CASE_0000" in capsys.readouterr().err
    assert not told.exists()


def test_other_commands_refuse_options_that_they_do_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["settings", "--no-such-option"])
    assert "unrecognized arguments: --no-such-option" in capsys.readouterr().err
