"""What doctor says of plans, preprocessed cases, sizes and intensities."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_semi.data.file_contents import FileContent
from nnunetv2_semi.data.phantom import make_phantom_dataset
from nnunetv2_semi.doctor.checks import Check, Level
from nnunetv2_semi.doctor.dataset import check_dataset
from nnunetv2_semi.doctor.preprocessed import check_intensities

RESAMPLING = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
CONFIGURATION = {
    "data_identifier": "Plans_3d_fullres", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
    "patch_size": [8, 8, 8], "normalization_schemes": ["ZScoreNormalization"] * 2, "use_mask_for_norm": [False] * 2,
    "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": RESAMPLING,
    "resampling_fn_seg": "resample_data_or_seg_to_shape", "resampling_fn_seg_kwargs": {**RESAMPLING, "is_seg": True},
    "architecture": {"network_class_name": "unused", "arch_kwargs": {}, "_kw_requires_import": []},
}  # fmt: skip


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tmp_path_factory.mktemp("raw")
    return make_phantom_dataset(raw, 7, "Phantom", labelled=5, unlabelled=2, test=0, shape=(12, 12, 14), channels=2)


def spacing_of(dataset: Path) -> list[float]:
    return list(sitk.ReadImage(str(min((dataset / "imagesTr").iterdir()))).GetSpacing())[::-1]


def plan(dataset: Path, **changes: object) -> PlansManager:
    plans = {
        "dataset_name": dataset.name, "plans_name": "Plans", "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2], "foreground_intensity_properties_per_channel": {"0": {}, "1": {}},
        "label_manager": "LabelManager",
        "configurations": {"3d_fullres": {**CONFIGURATION, "spacing": spacing_of(dataset), **changes}},
    }  # fmt: skip
    folder = Path(os.environ["nnUNet_preprocessed"], dataset.name)
    folder.mkdir(exist_ok=True)
    (folder / "Plans.json").write_text(json.dumps(plans))
    return PlansManager(plans)


@pytest.fixture
def preprocessed(dataset: Path) -> Path:
    """The raw folder of the data set, whose labelled cases are preprocessed."""
    manager, dataset_json = plan(dataset), json.loads((dataset / "dataset.json").read_text())
    folder = Path(os.environ["nnUNet_preprocessed"], dataset.name, "Plans_3d_fullres")
    folder.mkdir()
    for label in (dataset / "labelsTr").iterdir():
        case = label.name.removesuffix(".nii.gz")
        DefaultPreprocessor(False).run_case_save(
            str(folder / case), sorted(map(str, (dataset / "imagesTr").glob(f"{case}_*"))), str(label), manager,
            manager.get_configuration("3d_fullres"), dataset_json)
    return dataset


def rewrite(path: Path, spacing: float = 1, scale: float = 1, value: float | None = None) -> None:
    image = sitk.ReadImage(str(path))
    voxels = sitk.GetArrayFromImage(image).astype(np.float32) * scale
    if value is not None:
        voxels[3] = value
    changed = sitk.GetImageFromArray(voxels)
    changed.SetSpacing([size * spacing for size in image.GetSpacing()])
    changed.SetOrigin(image.GetOrigin())
    sitk.WriteImage(changed, str(path))


def cases(dataset: Path, folder: str) -> list[Path]:
    return sorted((dataset / folder).glob("*_0000.nii.gz"))


def found(level: Level) -> list[Check]:
    return [check for check in check_dataset("7") if check.level is level]


def only(checks: list[Check]) -> Check:
    assert len(checks) == 1, [check.line() for check in checks]
    return checks[0]


def test_what_is_preprocessed_is_compared_and_right(preprocessed: Path) -> None:
    lines = [check.line() for check in check_dataset("7")]
    assert "OK       the preprocessed cases in Plans_3d_fullres are those of the raw data set" in lines
    assert "OK       all 7 cases can be resampled to Plans, 3d_fullres" in lines
    assert not [line for line in lines if not line.startswith("OK")]


def test_a_case_moved_to_the_unlabelled_ones_is_a_problem(preprocessed: Path) -> None:
    image = cases(preprocessed, "imagesTr")[0]
    case = image.name.removesuffix("_0000.nii.gz")
    for path in image.parent.glob(f"{case}_*"):
        shutil.move(path, preprocessed / "imagesUn")
    (preprocessed / "labelsTr" / f"{case}.nii.gz").unlink()
    check = only(found(Level.PROBLEM))
    assert f"{case} (preprocessed, but not a labelled case of the raw data set any more)" in check.finding
    assert "nnUNetv2_preprocess -d 7 -plans_name Plans -c 3d_fullres" in check.remedy


def test_a_changed_image_is_a_problem(preprocessed: Path) -> None:
    rewrite(cases(preprocessed, "imagesTr")[0], value=77)
    assert "its image, or the plans, changed" in only(found(Level.PROBLEM)).finding


def test_a_preprocessed_case_that_is_no_image_is_a_problem(preprocessed: Path) -> None:
    import blosc2

    folder = Path(os.environ["nnUNet_preprocessed"], preprocessed.name, "Plans_3d_fullres")
    stored = min(file for file in folder.glob("*.b2nd") if "_seg" not in file.name)
    voxels = blosc2.open(str(stored))[:] * np.nan
    stored.unlink()
    blosc2.asarray(np.ascontiguousarray(voxels), urlpath=str(stored))
    check = only(found(Level.PROBLEM))
    assert "1 cases in" in check.finding and "are no images: " in check.finding and "NaN" in check.finding
    assert check.remedy.startswith("replace or remove their files, then nnUNetv2_preprocess")


def test_preprocessed_cases_that_cannot_be_compared_are_a_problem(preprocessed: Path) -> None:
    folder = Path(os.environ["nnUNet_preprocessed"], preprocessed.name, "Plans_3d_fullres")
    with open(min(folder.glob("*.pkl")), "wb") as file:
        pickle.dump({}, file)
    assert "cannot be compared with the raw data set: KeyError" in only(found(Level.PROBLEM)).finding


def test_a_case_that_a_plan_leaves_no_voxel_of_is_a_problem(dataset: Path) -> None:
    plan(dataset, spacing=[1000.0, 1.0, 1.0])
    check = only(found(Level.PROBLEM))
    assert "7 cases cannot be resampled (Plans, 3d_fullres)" in check.finding and "no voxel" in check.finding
    assert "skip_unreadable" in check.remedy


@pytest.mark.parametrize("planned", [True, False])
def test_a_voxel_size_in_micrometres_is_a_problem_before_planning_too(dataset: Path, planned: bool) -> None:
    if planned:
        plan(dataset)
    name = cases(dataset, "imagesUn")[0].name.removesuffix("_0000.nii.gz")
    for path in (dataset / "imagesUn").glob(f"{name}_*"):
        rewrite(path, spacing=1000)
    check = only(found(Level.PROBLEM))
    assert f"1 cases cannot be resampled ({'Plans, 3d_fullres' if planned else 'the usual voxel size'}" in check.finding
    assert f"{name} (its size is" in check.finding and "of memory" in check.finding


def test_many_more_voxels_than_usual_are_a_warning(dataset: Path) -> None:
    name = cases(dataset, "imagesUn")[0].name.removesuffix("_0000.nii.gz")
    for path in (dataset / "imagesUn").glob(f"{name}_*"):
        rewrite(path, spacing=10)
    check = only(found(Level.WARNING))
    assert "1 cases have many more voxels than a usual labelled one" in check.finding and name in check.finding


@pytest.mark.parametrize("value", [-3.4e38, 1e7])
def test_unlabelled_intensities_far_outside_the_labelled_ones_are_a_warning(dataset: Path, value: float) -> None:
    path = cases(dataset, "imagesUn")[0]
    rewrite(path, value=value)
    check = only(found(Level.WARNING))
    assert f"1 unlabelled images have intensities far from those of the labelled ones: {path.name} (" in check.finding


def test_a_ct_in_other_units_is_a_warning_and_an_mr_is_not() -> None:
    labelled, unlabelled = {"a": ["a_0000.nii.gz"]}, {"b": ["b_0000.nii.gz"]}
    contents = {name: FileContent(name, False, (1, 4, 4, 4), (1.0, 1.0, 1.0), intensities=intensities) for
                name, intensities in (("a_0000.nii.gz", (-1000.0, -50.0, 2000.0)), ("b_0000.nii.gz", (0.0, 0.4, 1.0)))}
    for name, expected in (("CT", 1), ("T1", 0)):
        dataset_json = {"channel_names": {"0": name}, "file_ending": ".nii.gz"}
        assert len(list(check_intensities(labelled, unlabelled, contents, dataset_json))) == expected


def test_labels_that_are_none_are_a_problem(dataset: Path) -> None:
    label = min((dataset / "labelsTr").iterdir())
    rewrite(label, scale=0.9999)
    check = only(found(Level.PROBLEM))
    assert "1 labels are no labels of this data set" in check.finding and "0.9999" in check.finding
    assert label.name.removesuffix(".nii.gz") in check.finding
