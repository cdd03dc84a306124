"""`nnunetv2_semi postprocessing`, and reports of what it makes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_semi import cli
from nnunetv2_semi.commands.postprocessing import connected_structures, label_instead

LABELS = {"background": 0, "ring": 1, "core": 2, "spots": 3}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2, "spots": 3}


def write(file: Path, voxels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(voxels.astype(np.uint8)), str(file))


def organ() -> np.ndarray:
    """A ring around a core, and two spots."""
    voxels = np.zeros((6, 12, 12))
    voxels[1:5, 3:9, 3:9], voxels[2:4, 4:8, 4:8] = 1, 2
    voxels[1, 0, 0] = voxels[4, 11, 11] = 3
    return voxels


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two labelled cases, of which one has no core, and one test case."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name / "Dataset007_Mine").mkdir(parents=True)
        monkeypatch.setenv(name, str(tmp_path / name))
    raw = tmp_path / "nnUNet_raw" / "Dataset007_Mine"
    without_core = np.where(organ() == 2, 1, organ())
    for case, label in (("a", organ()), ("b", without_core)):
        write(raw / "imagesTr" / f"{case}_0000.nii.gz", label * 10)
        write(raw / "labelsTr" / f"{case}.nii.gz", label)
    write(raw / "labelsTs" / "t.nii.gz", organ())
    edit(raw, LABELS)
    return raw


def edit(raw: Path, labels: dict, **more: object) -> None:
    (raw / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MR"}, "labels": labels, "numTraining": 2,
                                                  "file_ending": ".nii.gz", **more}))  # fmt: skip


def test_structures_of_one_component_in_every_case_that_has_them(data_set: Path) -> None:
    assert connected_structures(str(data_set)) == {"ring": 1, "core": 2}
    edit(data_set, REGIONS, regions_class_order=[1, 2, 3])
    assert connected_structures(str(data_set)) == {"whole": (1, 2), "core": 2}
    edit(data_set, {**LABELS, "never": 4, "ignore": 5})
    assert connected_structures(str(data_set)) == {"ring": 1, "core": 2}  # of what no case has nothing is known


def test_a_case_with_the_ignore_label_is_no_proof_that_a_structure_is_connected(data_set: Path) -> None:
    edit(data_set, {**LABELS, "ignore": 4})
    annotated_in_part = organ()
    annotated_in_part[5, 5, 5] = 4
    write(data_set / "labelsTr" / "a.nii.gz", annotated_in_part)
    assert connected_structures(str(data_set)) == {"ring": 1}  # the core is in no other case
    write(data_set / "labelsTr" / "b.nii.gz", annotated_in_part)
    assert connected_structures(str(data_set)) == {}
    two_rings = organ()
    two_rings[1, 0, 0], two_rings[5, 11, 11] = 1, 4
    write(data_set / "labelsTr" / "a.nii.gz", two_rings)
    write(data_set / "labelsTr" / "b.nii.gz", organ())
    assert connected_structures(str(data_set)) == {"core": 2}


def test_islands_of_a_region_become_what_is_left_of_the_region_around_it(
    data_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nnunetv2.postprocessing.remove_connected_components import apply_postprocessing

    edit(data_set, {"background": 0, "whole": [1, 2], "core": 2, "spots": 3}, regions_class_order=[1, 2, 3])
    file = tmp_path / "mine.pkl"
    assert cli.main(["postprocessing", "-d", "7", "-o", str(file)]) == 0
    expected = organ()
    expected[2:4, 4:8, 6:8] = 1
    predicted = expected.copy()
    predicted[2, 4, 7] = 2  # in the ring
    predicted[5, 11, 0] = 2  # outside of all
    assert np.array_equal(apply_postprocessing(predicted, *pickle.loads(file.read_bytes())), expected)
    edit(data_set, {"background": 0, "all": [1, 2, 3], "core": 2, "ring": 1}, regions_class_order=[3, 2, 1])
    assert label_instead(2, [(1, 2, 3), 2, 1]) is None
    assert label_instead(2, [(1, 2), (2, 3)]) is None and label_instead(2, [(1, 2, 3, 4), (2, 3)]) == 3
    assert label_instead((2, 3), [(1, 2, 3), 4]) == 1 and label_instead(4, [(1, 2, 3), 4]) == 0
    capsys.readouterr()
    assert cli.main(["postprocessing", "-d", "7", "-o", str(file)]) == 1
    printed = capsys.readouterr()
    assert "core is left as predicted" in printed.out and "ring is left as predicted" in printed.out
    assert "Nothing is left that can be removed." in printed.err


def test_nnunets_own_command_applies_it(
    data_set: Path, tmp_path: Path, run_in_this_process, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["postprocessing", "-d", "7"]) == 0
    file = tmp_path / "nnUNet_preprocessed" / "Dataset007_Mine" / "semi_postprocessing.pkl"
    printed = capsys.readouterr().out
    assert printed.startswith("Connected in every labelled case: ring, core. ") and f"-pp_pkl_file {file}" in printed
    predicted = organ()
    predicted[0, 11, 0] = predicted[5, 0, 11] = 2
    write(tmp_path / "predicted" / "t.nii.gz", predicted)
    (tmp_path / "plans.json").write_text(json.dumps({"image_reader_writer": "SimpleITKIO"}))
    run_in_this_process(
        tmp_path, "nnUNetv2_apply_postprocessing", "-i", str(tmp_path / "predicted"), "-o", str(tmp_path / "cleaned"),
        "-pp_pkl_file", str(file), "-plans_json", str(tmp_path / "plans.json"), "-dataset_json",
        str(data_set / "dataset.json"), "-np", "1",
    )  # fmt: skip
    cleaned = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "cleaned" / "t.nii.gz")))
    assert np.array_equal(cleaned, organ())


def test_a_report_measures_what_it_makes(data_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("monai")
    import pandas as pd

    predicted = organ()
    predicted[0, 11, 0] = 2
    write(tmp_path / "predicted" / "t.nii.gz", predicted)
    file = tmp_path / "mine.pkl"
    assert cli.main(["postprocessing", "-d", "7", "-o", str(file)]) == 0
    call = ["benchmark", "report", "--truth", str(data_set / "labelsTs"), "--dataset-json",
            str(data_set / "dataset.json"), "--predictions", f"M={tmp_path / 'predicted'}", "--worst-cases", "0",
            "-np", "1", "-o"]  # fmt: skip
    assert cli.main([*call, str(tmp_path / "raw")]) == 0
    assert cli.main([*call, str(tmp_path / "clean"), "--postprocessing", str(file)]) == 0
    core = {name: pd.read_csv(tmp_path / name / "measures.csv").set_index("label").loc["core"]
            for name in ("raw", "clean")}  # fmt: skip
    assert core["raw"]["dice"] < 1 and core["raw"]["hd95_mm"] >= 0
    assert core["clean"]["dice"] == 1 and core["clean"]["hd95_mm"] == 0
    assert "postprocessed with mine.pkl" in (tmp_path / "clean" / "report.md").read_text()
    assert "postprocessed" not in (tmp_path / "raw" / "report.md").read_text()
    file.write_bytes(b"nothing")
    capsys.readouterr()
    assert cli.main([*call, str(tmp_path / "clean"), "--postprocessing", str(file)]) == 1
    assert "mine.pkl is not nnU-Net's postprocessing.pkl" in capsys.readouterr().err


def test_what_cannot_be_decided_is_an_error(data_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(data_set, {"background": 0, "a": 3, "b": 1, "c": 2})
    (data_set / "labelsTr" / "a.nii.gz").write_bytes(b"nothing")
    assert cli.main(["postprocessing", "-d", "7"]) == 1
    assert "a.nii.gz cannot be read" in capsys.readouterr().err
    for case in "ab":
        write(data_set / "labelsTr" / f"{case}.nii.gz", organ() == 3)
    edit(data_set, {"background": 0, "spots": 1})
    assert cli.main(["postprocessing", "-d", "7"]) == 1
    assert "No structure of Dataset007_Mine is connected in every labelled case" in capsys.readouterr().err
    for folder in ("imagesTr", "labelsTr"):
        for file in (data_set / folder).iterdir():
            file.unlink()
    assert cli.main(["postprocessing", "-d", "7"]) == 1
    assert "There are no labelled cases in" in capsys.readouterr().err
    assert cli.main(["postprocessing", "-d", "8"]) == 1
    assert "8" in capsys.readouterr().err
