from __future__ import annotations

import argparse
import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile

from nnunetv2_semi import doctor, installation
from nnunetv2_semi.data import case_names, file_contents
from nnunetv2_semi.data.phantom import make_phantom_dataset
from nnunetv2_semi.doctor import environment
from nnunetv2_semi.doctor.checks import Check, Level, ok, problem, verdict, warning
from nnunetv2_semi.doctor.dataset import check_dataset
from nnunetv2_semi.errors import shown


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 labelled, 3 unlabelled and 2 test cases of two channels."""
    raw = tmp_path_factory.mktemp("raw")
    return make_phantom_dataset(raw, 7, "Phantom", labelled=5, unlabelled=3, test=2, shape=(12, 12, 14), channels=2)


def findings(level: Level, dataset: str = "7") -> list[Check]:
    return [check for check in check_dataset(dataset) if check.level is level]


def only(checks: list[Check]) -> Check:
    assert len(checks) == 1, [check.line() for check in checks]
    return checks[0]


def edit_json(dataset: Path, **changes: object) -> None:
    path = dataset / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def images(dataset: Path, folder: str) -> list[Path]:
    return sorted((dataset / folder).glob("*.nii.gz"))


def rewrite(path: Path, change_spacing: bool = False, crop: bool = False, constant: int | None = None) -> None:
    image = sitk.ReadImage(str(path))
    voxels = sitk.GetArrayFromImage(image)
    if crop:
        voxels = voxels[:-1]
    if constant is not None:
        voxels[:] = constant
    changed = sitk.GetImageFromArray(voxels)
    changed.SetSpacing([size * (2 if change_spacing else 1) for size in image.GetSpacing()])
    sitk.WriteImage(changed, str(path))


def test_a_healthy_data_set_passes_and_is_described(dataset: Path) -> None:
    checks = list(check_dataset("7"))
    assert [check.line() for check in checks if check.level is not Level.OK] == []
    text = "\n".join(check.line() for check in checks)
    assert "5 labelled cases" in text and "3 unlabelled cases" in text and "2 test cases" in text
    assert "all 25 image and label files can be read" in text
    assert "T1" in text and "T2" in text


@pytest.mark.parametrize("folder", ["imagesTr", "imagesUn", "labelsTr"])
def test_every_truncated_file_is_named(dataset: Path, folder: str) -> None:
    damaged = images(dataset, folder)[:2]
    for path in damaged:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 3 // 4])
    found = findings(Level.PROBLEM)
    assert [str(path) in check.finding for path, check in zip(damaged, found, strict=True)] == [True, True]
    assert all("truncated" in check.finding and check.remedy for check in found)


def test_a_truncated_test_image_is_a_warning(dataset: Path) -> None:
    path = images(dataset, "imagesTs")[0]
    path.write_bytes(path.read_bytes()[:-30])
    assert findings(Level.PROBLEM) == []
    assert str(path) in only(findings(Level.WARNING)).finding


def test_cases_that_lack_channels_are_counted_and_named(dataset: Path) -> None:
    lines = [check.line() for check in check_dataset("7")]
    assert any(line.endswith(" labelled cases: T1 0, T2 0, T1+T2 5") for line in lines)
    for path in (images(dataset, "imagesTr")[1], images(dataset, "imagesTr")[2], images(dataset, "imagesUn")[3]):
        path.unlink()
    checks = list(check_dataset("7"))
    assert [check for check in checks if check.level is Level.PROBLEM] == []
    text = "\n".join(check.finding for check in checks)
    assert "\nlabelled cases: T1 1, T2 1, T1+T2 3\n" in text and "\nunlabelled cases: T1 1, T2 0, T1+T2 2\n" in text
    labelled, unlabelled = (check for check in checks if check.level is Level.WARNING)
    case = images(dataset, "imagesTr")[0].name.removesuffix("_0000.nii.gz")
    assert "2 of 5 labelled cases lack channels" in labelled.finding and case in labelled.finding
    assert "-fpe nnUNetFingerprintExtractorSemi" in labelled.remedy and "verify_dataset_integrity" in labelled.remedy
    assert "1 of 3 unlabelled cases lack channels (T1 only: 1)" in unlabelled.finding
    assert "nnUNetPlannerSemi" in unlabelled.remedy


def test_modalities_are_named_as_dataset_json_does(dataset: Path) -> None:
    edit_json(dataset, semi={"modalities": {"MR": [1], "CT": [0]}})
    images(dataset, "imagesTs")[0].unlink()
    lines = [check.line() for check in check_dataset("7")]
    assert any(line.endswith("test cases: MR 1, CT 0, MR+CT 1") for line in lines)


def test_a_modality_of_several_channels_may_be_there_in_part(dataset: Path) -> None:
    edit_json(dataset, channel_names={"0": "CT", "1": "T1", "2": "T2"}, semi={"modalities": {"CT": [0], "MR": [1, 2]}})
    lines = [check.line() for check in check_dataset("7")]
    assert any(line.endswith(" labelled cases: CT 0, MR 0, CT+MR 0, CT+MR (in part) 5") for line in lines)
    assert "no labelled case has T2" in [check.finding for check in findings(Level.WARNING)]


def test_a_channel_that_no_labelled_case_has_matters_if_it_is_ct(dataset: Path) -> None:
    for path in images(dataset, "imagesTr")[1::2]:
        path.unlink()
    assert findings(Level.PROBLEM) == []
    assert "no labelled case has T2" in [check.finding for check in findings(Level.WARNING)]
    edit_json(dataset, channel_names={"0": "T1", "1": "CT"})
    assert "1 (CT)" in only(findings(Level.PROBLEM)).finding


@pytest.mark.parametrize("folder", ["imagesTr", "imagesUn", "imagesTs"])
def test_a_channel_that_the_data_set_does_not_have_is_found_once(dataset: Path, folder: str) -> None:
    path = images(dataset, folder)[1]
    path.rename(path.with_name(path.name.replace("_0001", "_0004")))
    found = only([check for level in (Level.PROBLEM, Level.WARNING) for check in findings(level)
                  if "_0004" in check.line()])
    assert "channel" in found.finding and found.level is (Level.WARNING if folder == "imagesTs" else Level.PROBLEM)


def test_no_unlabelled_images_says_where_and_how_to_name_them(dataset: Path) -> None:
    shutil.rmtree(dataset / "imagesUn")
    found = only(findings(Level.PROBLEM))
    assert str(dataset / "imagesUn") in found.finding
    assert "_0000.nii.gz" in found.remedy and "_0001.nii.gz" in found.remedy


def test_an_unlabelled_image_that_is_a_labelled_one_is_a_problem(dataset: Path) -> None:
    for channel in range(2):
        source = next((dataset / "imagesTr").glob(f"*_000{channel}.nii.gz"))
        image = sitk.ReadImage(str(source))
        # other bytes, same voxels
        sitk.WriteImage(sitk.Cast(image, sitk.sitkFloat32), str(dataset / "imagesUn" / f"other_000{channel}.nii.gz"))
    found = only(findings(Level.PROBLEM))
    assert "other_0000.nii.gz" in found.finding and source.name[:-12] in found.finding


def test_an_unlabelled_or_test_image_that_is_there_twice_is_a_warning(dataset: Path) -> None:
    for channel in range(2):
        unlabelled = sorted((dataset / "imagesUn").glob(f"*_000{channel}.nii.gz"))[0]
        shutil.copy(unlabelled, dataset / "imagesUn" / f"again_000{channel}.nii.gz")
        test = sorted((dataset / "imagesTs").glob(f"*_000{channel}.nii.gz"))[0]
        shutil.copy(unlabelled, test)
    assert findings(Level.PROBLEM) == []
    text = "\n".join(check.finding for check in findings(Level.WARNING))
    assert "again_000" in text and "test cases are training cases" in text


def test_a_changed_copy_of_another_case_is_a_warning(dataset: Path) -> None:
    for channel in range(2):
        image = sitk.ReadImage(str(images(dataset, "imagesTr")[channel]))
        copy = np.ascontiguousarray(sitk.GetArrayFromImage(image)[:, :, ::-1]).astype(np.float32) * 2 - 5
        sitk.WriteImage(sitk.GetImageFromArray(copy), str(dataset / "imagesUn" / f"copy_000{channel}.nii.gz"))
    assert findings(Level.PROBLEM) == []
    found = [check for check in findings(Level.WARNING) if "seem to show the same scan" in check.finding]
    assert "1 pairs of cases" in only(found).finding
    assert f"copy_0000.nii.gz = {Path('imagesTr') / images(dataset, 'imagesTr')[0].name}" in only(found).finding


def test_files_that_did_not_change_are_not_read_again(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    first = [check.line() for check in check_dataset("7")]
    read: list[str] = []
    for name in ("read_image", "read_label"):
        function = getattr(file_contents, name)
        monkeypatch.setattr(file_contents, name, lambda path, *args, function=function, **options: (
            read.append(path), function(path, *args, **options))[1])  # fmt: skip
    assert [check.line() for check in check_dataset("7")] == first and read == []
    changed = images(dataset, "imagesUn")[0]
    rewrite(changed)
    assert [check.line() for check in check_dataset("7")] == first and read == [str(changed)]


def test_images_without_label_are_named_with_where_to_move_them(dataset: Path) -> None:
    label = images(dataset, "labelsTr")[2]
    label.unlink()
    edit_json(dataset, numTraining=4)
    found = only(findings(Level.PROBLEM))
    assert label.name.removesuffix(".nii.gz") in found.finding
    assert str(dataset / "imagesUn") in found.remedy


def test_an_unlabelled_image_of_one_value_is_a_problem(dataset: Path) -> None:
    """As preprocessing says, which refuses it."""
    for file in sorted(images(dataset, "imagesUn"))[:2]:
        voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        sitk.WriteImage(sitk.GetImageFromArray(np.full_like(voxels, 3)), str(file))
    assert "1 unlabelled images have a single value: " in only(findings(Level.PROBLEM)).finding


def test_a_label_without_image_is_named(dataset: Path) -> None:
    shutil.copy(images(dataset, "labelsTr")[0], dataset / "labelsTr" / "orphan.nii.gz")
    assert "orphan" in only(findings(Level.WARNING)).finding


def test_fewer_than_five_labelled_cases_cannot_be_cross_validated(dataset: Path) -> None:
    case = images(dataset, "labelsTr")[0].name.removesuffix(".nii.gz")
    for path in [dataset / "labelsTr" / f"{case}.nii.gz", *(dataset / "imagesTr").glob(f"{case}_*")]:
        path.unlink()
    edit_json(dataset, numTraining=4)
    found = only(findings(Level.WARNING))
    assert "4 labelled case(s)" in found.finding and "folds 0 to 3" in found.finding and "`all`" in found.remedy


@pytest.mark.parametrize("change", ["crop", "change_spacing"])
@pytest.mark.parametrize(("folder", "index"), [("imagesTr", 1), ("imagesUn", 1), ("labelsTr", 0)])
def test_shape_or_spacing_that_differs_within_a_case_is_found(
    dataset: Path, folder: str, index: int, change: str
) -> None:
    path = images(dataset, folder)[index]
    rewrite(path, crop=change == "crop", change_spacing=change == "change_spacing")
    found = only(findings(Level.PROBLEM))
    assert ("shape" if change == "crop" else "spacing") in found.finding
    assert path.name.removesuffix(".nii.gz").removesuffix("_0001") in found.finding


def test_unknown_label_values_are_named(dataset: Path) -> None:
    path = images(dataset, "labelsTr")[0]
    rewrite(path, constant=77)
    found = only(findings(Level.PROBLEM))
    assert path.name.removesuffix(".nii.gz") in found.finding and "77" in found.finding


def test_unknown_keys_and_modalities_of_dataset_json(dataset: Path) -> None:
    edit_json(dataset, semi={"modality": {"T1": [0]}})
    assert "modality" in only(findings(Level.PROBLEM)).finding
    edit_json(dataset, semi={"modalities": {"both": [0, 1]}})
    assert any("both (channels 0, 1)" in check.finding for check in findings(Level.OK))


def test_dataset_json_that_cannot_be_used(dataset: Path) -> None:
    (dataset / "dataset.json").write_text("{not json")
    assert "dataset.json" in only(findings(Level.PROBLEM)).finding
    (dataset / "dataset.json").write_text("{}")
    found = [check.finding.split(": ", 1)[1] for check in findings(Level.PROBLEM)]
    assert [text.split('"')[1] for text in found] == ["channel_names", "labels", "file_ending", "numTraining"]


@pytest.mark.parametrize("changes", [
    {"labels": {"0": "background", "1": "a"}},
    {"labels": {"a": 1}},
    {"channel_names": ["T1", "T2"]},
    {"channel_names": {"T1": "0", "T2": "1"}},
    {"channel_names": {"0": "T1", "2": "T2"}},
    {"modality": {"0": "T1"}},
    {"file_ending": "nii.gz"},
    {"regions_class_order": [9], "labels": {"background": 0, "all": [1, 2], "a": 1}},
])
def test_a_mistake_in_dataset_json_is_one_problem_and_no_traceback(dataset: Path, changes: dict) -> None:
    edit_json(dataset, **changes)
    assert f'dataset.json: "{next(iter(changes))}' in only(findings(Level.PROBLEM)).finding


def test_files_that_macos_writes_beside_images_are_named(dataset: Path) -> None:
    for folder in ("imagesTr", "labelsTr", "imagesUn", "imagesTs"):
        path = images(dataset, folder)[0]
        (path.parent / f"._{path.name}").write_bytes(b"\x00\x05\x16\x07")
    name = images(dataset, "imagesTr")[0].name
    found = only(findings(Level.PROBLEM)).finding
    assert name.startswith("._") and f"nnU-Net reads them as cases: {name}. macOS" in found
    assert "remove all files whose names begin with ._" in found
    assert "imagesTs are no images" in only(findings(Level.WARNING)).finding


@pytest.mark.parametrize("folder", ["imagesTr", "imagesUn"])
def test_a_link_that_leads_nowhere_is_named(dataset: Path, folder: str) -> None:
    case = sorted(images(dataset, folder))[0].name[:-12]
    for path in (dataset / folder).glob(f"{case}_*"):
        path.unlink()
        path.symlink_to("/not/there.nii.gz")
    if folder == "imagesTr":
        (dataset / "labelsTr" / f"{case}.nii.gz").unlink()
        edit_json(dataset, numTraining=4)
    text = "\n".join(check.finding for check in findings(Level.PROBLEM))
    assert f"{case}_0000.nii.gz" in text and "/not/there.nii.gz" in text
    assert all(check.finding.count("not there") for check in findings(Level.PROBLEM))
    if folder == "imagesTr":
        assert any("4 labelled case(s)" in check.finding for check in findings(Level.WARNING))


def test_labels_are_read_as_nnunet_reads_labels(tmp_path: Path, dataset: Path) -> None:
    """Of TIFF files the reader of images looks for the spacing in another file than that of labels."""
    for folder in ("imagesTr", "imagesUn", "imagesTs", "labelsTr"):
        for path in images(dataset, folder):
            case = path.name.removesuffix(".nii.gz")
            tifffile.imwrite(path.with_name(f"{case}.tif"), sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
            case = case if folder == "labelsTr" else case[:-5]
            (path.parent / f"{case}.json").write_text('{"spacing": [2, 1, 1]}')
            path.unlink()
    edit_json(dataset, file_ending=".tif")
    assert [check.line() for check in check_dataset("7") if check.level is not Level.OK] == []
    label = next((dataset / "labelsTr").glob("*.json"))
    label.write_text('{"spacing": [3, 1, 1]}')
    assert f"{label.stem}: spacing [3.0, 1.0, 1.0] of {label.stem}.tif differs" in only(findings(Level.PROBLEM)).finding
    label.unlink()
    assert findings(Level.PROBLEM) == []
    assert f"have no .json file with their spacing: {label.stem};" in only(findings(Level.WARNING)).finding


def test_a_name_that_collides_with_nnunets_files_is_a_problem(dataset: Path) -> None:
    case = images(dataset, "imagesTr")[0].name[:-12]
    for folder in ("imagesTr", "labelsTr"):
        for path in (dataset / folder).glob(f"{case}*"):
            path.rename(path.with_name(path.name.replace(case, "patient_seg")))
    assert "in imagesTr end with _seg: patient_seg." in only(findings(Level.PROBLEM)).finding


@pytest.mark.parametrize("folds", [True, False])
def test_names_that_differ_in_case_only(dataset: Path, monkeypatch: pytest.MonkeyPatch, folds: bool) -> None:
    monkeypatch.setattr(case_names, "folds_case", lambda folder: folds)
    names = sorted({path.name[:-12] for path in images(dataset, "imagesUn")})[:2]
    for old, new in zip(names, ("Patient", "patient"), strict=True):
        for path in (dataset / "imagesUn").glob(f"{old}_*"):
            path.rename(path.with_name(path.name.replace(old, new)))
    if len(images(dataset, "imagesUn")) < 6:
        pytest.skip("the file system folds case")
    assert "Patient = patient" in only(findings(Level.PROBLEM if folds else Level.WARNING)).finding


@pytest.mark.parametrize(("folder", "index"), [("imagesTr", 1), ("imagesUn", 1), ("labelsTr", 0)])
@pytest.mark.parametrize("what", ["origin", "direction"])
def test_origin_or_direction_that_differs_within_a_case_is_a_problem(
    dataset: Path, folder: str, index: int, what: str
) -> None:
    path = images(dataset, folder)[index]
    image = sitk.ReadImage(str(path))
    if what == "origin":
        image.SetOrigin([value + 3 for value in image.GetOrigin()])
    else:
        image.SetDirection([-value if place < 3 else value for place, value in enumerate(image.GetDirection())])
    sitk.WriteImage(image, str(path))
    found = only(findings(Level.PROBLEM))
    assert f"{what} " in found.finding and f"of {path.name} differs from" in found.finding
    assert "copy the header" in found.remedy


def test_spacings_that_nnunet_takes_for_the_same_are_the_same(dataset: Path) -> None:
    for folder in ("imagesTr", "imagesUn"):
        path = images(dataset, folder)[1]
        image = sitk.ReadImage(str(path))
        image.SetSpacing([size * (1 + 2e-6) for size in image.GetSpacing()])
        sitk.WriteImage(image, str(path))
    assert findings(Level.PROBLEM) == []


def test_unlabelled_cases_that_all_lie_otherwise_than_the_labelled_ones_are_a_warning(dataset: Path) -> None:
    paths = images(dataset, "imagesUn")
    for path in paths[:-2]:
        sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), "PIR"), str(path))
    assert findings(Level.WARNING) == []
    for path in paths[-2:]:
        sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), "PIR"), str(path))
    assert findings(Level.PROBLEM) == []
    found = only(findings(Level.WARNING))
    assert "all unlabelled cases have another orientation (PIR) than the labelled ones" in found.finding
    assert "reorient" in found.remedy


def test_splits_that_cannot_be_used_are_a_problem(dataset: Path, tmp_path: Path) -> None:
    cases = [path.name.removesuffix(".nii.gz") for path in images(dataset, "labelsTr")]
    file = tmp_path / "nnUNet_preprocessed" / dataset.name / "splits_final.json"
    file.parent.mkdir()
    # a fold without any case is there for its number alone
    splits = [{"train": [], "val": []}, {"train": cases[1:], "val": cases[:1]}]
    file.write_text(json.dumps(splits))
    assert findings(Level.PROBLEM) == []
    file.write_text(json.dumps([*splits, {"train": cases[:1], "val": ["gone"]}]))
    assert f"{file} cannot be used: fold 2 names cases" in only(findings(Level.PROBLEM)).finding


def test_a_labelled_case_that_a_fold_leaves_out_is_a_warning(dataset: Path, tmp_path: Path) -> None:
    first, *others = [path.name.removesuffix(".nii.gz") for path in images(dataset, "labelsTr")]
    file = tmp_path / "nnUNet_preprocessed" / dataset.name / "splits_final.json"
    file.parent.mkdir()
    whole, part = {"train": others, "val": [first]}, {"train": others[1:], "val": others[:1]}

    def warned() -> list[str]:
        return [check.finding for check in findings(Level.WARNING) if str(file) in check.finding]

    file.write_text(json.dumps([whole]))
    assert warned() == []
    file.write_text(json.dumps([whole, part]))
    assert only(warned()).endswith(f"neither trained nor validated: fold 1 {first}")


def test_an_unknown_data_set_is_a_problem(dataset: Path) -> None:
    assert "99" in only(findings(Level.PROBLEM, "99")).finding
    assert only(findings(Level.PROBLEM, "Dataset099_None")).remedy


def test_unset_missing_and_read_only_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "absent"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    levels = {check.finding.split("=")[0].split()[0]: check.level for check in environment.check_folders()}
    assert levels == {
        "nnUNet_raw": Level.PROBLEM,
        "nnUNet_preprocessed": Level.PROBLEM,
        "nnUNet_results": Level.OK,
    }
    monkeypatch.setattr(environment, "_is_writable", lambda folder: False)
    assert [check.level for check in environment.check_folders()] == [Level.PROBLEM] * 3


def test_torchvision_for_another_torch_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", fail)
    found = environment.check_torchvision("2.9+cpu")
    assert found.level is Level.PROBLEM
    assert "nms" in found.finding and "pip install --force-reinstall torch torchvision" in found.remedy


def test_a_class_that_nnunet_does_not_find_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "trainer_names", lambda: ("nnUNetTrainer", "nnUNetTrainerThatIsNowhere"))
    monkeypatch.setattr(environment, "PLANNING", ("ExperimentPlanner",))
    monkeypatch.setattr(environment, "PREPROCESSING", ("DefaultPreprocessor",))
    checks = list(environment.check_visibility())
    assert [check.level for check in checks] == [Level.PROBLEM, Level.OK, Level.OK]
    assert "nnUNetTrainerThatIsNowhere" in checks[0].finding and "nnunetv2_semi link" in checks[0].remedy


def test_an_installation_without_trainers_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(installation, "package_folder", lambda: tmp_path / "nnunetv2_semi")
    missing, = environment.check_visibility()
    assert missing.level is Level.PROBLEM and "pip install --force-reinstall" in missing.remedy
    monkeypatch.setattr(environment, "trainer_names", tuple)
    empty, = environment.check_visibility()
    assert empty.level is Level.PROBLEM and "Their folder is empty" in empty.remedy


def test_the_exit_status_tells_whether_training_would_fail(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "check_environment", lambda: iter([ok("all fine")]))
    args = argparse.Namespace(dataset="7")
    assert doctor.run(args) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Verdict: ready for training."
    shutil.rmtree(dataset / "imagesUn")
    assert doctor.run(args) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("Verdict: 1 problem found")


def test_warnings_alone_do_not_fail() -> None:
    assert verdict([ok("a"), warning("b")]) == "Verdict: ready for training (1 warning above)."
    assert "2 problems" in verdict([problem("a", "b"), problem("c", "d")])


def test_long_lists_are_cut() -> None:
    assert shown(range(3), at_most=2) == "0, 1 and 1 more"
