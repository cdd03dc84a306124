"""`nnunetv2_semi distill` on a phantom: what it makes, gone on with, and what it refuses."""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.training.logging import nnunet_logger

from nnunetv2_semi import cli
from nnunetv2_semi.benchmark.datasets.source_cases import Case, read_source
from nnunetv2_semi.benchmark.distillation import comparison
from nnunetv2_semi.benchmark.distillation.start import Start, checked_start
from nnunetv2_semi.benchmark.self_training import models
from nnunetv2_semi.benchmark.study.jobs import Folders
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.processes.commands import Progress
from nnunetv2_semi.trainer import nnUNetTrainerSemi

DATASET = "Dataset001_Phantom"
PLANS, SMALL = "nnUNetSemiCPUPlans", "smallPlans"
TEACHER, STUDENT = "nnUNetTrainerSemiCML", "nnUNetTrainerSemiDistill"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
SEMI = {"num_epochs": 2, "num_iterations_per_epoch": 1, "num_val_iterations_per_epoch": 1, "save_every": 1,
        "pictures": 0, "final_validation": False}  # fmt: skip
CALL = ["distill", "-d", "1", "-tr", TEACHER, "-p", PLANS, "--student", SMALL, "-device", "cpu", "--disable_tta"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, run_in_this_process: Callable[..., str]) -> Iterator[Path]:
    """nnU-Net's folders with a phantom, a teacher of folds 0 and all, and plans of a smaller student."""
    from nnunetv2_semi.data.phantom import make_phantom_dataset

    folder = tmp_path_factory.mktemp("distill")
    for name in FOLDERS:
        (folder / name).mkdir()
    make_phantom_dataset(folder / "nnUNet_raw", 1, "Phantom", labelled=3, unlabelled=2, test=1, shape=(16, 20, 16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nnunet_logger.MetaLogger, "plot_progress_png", lambda *arguments: None)
        run_in_this_process(folder, "nnUNetv2_plan_and_preprocess", "-d", "1", "-pl", "nnUNetPlannerSemiCPU", "-c",
                            "3d_fullres", "-npfp", "1", "-np", "1")  # fmt: skip
        file = folder / "nnUNet_preprocessed" / DATASET / f"{PLANS}.json"
        plans = json.loads(file.read_text())
        plans["configurations"]["3d_fullres"].setdefault("semi", {}).update(SEMI)
        file.write_text(json.dumps(plans))
        plans["plans_name"] = SMALL
        architecture = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        architecture["features_per_stage"] = [width // 2 for width in architecture["features_per_stage"]]
        (file.parent / f"{SMALL}.json").write_text(json.dumps(plans))
        for fold in ("0", "all"):
            run_in_this_process(folder, "nnUNetv2_train", "1", "3d_fullres", fold, "-p", PLANS, "-tr", TEACHER,
                                "-device", "cpu")  # fmt: skip
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def here(workspace: Path, monkeypatch: pytest.MonkeyPatch, run_in_this_process: Callable[..., str]) -> Path:
    """The workspace as nnU-Net's folders of this process, in which nnU-Net's commands run too."""
    for name in FOLDERS:
        monkeypatch.setenv(name, str(workspace / name))
    monkeypatch.setattr(nnunet_logger.MetaLogger, "plot_progress_png", lambda *arguments: None)

    def run(command: list[str], log: Path, environment: dict, progress: Progress) -> float:
        log.write_text(run_in_this_process(workspace, Path(command[0]).name, *command[1:]))
        return 0.0
    monkeypatch.setattr(models, "run_logged", run)
    return workspace


def student(workspace: Path, ending: str) -> Path:
    return workspace / "nnUNet_results" / DATASET / f"{STUDENT}__{SMALL}_distilled_{ending}__3d_fullres"


def load(file: Path) -> dict:
    return torch.load(file, map_location="cpu", weights_only=False)


def test_a_smaller_student_is_trained_compared_and_left_alone_afterwards(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, preprocessed, results = (here / name for name in FOLDERS)
    before = {file: file.read_bytes() for name in (PLANS, SMALL)
              for file in [preprocessed / DATASET / f"{name}.json"]}
    assert cli.main(CALL) == 0
    text = capsys.readouterr().out
    assert {file: file.read_bytes() for file in before} == before
    assert "perform_everything_on_device" not in text
    ending = f"SemiCML_{PLANS}_3d_fullres_fold_0"
    model, teacher = student(here, ending), results / DATASET / f"{TEACHER}__{PLANS}__3d_fullres"
    own = json.loads((model / "plans.json").read_text())["configurations"]["3d_fullres"]["semi"]
    assert own["num_epochs"] == 2 and own["Distillation"]["teacher"] == str(teacher)
    assert len(own["Distillation"]["teacher_sha256"]["0"]) == 64
    checkpoint = load(model / "fold_0" / "checkpoint_final.pth")
    trained = set(checkpoint["nnunetv2_semi"]["method_state"])
    assert trained == {"_extra_state", *(f"student.{name}" for name in checkpoint["network_weights"])}
    log = "".join(file.read_text() for file in (model / "fold_0").glob("training_log_*"))
    assert "distillation_unlabelled " in log and f"fold 0 in {teacher}" in log

    # the table: whole, of the fold's validation cases, and what nnU-Net's own evaluation says of the predictions
    out = results / DATASET / f"distill__{model.name}__fold_0"
    content = json.loads((out / "distill.json").read_text())
    with (out / "distill.csv").open() as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    val = json.loads((preprocessed / DATASET / "splits_final.json").read_text())[0]["val"]
    assert content["compared_on"] == "validation cases of fold 0" and f"{len(val)} validation cases of fold 0" in text
    labels = json.loads((raw / DATASET / "dataset.json").read_text())["labels"]
    for who, of_cases in content["cases"].items():
        assert sorted(of_cases) == sorted(val) and who in text
        for case, found in of_cases.items():
            prediction, truth = (sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{case}.nii.gz")))
                                 for folder in (out / "predictions" / who, raw / DATASET / "labelsTr"))
            for name, value in labels.items():
                if name == "background":
                    continue
                sizes = np.sum(prediction == value) + np.sum(truth == value)
                expected = 2 * np.sum((prediction == value) & (truth == value)) / sizes if sizes else None
                assert found["dice"][name] == pytest.approx(expected)
            assert 0 < found["network_seconds"] < found["seconds"]
    assert int(rows["student"]["parameters"]) < int(rows["teacher"]["parameters"]) / 2
    assert rows["teacher"]["networks"] == "1" and float(rows["student"]["seconds per case"]) > 0

    # again: nothing is trained or predicted
    times = {file: file.stat().st_mtime_ns for file in [*model.rglob("*.pth"), *out.rglob("*.nii.gz")]}
    assert cli.main(CALL) == 0
    assert "$ nnUNetv2_train" not in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert json.loads((out / "distill.json").read_text()) == content

    # another image of a case that both are compared on
    image_file = raw / DATASET / "imagesTr" / f"{min(val)}_0000.nii.gz"
    os.utime(image_file)
    assert cli.main(CALL) == 0
    capsys.readouterr()
    anew = {file for file in times if file.stat().st_mtime_ns != times[file]}
    assert anew == {out / "predictions" / who / f"{min(val)}.nii.gz" for who in ("teacher", "student")}

    # other data
    label = min((raw / DATASET / "labelsTr").iterdir())
    kept = label.read_bytes()
    image = sitk.ReadImage(str(label))
    image[0, 0, 0] = 1 - image[0, 0, 0]
    sitk.WriteImage(image, str(label))
    try:
        assert cli.main(CALL) == 1
        assert (f"{DATASET} has changed since the student's training began with it: labelsTr/{label.name}. Give anothe"
                in capsys.readouterr().err)
    finally:
        label.write_bytes(kept)

    # another teacher under the same name
    checkpoint_file = teacher / "fold_0" / "checkpoint_final.pth"
    kept = checkpoint_file.read_bytes()
    try:
        torch.save({**load(checkpoint_file), "current_epoch": 99}, checkpoint_file)
        assert cli.main(CALL) == 1
        assert "models were trained with it" in capsys.readouterr().err
    finally:
        checkpoint_file.write_bytes(kept)


def test_several_folds_teach_one_modality_to_a_student_that_is_exported_and_judged_on_test_cases(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = json.loads((here / "nnUNet_raw" / DATASET / "dataset.json").read_text())
    modality = list(dataset["channel_names"].values())[1]
    call = [*CALL, "-f", "0", "all", "--modality", modality, "--name", "mine", "--out", "out"]
    assert cli.main(call) == 0
    model = here / "nnUNet_results" / DATASET / f"{STUDENT}__mine__3d_fullres"
    content = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert content["fold"] == "all" and content["compared_on"] == "test cases" and content["modality"] == modality
    assert [row["networks"] for row in content["models"]] == [2, 1]
    case, = content["cases"]["student"]
    assert "nnUNetv2_predict -d" in capsys.readouterr().out

    # with that modality alone it predicts the same where this package is not (crops to the same box in a phantom)
    assert cli.main(["export", "-m", str(model), "-o", "exported"]) == 0
    exported = json.loads((tmp_path / "exported" / "dataset.json").read_text())
    assert exported["channel_names"] == {"0": modality}
    image = next((here / "nnUNet_raw" / DATASET / "imagesTs").glob(f"{case}_0001*"))
    found = comparison.predict(comparison.TrainedModel.checked("exported", ["all"], "checkpoint_final.pth"),
                               {case: comparison.Case({f"{case}_0000.nii.gz": str(image)}, {})}, tmp_path / "alone",
                               "cpu", False, "")
    first, second = (sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{case}.nii.gz")))
                     for folder in (found.folder, tmp_path / "out" / "predictions" / "student"))
    assert np.mean(first != second) < 0.01


def compared(folder: Path, channels: list[int] | None, ending: str = ".nii.gz") -> dict[str, Case]:
    """The cases of a data set that a student which sees ``channels`` is judged on, all of them test cases."""
    plans = SimpleNamespace(image_reader_writer_class=Tiff3DIO if ending == ".tif" else SimpleITKIO)
    known = {"source": read_source(folder.name), "fold": "all", "channels": channels,
             "teacher": SimpleNamespace(plans=plans)}
    return Start(**{**{field.name: None for field in fields(Start)}, **known}).cases_to_compare()[1]  # type: ignore


def test_a_student_of_one_modality_is_judged_on_cases_that_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TIFF, whose voxel size is in a file of its own: that is no image."""
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    folder = tmp_path / "Dataset003_Tiff"
    for split, cases in (("Tr", "a"), ("Ts", "bc")):
        for case in cases:
            for part, names in (("images", [f"{case}_0000", f"{case}_0001"]), ("labels", [case])):
                (folder / f"{part}{split}").mkdir(parents=True, exist_ok=True)
                (folder / f"{part}{split}" / f"{case}.json").write_text('{"spacing": [2, 1, 1]}')
                for name in names:
                    tifffile.imwrite(folder / f"{part}{split}" / f"{name}.tif", np.ones((3, 4, 5), np.uint8))
    (folder / "imagesTs" / "c_0001.tif").unlink()
    (folder / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "one": 1}, "numTraining": 1,
        "file_ending": ".tif"}))
    assert set(compared(folder, None, ".tif")) == set(compared(folder, [0], ".tif")) == {"b", "c"}
    case, = compared(folder, [1], ".tif").values()
    assert set(case.images) == {"b_0000.tif", "b_0001.tif"} and set(case.label) == {"b.tif"}
    assert set(case.files("i", "l")) == {"i/b_0000.tif", "i/b_0001.tif", "i/b.json", "l/b.tif", "l/b.json"}
    read, properties = Tiff3DIO().read_images(list(case.images.values()))
    assert read.shape == (2, 3, 4, 5) and list(properties["spacing"]) == [2, 1, 1]


def test_a_case_whose_one_file_holds_all_channels_has_each_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    folder = tmp_path / "Dataset003_Stacked"
    for part, name, shape in (("imagesTr", "a_0000", (2, 3, 4, 5)), ("labelsTr", "a", (3, 4, 5)),
                              ("imagesTs", "b_0000", (2, 3, 4, 5)), ("labelsTs", "b", (3, 4, 5))):
        (folder / part).mkdir(parents=True)
        image = sitk.GetImageFromArray(np.ones(shape, np.uint8), isVector=False)
        sitk.WriteImage(image, str(folder / part / f"{name}.nii.gz"))
    (folder / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "one": 1}, "numTraining": 1,
        "file_ending": ".nii.gz"}))
    assert set(compared(folder, [1])) == {"b"}


def test_stopped_it_goes_on_and_ends_with_the_same_weights(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = student(here, f"SemiCML_{PLANS}_3d_fullres_fold_0") / "fold_0" / "checkpoint_final.pth"
    if not whole.is_file():
        pytest.skip("the first test made nothing")
    call = [*CALL, "--name", "interrupted", "--out", str(here / "interrupted")]
    fold = here / "nnUNet_results" / DATASET / f"{STUDENT}__interrupted__3d_fullres" / "fold_0"
    on_epoch_end = nnUNetTrainerSemi.on_epoch_end

    def stop_after_the_first(trainer: nnUNetTrainerSemi) -> None:
        on_epoch_end(trainer)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(nnUNetTrainerSemi, "on_epoch_end", stop_after_the_first)
        assert cli.main(call) == 130
    assert "The same command goes on" in capsys.readouterr().err
    assert (fold / "checkpoint_latest.pth").is_file() and not (fold / "checkpoint_final.pth").exists()
    assert cli.main(call) == 0
    assert " --c\n" in capsys.readouterr().out
    first, second = (load(file)["network_weights"] for file in (whole, fold / "checkpoint_final.pth"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert (here / "interrupted" / "distill.csv").is_file()


@pytest.mark.parametrize("further, message", [
    (["--student", "otherPlans"], "There are no plans"),
    (["-f", "3"], "no checkpoint_final.pth for fold 3. Folds that have it: 0, all."),
    (["-tr", "nnUNetTrainer"], "is no trained model"),
    (["--modality", "PET"], "There is no modality 'PET'"),
    (["--student-configuration", "2d_other"], "have no configuration 2d_other"),
    (["--name", SMALL], "give another --name"),
    (["--name", PLANS], "is not a distillation's plans"),
])
def test_a_call_that_cannot_work_ends_before_training(
    here: Path, capsys: pytest.CaptureFixture[str], further: list[str], message: str
) -> None:
    assert cli.main([*CALL, *further]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("change, message", [
    ({"spacing": [1.0, 1.0, 2.5]}, "spacing in mm ("),
    ({"normalization_schemes": ["CTNormalization", "ZScoreNormalization"]}, "normalisation (["),
    ({"use_mask_for_norm": [True, True]}, "normalisation within the mask"),
    ({"preprocessor_name": "Other"}, "preprocessor (DefaultPreprocessor of the teacher, Other of the student)"),
    ({"data_identifier": "absent"}, "is not preprocessed for the student: nnUNetv2_preprocess -d 1 -plans_name"),
    ({"semi": {"Distillation": {"temprature": 3}}}, "Did you mean 'temperature'?"),
])
def test_a_student_that_does_not_fit_is_refused_with_the_difference_named(
    here: Path, capsys: pytest.CaptureFixture[str], change: dict, message: str
) -> None:
    folder = here / "nnUNet_preprocessed" / DATASET
    plans = json.loads((folder / f"{SMALL}.json").read_text())
    changed = copy.deepcopy(plans)
    changed["plans_name"] = "changedPlans"
    changed["configurations"]["3d_fullres"].update(change)
    (folder / "changedPlans.json").write_text(json.dumps(changed))
    assert cli.main([*CALL, "--student", "changedPlans"]) == 1
    error = capsys.readouterr().err
    assert message in error and not list(folder.glob("changedPlans_distilled*"))


def test_a_call_without_a_teacher_or_unlabelled_cases_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["distill", "-d", "1", "--student", SMALL]) == 1
    assert "Name the teacher: -tr TRAINER" in capsys.readouterr().err
    images = here / "nnUNet_raw" / DATASET / "imagesUn"
    images.rename(images.with_name("away"))
    try:
        assert cli.main(CALL) == 1
        assert "There are no unlabelled cases" in capsys.readouterr().err
    finally:
        images.with_name("away").rename(images)


def test_the_second_stage_of_a_cascade_cannot_be_a_student(tmp_path: Path) -> None:
    (tmp_path / DATASET).mkdir()
    stages = {"3d_lowres": {"architecture": {}},
              "3d_cascade_fullres": {"inherits_from": "3d_lowres", "previous_stage": "3d_lowres"}}
    (tmp_path / DATASET / f"{SMALL}.json").write_text(json.dumps({"plans_name": SMALL, "configurations": stages}))
    source = SimpleNamespace(name=DATASET, unlabelled={"a": None})
    with pytest.raises(UserError, match="3d_cascade_fullres is the second stage of a cascade, which cannot be a st"):
        checked_start(source, Folders(*[tmp_path] * 3), SimpleNamespace(), student=SMALL,
                      configuration="3d_cascade_fullres", modality=None, name=None)  # fmt: skip


def test_a_student_is_trained_by_one_command_at_a_time(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from filelock import FileLock

    model = student(here, f"SemiCML_{PLANS}_3d_fullres_fold_0")
    model.parent.mkdir(exist_ok=True)
    with FileLock(model.parent / f".distill__{model.name}__fold_0.lock"):
        assert cli.main(CALL) == 1
    assert "Another 'nnunetv2_semi distill' is at work on the same student" in capsys.readouterr().err


def test_a_teacher_of_another_data_set_is_compared_on_test_cases(tmp_path: Path) -> None:
    """Its split is another: the fold's validation cases may be its training cases."""
    (tmp_path / "splits_final.json").write_text('[{"train": ["a"], "val": ["b"]}]')
    source = SimpleNamespace(name=DATASET, labelled={"a": "case a", "b": "case b"}, test={"t": "case t"})
    start = {field.name: None for field in fields(Start)} | {
        "source": source, "fold": "0", "folders": Folders(tmp_path, tmp_path.parent, tmp_path)}
    for dataset, expected in ((DATASET, ("validation cases of fold 0", {"b": "case b"})),
                              ("Dataset009_Other", ("test cases", {"t": "case t"}))):
        teacher = SimpleNamespace(plans=SimpleNamespace(dataset_name=dataset))
        known = Start(**{**start, "teacher": teacher})  # type: ignore[arg-type]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Start, "preprocessed", property(lambda _: tmp_path))
            assert known.cases_to_compare() == expected
