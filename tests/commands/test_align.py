from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from PIL import Image

from nnunetv2_semi import cli
from nnunetv2_semi.commands import align as align_command
from nnunetv2_semi.data import case_alignment
from nnunetv2_semi.data.phantom import make_phantom_dataset
from nnunetv2_semi.data.registration import grid_points, mapped, mean_displacement, rigid_transform

SHAPE = (44, 48)
SHIFT = (9.0, -6.0)  # mm


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnUNet_raw, empty."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return tmp_path / "nnUNet_raw"


def shifted(file: Path) -> None:
    """Turn the image in a file by 7 degrees and shift it."""
    image = sitk.ReadImage(str(file))
    sitk.WriteImage(sitk.Resample(image, image, truth(image).GetInverse(), sitk.sitkLinear, 0.0), str(file))


def truth(image: sitk.Image) -> sitk.Transform:
    angle, dims = np.radians(7), image.GetDimension()
    turned = np.eye(dims)
    turned[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    centre = np.array(image.TransformContinuousIndexToPhysicalPoint([size / 2 for size in image.GetSize()]))
    return rigid_transform(turned, centre, np.array([*SHIFT, 4.0][:dims]))


def make_source(raw: Path, channels: int = 2, shape: tuple[int, ...] = SHAPE, **options: int | str) -> Path:
    """Dataset007_Mine, in which all channels but the first were moved."""
    counts = {"labelled": 2, "unlabelled": 1, "test": 1}  # cases
    folder = make_phantom_dataset(raw, 7, "Mine", shape=shape, channels=channels, **(counts | options))  # type: ignore
    for file in folder.glob("images*/*"):
        if not file.name.split(".")[0].endswith("_0000"):
            shifted(file)
    return folder


def align(*arguments: object, pictures: int = 0) -> int:
    return cli.main(["align", "-d", "7", "-np", "1", "--pictures", str(pictures), *map(str, arguments)])


def made(raw: Path, number: int = 8) -> Path:
    return raw / f"Dataset{number:03d}_MineAligned"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for part in ("images*", "labels*") for path in folder.glob(f"{part}/*"))


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "alignment" / "quality.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def dataset_json(folder: Path) -> dict:
    return json.loads((folder / "dataset.json").read_text(encoding="utf-8"))


def transform_error(folder: Path, split: str, case: str, modality: str, image: Path) -> float:
    """Mean distance (voxels) of the transform from the true one."""
    fixed = sitk.ReadImage(str(image))
    found = sitk.ReadTransform(str(folder / "alignment" / "transforms" / split / f"{case}_{modality}.tfm"))
    points = grid_points(fixed)
    distances = np.linalg.norm(mapped(found, points) - mapped(truth(fixed), points), axis=1)
    return float(distances.mean() / max(fixed.GetSpacing()))


@pytest.mark.parametrize("shape", [SHAPE, (24, 32, 28)], ids=["2D", "3D"])
def test_a_new_data_set_is_aligned_and_the_original_untouched(raw, capsys, worker_threads, shape):
    source = make_source(raw, shape=shape)
    before = contents(source)
    assert align(pictures=8) == 0
    assert contents(source) == before
    new = made(raw)
    assert names(new) == names(source)
    for name in names(new):
        if "labels" in name or name.endswith("_0000.nii.gz"):
            assert (new / name).read_bytes() == before[name]
    assert dataset_json(new) == dataset_json(source) | {"alignment": {
        "source": "Dataset007_Mine", "fixed": "T1", "transform": "rigid", "backend": "simpleitk", "left_out": []}}
    for split, case in (("Tr", "case_0000"), ("Un", "case_0002"), ("Ts", "case_0003")):
        fixed = source / f"images{split}" / f"{case}_0000.nii.gz"
        assert transform_error(new, split, case, "T2", fixed) < 1
    rows = table(new)
    assert [(row["split"], row["case"]) for row in rows] == [("Tr", "case_0000"), ("Tr", "case_0001"),
                                                             ("Un", "case_0002"), ("Ts", "case_0003")]
    for row in rows:
        assert float(row["mutual_information_after"]) > float(row["mutual_information_before"])
        assert row["outcome"] == "aligned" and 4 < float(row["mean_displacement_mm"]) < 20
    printed = capsys.readouterr().out
    assert "4 of 4 cases, 2 of them in imagesTr" in printed
    assert Image.open(new / "alignment" / "worst_cases.png").size[1] > 900  # four rows
    with worker_threads():
        verify_dataset_integrity(str(new), 1)
    assert "Warning" not in capsys.readouterr().out


def test_the_inverse_leads_back(raw):
    source = make_source(raw, labelled=1, unlabelled=0, test=0)
    assert align() == 0
    folder = made(raw) / "alignment" / "transforms" / "Tr"
    there, back = (sitk.ReadTransform(str(folder / f"case_0000_T2{end}.tfm")) for end in ("", "_inverse"))
    points = grid_points(sitk.ReadImage(str(source / "imagesTr" / "case_0000_0000.nii.gz")))
    assert np.allclose(mapped(back, mapped(there, points)), points, atol=1e-4)
    assert not np.allclose(mapped(there, points), points, atol=1)


def test_a_case_without_overlap_fails_alone_and_is_done_again_once_mended(raw, capsys, monkeypatch):
    source = make_source(raw)
    bad = source / "imagesTr" / "case_0001_0001.nii.gz"
    image = sitk.ReadImage(str(bad))
    elsewhere = sitk.Image(image)
    elsewhere.SetOrigin([5000.0, 0.0])
    sitk.WriteImage(elsewhere, str(bad))
    assert align() == 1
    printed = capsys.readouterr()
    assert "1 case(s) FAILED" in printed.err
    assert "imagesTr/case_0001: T2 to T1: the images do not overlap" in printed.err
    new = made(raw)
    assert [name for name in names(source) if "case_0001" not in name] == names(new)
    assert dataset_json(new)["numTraining"] == 1
    assert dataset_json(new)["alignment"]["left_out"] == ["imagesTr/case_0001"]
    assert [row["case"] for row in table(new) if row["outcome"] == "failed"] == ["case_0001"]

    sitk.WriteImage(image, str(bad))
    done = counted(monkeypatch)
    assert align() == 0
    assert done == ["case_0001"] and names(new) == names(source)
    assert dataset_json(new)["numTraining"] == 2 and dataset_json(new)["alignment"]["left_out"] == []


def counted(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[str]:
    """Names of cases that are registered from now on; Ctrl-C while that many were written but for their records."""
    done: list[str] = []
    write = case_alignment._write

    def counting(case, options, folder):
        outcome = write(case, options, folder)
        done.append(case.name)
        if len(done) == stop_at:
            raise KeyboardInterrupt
        return outcome

    monkeypatch.setattr(case_alignment, "_write", counting)
    return done


def test_an_interrupted_run_continues_and_ends_as_an_uninterrupted_one(raw, monkeypatch, capsys):
    source = make_source(raw)
    assert align("--to-id", 20) == 0
    capsys.readouterr()
    whole = contents(made(raw, 20))
    with monkeypatch.context() as patch:
        first = counted(patch, stop_at=3)
        assert align("--to-id", 21) == 130
    assert "goes on" in capsys.readouterr().err
    assert not (made(raw, 21) / "dataset.json").exists()
    assert len(names(made(raw, 21))) == 2 * 2 + 2
    second = counted(monkeypatch)
    assert align("--to-id", 21) == 0
    assert first == ["case_0000", "case_0001", "case_0002"] and second == ["case_0002", "case_0003"]
    assert contents(made(raw, 21)) == whole and names(made(raw, 21)) == names(source)


@pytest.mark.e2e
def test_a_killed_run_continues(raw):
    make_source(raw, labelled=6, unlabelled=0, test=0)
    command = [sys.executable, "-m", "nnunetv2_semi.cli", "align", "-d", "7", "-np", "1"]
    process = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = made(raw) / "alignment" / "cases"
    end = time.monotonic() + 120
    while not list(records.glob("*.json")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert 1 <= len(before) < 6
    assert align() == 0
    assert len(names(made(raw))) == 6 * 3 and not (made(raw) / "alignment" / "unfinished").exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_changed_in_the_original_is_done_again_and_what_left_it_is_removed(raw, monkeypatch):
    source = make_source(raw)
    assert align() == 0
    shutil.copyfile(source / "imagesTr" / "case_0000_0001.nii.gz", source / "imagesUn" / "case_0002_0001.nii.gz")
    for file in source.glob("*/case_0001*"):
        file.unlink()
    done = counted(monkeypatch)
    assert align() == 0
    assert done == ["case_0002"] and names(made(raw)) == names(source)
    assert dataset_json(made(raw))["numTraining"] == 1


def test_cases_that_lack_modalities(raw, capsys):
    source = make_source(raw, channels=3, labelled=3, unlabelled=0, test=0)
    (source / "imagesTr" / "case_0000_0002.nii.gz").unlink()  # fixed and one other
    (source / "imagesTr" / "case_0001_0000.nii.gz").unlink()  # two, without the fixed one
    for channel in (0, 2):
        (source / "imagesTr" / f"case_0002_{channel:04d}.nii.gz").unlink()  # one alone
    assert align() == 0
    new = made(raw)
    assert names(new) == names(source)
    third = dataset_json(source)["channel_names"]["2"]
    rows = {(row["case"], row["modality"]): row for row in table(new)}
    assert rows["case_0000", "T2"]["fixed"] == "T1" and ("case_0000", third) not in rows
    assert rows["case_0001", third]["fixed"] == "T2" and "aligned to T2" in rows["case_0001", third]["note"]
    assert rows["case_0002", ""]["outcome"] == "copied" and "left as it is" in rows["case_0002", ""]["note"]
    same = "imagesTr/case_0002_0001.nii.gz"
    assert (new / same).read_bytes() == (source / same).read_bytes()
    assert "imagesTr/case_0001: T1 is missing: aligned to T2" in capsys.readouterr().out


def test_channels_of_a_modality_move_together_to_the_modality_that_is_named(raw):
    source = make_source(raw, channels=3, labelled=1, unlabelled=0, test=0)
    content = dataset_json(source) | {"semi": {"modalities": {"A": [0], "B": [1, 2]}}}
    (source / "dataset.json").write_text(json.dumps(content))
    assert align("--fixed", "B") == 0
    new = made(raw)
    assert [(row["modality"], row["fixed"]) for row in table(new)] == [("A", "B")]
    shutil.rmtree(new)
    assert align("--fixed", "A") == 0
    transforms = list((new / "alignment" / "transforms").rglob("*.tfm"))
    assert sorted(path.name for path in transforms) == ["case_0000_B.tfm", "case_0000_B_inverse.tfm"]
    transform = sitk.ReadTransform(str(new / "alignment" / "transforms" / "Tr" / "case_0000_B.tfm"))
    for channel in (1, 2):
        name = f"imagesTr/case_0000_{channel:04d}.nii.gz"
        image = sitk.ReadImage(str(source / name))
        expected = sitk.Resample(sitk.Cast(image, sitk.sitkFloat64), image, transform)
        written = sitk.GetArrayFromImage(sitk.ReadImage(str(new / name)))
        assert written.dtype == np.int16
        lowest = sitk.GetArrayFromImage(image).min()
        expected_voxels = np.round(sitk.GetArrayFromImage(expected))
        assert ((written == expected_voxels) | (written == lowest)).all()
        assert (written == expected_voxels).mean() > 0.7


def test_images_of_another_grid_come_onto_that_of_the_fixed_one(raw, worker_threads):
    source = make_source(raw, shape=(24, 32, 28), labelled=1, unlabelled=0, test=0)
    direction = [0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1]
    for name in ("imagesTr/case_0000_0000", "imagesTr/case_0000_0001", "labelsTr/case_0000"):
        image = sitk.ReadImage(str(source / f"{name}.nii.gz"))
        image.SetDirection(direction)
        image.SetOrigin([-3.1, 7.7, 11.3])
        image.SetSpacing([1.7, 1.7, 2.3])
        if name.endswith("1"):
            image = sitk.BinShrink(image, [1, 1, 2])
        sitk.WriteImage(image, str(source / f"{name}.nii.gz"))
    assert align() == 0
    with worker_threads():
        verify_dataset_integrity(str(made(raw)), 1)
    fixed, moved = (sitk.ReadImage(str(made(raw) / "imagesTr" / f"case_0000_000{number}.nii.gz")) for number in (0, 1))
    assert fixed.GetSize() == moved.GetSize() and np.allclose(fixed.GetDirection(), moved.GetDirection(), atol=1e-5)


def test_png_images(raw):
    source = make_source(raw, labelled=1, unlabelled=0, test=0, file_ending=".png")
    assert align("--interpolation", "bspline") == 0
    before, after = (sitk.ReadImage(str(folder / "imagesTr" / "case_0000_0001.png")) for folder in (source, made(raw)))
    assert after.GetPixelID() == before.GetPixelID() == sitk.sitkUInt8
    assert after.GetSize() == before.GetSize()


def test_splines_stay_within_the_range_of_the_image():
    voxels = np.zeros((16, 16), np.float32)
    voxels[:, 8:] = 100
    image = sitk.GetImageFromArray(voxels)
    half = rigid_transform(np.eye(2), np.zeros(2), np.array([0.5, 0.0]))
    moved = sitk.GetArrayFromImage(case_alignment.resampled(image, image, half, "bspline"))
    assert moved.min() == 0 and moved.max() == 100 and moved.dtype == np.float32
    assert len(np.unique(moved)) > 2


def test_aligned_images_are_hardly_moved(raw):
    make_phantom_dataset(raw, 7, "Mine", labelled=1, unlabelled=0, test=0, shape=SHAPE)
    assert align() == 0
    image = sitk.ReadImage(str(made(raw) / "imagesTr" / "case_0000_0000.nii.gz"))
    found = sitk.ReadTransform(str(made(raw) / "alignment" / "transforms" / "Tr" / "case_0000_T2.tfm"))
    assert mean_displacement(found, image) < 1.0


def test_wrong_calls_write_nothing(raw, capsys, monkeypatch):
    source = make_source(raw, labelled=1, unlabelled=0, test=0)
    before = sorted(raw.rglob("*"))
    (raw / "Dataset009_Other").mkdir()
    monkeypatch.setitem(sys.modules, "itk", None)
    calls = {("--fixed", "T3"): "T1, T2", ("--to-id", 9): "taken by Dataset009_Other", ("--to-id", 0): "from 1 to 999",
             ("--backend", "elastix"): "nnunetv2-semi[elastix]"}
    for arguments, message in calls.items():
        assert align(*arguments) == 1
        assert message in capsys.readouterr().err
    content = dataset_json(source)
    for modalities, message in (({"both": [0, 1]}, "nothing to align"), ({"A": [0], "B": [2]}, "channels 0 to 1")):
        (source / "dataset.json").write_text(json.dumps(content | {"semi": {"modalities": modalities}}))
        assert align() == 1
        assert message in capsys.readouterr().err
    (raw / "Dataset009_Other").rmdir()
    assert sorted(raw.rglob("*")) == before


@pytest.mark.parametrize("changes, message", [
    ({"file_ending": None}, "dataset.json is not as nnU-Net needs it: \"file_ending\" is missing"),
    ({"labels": None}, "dataset.json is not as nnU-Net needs it: \"labels\" is missing"),
    ({"channel_names": ["T1", "T2"]}, "\"channel_names\" is a list: it should be"),
    ({"channel_names": {"0": "T1", "1": "T2", "2": "FLAIR"}, "semi": {"modalities": {"A": [0], "B": [1]}}},
     'No modality under "semi" in'),
    ({"file_ending": ".tif"}, "TIFF files do not say where their voxels are"),
    ({"file_ending": ".nrrd"}, "There are no cases in"),
])  # fmt: skip
def test_a_data_set_that_cannot_be_aligned_is_refused(raw, capsys, changes, message):
    source = make_source(raw, labelled=1, unlabelled=0, test=0)
    content = {key: value for key, value in (dataset_json(source) | changes).items() if value is not None}
    (source / "dataset.json").write_text(json.dumps(content))
    assert align() == 1
    assert message in capsys.readouterr().err and not made(raw).exists()


def test_which_of_several_new_data_sets_is_meant_must_be_said(raw, capsys, monkeypatch):
    make_source(raw, labelled=1, unlabelled=0, test=0)
    with monkeypatch.context() as patch:
        patch.setattr(align_command, "find_candidate_datasets", lambda number: [f"Dataset{number:03d}_Other"])
        assert align() == 1
        assert "No id from 8 to 999 is free: give --to-id." in capsys.readouterr().err
    for number in (8, 9):
        (made(raw, number) / "alignment").mkdir(parents=True)
        (made(raw, number) / "alignment" / "settings.json").write_text("{}")
    assert align() == 1
    assert ("There are several: Dataset008_MineAligned, Dataset009_MineAligned. Name one with --to-id."
            in capsys.readouterr().err)


def test_an_image_of_several_channels_is_named(tmp_path):
    file = tmp_path / "colour_0000.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 4, 3), np.uint8), isVector=True), str(file))
    with pytest.raises(RuntimeError, match="colour_0000.nii.gz holds several channels: write each into a file of its"):
        case_alignment.read_image(str(file))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_an_image_with_voxels_that_are_not_finite_is_named(tmp_path, value):
    """Of NIfTI files SimpleITK reads them as 0."""
    file, voxels = tmp_path / "case_0001.nrrd", np.ones((4, 4, 4), np.float32)
    voxels[1, 2, 3] = value
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(file))
    with pytest.raises(RuntimeError, match="case_0001.nrrd has voxels that are not finite"):
        case_alignment.read_image(str(file))


def test_every_image_of_a_case_is_checked_for_them(raw, capsys):
    """Also the one that nothing is registered to, and that nothing moves: the second channel of the fixed modality."""
    source = make_source(raw, 3, file_ending=".nrrd")
    file = next(source.glob("imagesUn/*_0001*"))
    image = sitk.Cast(sitk.ReadImage(str(file)), sitk.sitkFloat32)
    image[3, 4] = float("nan")
    sitk.WriteImage(image, str(file))
    content = dataset_json(source)
    content["semi"] = {"modalities": {"A": [0, 1], "B": [2]}}
    (source / "dataset.json").write_text(json.dumps(content))
    assert align() == 1
    assert "not finite" in capsys.readouterr().err
    assert not list(made(raw).glob("imagesUn/*")) and len(list(made(raw).glob("imagesTr/*"))) == 6


def test_other_options_do_not_go_on_where_a_run_stopped(raw, capsys):
    make_source(raw, labelled=1, unlabelled=0, test=0)
    assert align() == 0
    capsys.readouterr()
    assert align("--transform", "affine") == 1
    assert "begun with kind rigid, not affine" in capsys.readouterr().err
    assert align("--transform", "affine", "--to-id", 30) == 0
    transform = sitk.ReadTransform(str(made(raw, 30) / "alignment" / "transforms" / "Tr" / "case_0000_T2.tfm"))
    assert transform.GetName() == "AffineTransform"
