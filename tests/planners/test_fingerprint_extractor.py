from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

from nnunetv2_semi.errors import UserError
from planners.nnUNetFingerprintExtractorSemi import nnUNetFingerprintExtractorSemi
from planners.nnUNetPlannerSemiCPU import nnUNetPlannerSemiCPU

DATASET = 2
INTENSITIES = "foreground_intensity_properties_per_channel"


@pytest.fixture(autouse=True)
def _threads(worker_threads):
    with worker_threads():
        yield


@pytest.fixture
def data_set(raw_dataset, tmp_path) -> tuple[Path, Path]:
    """Raw folder of two complete cases, and the fingerprint that is to be."""
    raw = raw_dataset()
    file = tmp_path / "preprocessed" / raw.name / "dataset_fingerprint.json"
    file.unlink()
    return raw, file


def extract(extractor_class=nnUNetFingerprintExtractorSemi, overwrite=True):
    extractor = extractor_class(DATASET, num_processes=1)
    extractor.show_progress_bar = False
    extractor.num_foreground_voxels_for_intensitystats = 4000
    return extractor.run(overwrite_existing=overwrite)


def test_where_nothing_is_missing_it_is_nnunets_fingerprint_byte_for_byte(data_set):
    raw, file = data_set
    extract(DatasetFingerprintExtractor)
    expected = file.read_bytes()
    file.unlink()
    extract()
    assert file.read_bytes() == expected


def test_a_data_set_without_all_channels_can_be_planned(data_set, write_case):
    raw, file = data_set
    write_case(raw, "imagesTr", "lab_2", (24, 28, 20), seed=5)
    complete = extract()
    (raw / "imagesTr" / "lab_0_0001.nii.gz").unlink()
    (raw / "imagesTr" / "lab_1_0001.nii.gz").unlink()
    (raw / "imagesTr" / "lab_2_0000.nii.gz").unlink()
    with pytest.raises(IndexError):  # why this extractor is there
        extract(DatasetFingerprintExtractor)
    found = extract()
    assert json.loads(file.read_text()) == json.loads(json.dumps(found))
    assert found.keys() == complete.keys()
    assert found["shapes_after_crop"] == [list(shape) for shape in complete["shapes_after_crop"]]
    assert found["spacings"] == complete["spacings"]
    assert found[INTENSITIES].keys() == {"0", "1"}
    plans = nnUNetPlannerSemiCPU(DATASET).plan_experiment()
    assert plans[INTENSITIES] == found[INTENSITIES]
    assert len(plans["configurations"]["3d_fullres"]["normalization_schemes"]) == 2


def test_an_existing_fingerprint_is_kept_if_not_told_otherwise(data_set):
    raw, file = data_set
    (raw / "imagesTr" / "lab_0_0001.nii.gz").unlink()
    file.write_text("{}")
    assert extract(overwrite=False) == {}
    assert set(extract()) > {"spacings"}


def test_mistakes_are_found_before_the_cases_are_read(data_set):
    raw, file = data_set
    for case in ("lab_0", "lab_1"):
        (raw / "imagesTr" / f"{case}_0001.nii.gz").unlink()
    content = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**content, "channel_names": {"0": "MR", "1": "CT"}}))
    with pytest.raises(UserError, match=r"1 \(CT\)"):
        extract()
    shutil.copy(raw / "imagesTr" / "lab_0_0000.nii.gz", raw / "imagesTr" / "lab_0_0007.nii.gz")
    with pytest.raises(UserError, match="lab_0_0007"):
        extract()
    assert not file.exists()
