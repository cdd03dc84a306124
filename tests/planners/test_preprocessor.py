from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

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


def run(preprocessor_class):
    preprocessor = preprocessor_class(verbose=False)
    preprocessor.show_progress_bar = False
    preprocessor.run(DATASET, "3d_fullres", "nnUNetSemiCPUPlans", num_processes=1)


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
