"""What doctor says of folders, counts and names of a raw data set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nnunetv2_semi.data import file_contents
from nnunetv2_semi.data.phantom import make_phantom_dataset
from nnunetv2_semi.doctor.checks import Check, Level
from nnunetv2_semi.doctor.dataset import check_dataset


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 labelled and 2 unlabelled cases of one channel."""
    raw = tmp_path_factory.mktemp("raw")
    return make_phantom_dataset(raw, 7, "Phantom", labelled=5, unlabelled=2, test=0, shape=(12, 12, 14), channels=1)


def found(level: Level) -> list[Check]:
    return [check for check in check_dataset("7") if check.level is level]


def only(checks: list[Check]) -> Check:
    assert len(checks) == 1, [check.line() for check in checks]
    return checks[0]


def edit_json(dataset: Path, **changes: object) -> None:
    path = dataset / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def first_case(dataset: Path) -> str:
    return min((dataset / "labelsTr").iterdir()).name.removesuffix(".nii.gz")


def test_without_nnunets_folder_of_raw_data_there_is_no_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    check = only(found(Level.PROBLEM))
    assert check.finding == "data set 7 not found: nnUNet_raw is not set" and "nnUNet_raw" in check.remedy


def test_a_data_set_that_is_not_there_is_named(dataset: Path) -> None:
    check, = check_dataset("Dataset008_Other")
    assert check.finding == f"data set Dataset008_Other not found: there is no folder {dataset.parent}/Dataset008_Other"


def test_no_labelled_case_is_a_problem(dataset: Path) -> None:
    for folder in ("imagesTr", "labelsTr"):
        shutil.rmtree(dataset / folder)
    edit_json(dataset, numTraining=0)
    check = only(found(Level.PROBLEM))
    assert check.finding == f"no labelled case in {dataset / 'imagesTr'}" and "labelsTr" in check.remedy


def test_another_number_of_labelled_cases_than_dataset_json_says_is_a_warning(dataset: Path) -> None:
    edit_json(dataset, numTraining=9)
    check = only(found(Level.WARNING))
    assert "numTraining in dataset.json is 9, but 5 cases have labels" in check.finding
    assert check.remedy == 'set "numTraining": 5'


def test_a_label_without_image_is_a_warning(dataset: Path) -> None:
    shutil.copy(dataset / "labelsTr" / f"{first_case(dataset)}.nii.gz", dataset / "labelsTr" / "orphan.nii.gz")
    assert f"1 labels in {dataset / 'labelsTr'} have no image: orphan" == only(found(Level.WARNING)).finding


def test_an_image_without_label_is_a_problem(dataset: Path) -> None:
    case = first_case(dataset)
    (dataset / "labelsTr" / f"{case}.nii.gz").unlink()
    edit_json(dataset, numTraining=4)
    assert f"1 cases in {dataset / 'imagesTr'} have no label: {case}" == only(found(Level.PROBLEM)).finding


def test_a_labelled_case_that_is_there_twice_is_a_warning(dataset: Path) -> None:
    case = first_case(dataset)
    shutil.copy(dataset / "imagesTr" / f"{case}_0000.nii.gz", dataset / "imagesTr" / "twin_0000.nii.gz")
    shutil.copy(dataset / "labelsTr" / f"{case}.nii.gz", dataset / "labelsTr" / "twin.nii.gz")
    edit_json(dataset, numTraining=6)
    check = only(found(Level.WARNING))
    assert "1 labelled cases are there twice: " in check.finding and "twin_0000.nii.gz" in check.finding


def test_a_name_in_both_folders_is_a_problem(dataset: Path) -> None:
    case = first_case(dataset)
    shutil.copy(dataset / "imagesTr" / f"{case}_0000.nii.gz", dataset / "imagesUn" / f"{case}_0000.nii.gz")
    names = [check.finding for check in found(Level.PROBLEM)]
    assert any(f"1 case(s) are both in imagesUn and in imagesTr: {case}" in finding for finding in names)


def test_images_that_nnunet_has_no_reader_for_are_a_problem(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_reader(*_: object, **__: object) -> None:
        raise RuntimeError("Unable to determine a reader")

    monkeypatch.setattr(file_contents, "determine_reader_writer_from_dataset_json", no_reader)
    check = only(found(Level.PROBLEM))
    example = dataset / "imagesTr" / f"{first_case(dataset)}_0000.nii.gz"
    assert check.finding == f"nnU-Net has no reader for {example}: Unable to determine a reader"
    assert "file_ending" in check.remedy
