from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunetv2_semi.errors import UserError
from planners.nnUNetPlannerSemiCPU import nnUNetPlannerSemiCPU
from planners.preprocessing.nnUNetPreprocessorSemi import nnUNetPreprocessorSemi

DATASET = 2


@pytest.fixture
def planned(raw_dataset, tmp_path) -> tuple[Path, Path]:
    """Raw and preprocessed folder of a data set with plans."""
    raw = raw_dataset(shape=(22, 28, 20))
    nnUNetPlannerSemiCPU(DATASET).plan_experiment()
    return raw, tmp_path / "preprocessed" / raw.name


@pytest.fixture(autouse=True)
def in_this_process(worker_threads):
    with worker_threads():
        yield


def run(preprocessor_class):
    preprocessor = preprocessor_class(verbose=False)
    preprocessor.show_progress_bar = False
    preprocessor.run(DATASET, "3d_fullres", "nnUNetSemiCPUPlans", num_processes=1)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_labelled_cases_are_as_nnunet_makes_them_and_unlabelled_ones_lie_apart(planned, write_case):
    raw, preprocessed = planned
    labelled = preprocessed / "nnUNetSemiCPUPlans_3d_fullres"
    run(DefaultPreprocessor)
    expected = {path.name: path.read_bytes() for path in labelled.iterdir()}
    shutil.rmtree(labelled)
    write_case(raw, "imagesUn", "un_0", (24, 28, 20), seed=9)
    run(nnUNetPreprocessorSemi)
    assert len(expected) == 6
    assert {path.name: path.read_bytes() for path in labelled.iterdir()} == expected
    unlabelled = preprocessed / "nnUNetSemiCPUPlans_3d_fullres_unlabeled"
    assert {path.name for path in unlabelled.iterdir() if path.is_file()} == {"un_0.b2nd", "un_0_seg.b2nd", "un_0.pkl"}


def test_cases_that_lack_nothing_are_as_nnunet_makes_them_though_others_lack_channels(planned, write_case, capsys):
    raw, preprocessed = planned
    write_case(raw, "imagesTr", "lab_2", (24, 28, 20), seed=5)
    labelled = preprocessed / "nnUNetSemiCPUPlans_3d_fullres"
    run(DefaultPreprocessor)
    expected = contents(labelled)
    (raw / "imagesTr" / "lab_1_0000.nii.gz").unlink()
    (raw / "imagesTr" / "lab_2_0001.nii.gz").unlink()
    write_case(raw, "imagesUn", "un_0", (24, 28, 20), seed=9)
    (raw / "imagesUn" / "un_0_0001.nii.gz").unlink()
    run(nnUNetPreprocessorSemi)
    found = contents(labelled)
    assert found.keys() == expected.keys()
    same = {name for name in expected if found[name] == expected[name]}
    assert same == {"lab_0.b2nd", "lab_0.pkl", "lab_0_seg.b2nd", "lab_1_seg.b2nd", "lab_2_seg.b2nd"}
    present = {f"lab_{index}": pickle.loads(found[f"lab_{index}.pkl"]).get("present_channels") for index in range(3)}
    assert present == {"lab_0": None, "lab_1": [1], "lab_2": [0]}
    image = nnUNetDatasetBlosc2(str(labelled)).load_case("lab_1")[0][:]
    assert image.shape[0] == 2 and np.signbit(image[0]).all() and not image[0].any()
    printed = capsys.readouterr().out
    assert "WARNING: 2 of 3 labelled cases lack channels (T2 only: 1, T1 only: 1): lab_1, lab_2." in printed
    assert "WARNING: 1 of 1 unlabelled cases lack channels (T1 only: 1): un_0." in printed


def test_labelled_files_that_do_not_fit_are_named_before_the_cases_are_done(planned):
    raw, preprocessed = planned
    shutil.move(raw / "imagesTr" / "lab_1_0001.nii.gz", raw / "imagesTr" / "lab_1_0002.nii.gz")
    with pytest.raises(UserError, match=r"Case lab_1.*lab_1_0002\.nii\.gz.*no channel 2"):
        run(nnUNetPreprocessorSemi)
    assert not (preprocessed / "nnUNetSemiCPUPlans_3d_fullres").exists()


def test_names_are_checked_before_the_labelled_cases_are_done(planned, write_case):
    raw, preprocessed = planned
    write_case(raw, "imagesUn", "lab_0", (24, 28, 20), seed=9)
    with pytest.raises(UserError, match="lab_0"):
        run(nnUNetPreprocessorSemi)
    assert not (preprocessed / "nnUNetSemiCPUPlans_3d_fullres").exists()


def test_the_plans_setting_skips_unreadable_cases(planned, write_case):
    raw, preprocessed = planned
    for index in range(2):
        write_case(raw, "imagesUn", f"un_{index}", (24, 28, 20), seed=7 + index)
    (raw / "imagesUn" / "un_1_0000.nii.gz").write_bytes(b"damaged")
    plans_file = preprocessed / "nnUNetSemiCPUPlans.json"
    plans = json.loads(plans_file.read_text())
    plans["configurations"]["3d_fullres"]["semi"]["skip_unreadable"] = True
    plans_file.write_text(json.dumps(plans))
    run(nnUNetPreprocessorSemi)
    names = {path.stem for path in (preprocessed / "nnUNetSemiCPUPlans_3d_fullres_unlabeled").glob("*.pkl")}
    assert names == {"un_0"}


def test_a_data_set_that_is_not_planned_is_told(planned):
    _, preprocessed = planned
    (preprocessed / "dataset.json").unlink()
    with pytest.raises(UserError, match=r"dataset\.json is missing. Plan the data set first \(nnUNetv2_plan_exp"):
        run(nnUNetPreprocessorSemi)
