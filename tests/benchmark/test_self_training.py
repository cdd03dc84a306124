"""Self-training through the command: killed and begun again; what it makes, and what it refuses."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunetv2_semi import cli
from nnunetv2_semi.benchmark.datasets.source_cases import read_source
from nnunetv2_semi.benchmark.self_training import command as self_training
from nnunetv2_semi.benchmark.self_training import models as self_training_models
from nnunetv2_semi.benchmark.self_training import pseudo_labelled
from nnunetv2_semi.benchmark.self_training.fine_tuning import begin_fine_tuning
from nnunetv2_semi.benchmark.self_training.input import Options, _check_fold, _number_of_folds, checked_start
from nnunetv2_semi.benchmark.self_training.models import Predictor
from nnunetv2_semi.benchmark.self_training.pseudo_labelled import pseudo_labelled_dataset
from nnunetv2_semi.benchmark.self_training.stability import read_scores, stability, write_scores
from nnunetv2_semi.benchmark.study import execution
from nnunetv2_semi.benchmark.study.jobs import Folders, Job
from nnunetv2_semi.benchmark.study.study import Entry, Study
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods.optimization import Optimization
from nnunetv2_semi.processes.commands import CommandFailed

SOURCE, NEW = "Dataset001_Phantom", "Dataset002_Phantom_selftrain1"
PLANS = "nnUNetSemiCPUPlans"
MODEL = f"nnUNetTrainerSemiSupervised__{PLANS}_selftrain__3d_fullres"
CALL = ["selftrain", "-d", "1", "-p", PLANS, "-f", "0", "--keep", "0.4", "--snapshots", "1", "-device", "cpu",
        "--disable_tta"]  # fmt: skip
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
SEMI = {"num_epochs": 3, "num_iterations_per_epoch": 1, "num_val_iterations_per_epoch": 1, "save_every": 1,
        "pictures": 0}  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, run_in_this_process: Callable[..., str]) -> Iterator[Path]:
    """nnU-Net's folders with a planned and preprocessed phantom."""
    from nnunetv2_semi.data.phantom import make_phantom_dataset

    folder = tmp_path_factory.mktemp("selftrain")
    for name in FOLDERS:
        (folder / name).mkdir()
    make_phantom_dataset(folder / "nnUNet_raw", 1, "Phantom", labelled=3, unlabelled=3, test=1, shape=(16, 20, 16))
    run_in_this_process(folder, "nnUNetv2_plan_and_preprocess", "-d", "1", "-pl", "nnUNetPlannerSemiCPU", "-c",
                        "3d_fullres", "-npfp", "1", "-np", "1")  # fmt: skip
    file = folder / "nnUNet_preprocessed" / SOURCE / f"{PLANS}.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"].setdefault("semi", {}).update(SEMI)
    file.write_text(json.dumps(plans))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def here(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workspace as nnU-Net's folders of this process."""
    for name in FOLDERS:
        monkeypatch.setenv(name, str(workspace / name))
    return workspace


def variables(workspace: Path) -> dict[str, str]:
    return {**os.environ, **{name: str(workspace / name) for name in FOLDERS}, "nnUNet_def_n_proc": "1",
            "nnUNet_n_proc_DA": "0", "nnUNet_compile": "f", "PYTHONPATH": os.pathsep.join(sys.path)}  # fmt: skip


def start(workspace: Path, call: list[str] = CALL) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "nnunetv2_semi.cli", *call], text=True, env=variables(workspace),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip


def cases(folder: Path) -> list[str]:
    names = (file.name.removesuffix(".nii.gz") for file in folder.iterdir())
    return sorted({name[:-5] if folder.name.startswith("images") else name for name in names})


def voxels(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def contents(workspace: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for name in FOLDERS for file in (workspace / name).rglob("*") if file.is_file()}


@pytest.fixture
def run_until(
    here: Path, monkeypatch: pytest.MonkeyPatch, run_in_this_process: Callable[..., str]
) -> Callable[[list[str], str], None]:
    """Begins a call, with nnU-Net's commands in this process, and stops it before the one that has a word in it."""
    def begin(call: list[str], word: str) -> None:
        def run_logged(command: list[str], log: Path, *_: object) -> float:
            if any(word in argument for argument in command):
                raise CommandFailed("stopped")
            log.write_text(run_in_this_process(here, Path(command[0]).name, *command[1:]))
            return 0.0

        for name, value in variables(here).items():
            monkeypatch.setenv(name, value)
        with monkeypatch.context() as patch:
            patch.setattr(self_training_models, "run_logged", run_logged)
            assert cli.main(call) == 1
    return begin


@pytest.mark.e2e
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_it_goes_on_labels_the_stable_cases_and_leaks_no_validation_case(
    workspace: Path, run_until: Callable[[list[str], str], None]
) -> None:
    raw, preprocessed, results = (workspace / name for name in FOLDERS)
    out = results / SOURCE / f"selftrain__{MODEL}__fold_0"
    run_until(CALL, "nnUNetv2_preprocess")
    killed = start(workspace)
    try:
        end = time.monotonic() + 600
        while not (out / f"preprocess_{NEW}.log").exists() and killed.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        killed.send_signal(signal.SIGKILL)
        text, _ = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, text
    finished = [*(results / SOURCE).rglob("checkpoint_*.pth"), *out.rglob("*.nii.gz"), raw / NEW / "selftrain.json"]
    before = {file: file.stat().st_mtime_ns for file in finished}
    assert len(list(out.rglob("*.nii.gz"))) == 2 * 3

    process = start(workspace)
    try:
        text, _ = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 0, text
    assert text.count("$ nnUNetv2_") == 2 and "nnUNetv2_preprocess" in text, text
    assert {file: file.stat().st_mtime_ns for file in finished} == before

    # one of three unlabelled cases, the most stable one, has its final prediction as label
    scores = read_scores(out / "round_1" / "stability.csv")
    record = json.loads((raw / NEW / "selftrain.json").read_text())
    (kept,) = record["pseudo_labelled"]
    assert scores[kept] == max(score for score in scores.values() if score is not None)
    assert record["stability"] == scores and record["made_by"]["dataset"] == SOURCE
    labels = cases(raw / SOURCE / "labelsTr")
    assert cases(raw / NEW / "imagesTr") == cases(raw / NEW / "labelsTr") == sorted([*labels, kept])
    assert cases(raw / NEW / "imagesUn") == sorted(set(cases(raw / SOURCE / "imagesUn")) - {kept})
    for folder in ("imagesTs", "labelsTs"):
        assert cases(raw / NEW / folder) == cases(raw / SOURCE / folder)
    label = raw / NEW / "labelsTr" / f"{kept}.nii.gz"
    assert not label.is_symlink() and (raw / NEW / "labelsTr" / f"{labels[0]}.nii.gz").is_symlink()
    assert np.array_equal(voxels(label), voxels(out / "round_1" / "predictions" / "final" / label.name))
    assert json.loads((raw / NEW / "dataset.json").read_text())["numTraining"] == 4
    assert (out / "round_1" / "stability.png").read_bytes().startswith(b"\x89PNG")

    # the same plans and fold, with validation cases that have true labels and that nothing was trained on
    first, second = (json.loads((preprocessed / dataset / f"{PLANS}_selftrain.json").read_text())
                     for dataset in (SOURCE, NEW))  # fmt: skip
    assert second == {**first, "dataset_name": NEW}
    assert first["configurations"]["3d_fullres"]["semi"].items() >= {**SEMI, "snapshots": 1}.items()
    ours, theirs = (json.loads((preprocessed / name / "splits_final.json").read_text())[0] for name in (NEW, SOURCE))
    assert ours["val"] == theirs["val"] and ours["train"] == [*theirs["train"], kept]
    assert not set(ours["val"]) & {*ours["train"], *cases(raw / SOURCE / "imagesUn")}

    result = json.loads((out / "selftrain_result.json").read_text())
    assert result["dataset"] == NEW and result["plans"] == f"{PLANS}_selftrain"
    assert result["model"] == result["trainings"][-1] == str(results / NEW / MODEL / "fold_0")
    assert all((Path(model) / "checkpoint_final.pth").is_file() for model in result["trainings"])
    assert f"nnUNetv2_predict -d {NEW} -c 3d_fullres -f 0 -p {PLANS}_selftrain" in text


def test_finished_it_does_nothing_more_and_mixes_no_options(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (here / "nnUNet_results" / NEW).exists():
        pytest.skip("the test before made nothing")
    before = contents(here)
    assert cli.main(CALL) == 0
    assert "$ nnUNetv2_" not in capsys.readouterr().out and contents(here) == before
    assert cli.main([*CALL, "--keep", "0.9"]) == 1
    assert "keep was 0.4, now 0.9" in capsys.readouterr().err
    assert cli.main([*CALL, "--snapshots", "2"]) == 1
    assert "models were trained with it" in capsys.readouterr().err
    for option, change in ((["--teachers", "2"], "teachers was 1, now 2"),
                           (["--ignore-unstable"], "ignore_unstable was False, now True"),
                           (["--finetune", "0.4"], "finetune was 0.0, now 0.4")):
        assert cli.main([*CALL, *option]) == 1
        assert change in capsys.readouterr().err
    assert contents(here) == before


def test_models_of_other_labels_or_images_are_not_taken_up(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (here / "nnUNet_results" / NEW).exists():
        pytest.skip("a test before made nothing")
    record = here / "nnUNet_results" / SOURCE / f"selftrain__{MODEL}__fold_0_data.json"
    noted = record.read_bytes()
    assert {name.split("/")[0] for name in json.loads(noted)} == {"imagesTr", "labelsTr", "imagesUn",
                                                                  "splits_final.json"}
    for folder in ("labelsTr", "imagesUn"):
        file = min((here / "nnUNet_raw" / SOURCE / folder).iterdir())
        before = file.read_bytes()
        image = sitk.ReadImage(str(file))
        image[0, 0, 0] = 1 - image[0, 0, 0]
        sitk.WriteImage(image, str(file))
        # what it predicted is there even without the teacher
        teacher = here / "nnUNet_results" / SOURCE / MODEL
        try:
            assert cli.main(CALL) == 1
            teacher.rename(teacher.with_name("away"))
            assert cli.main(CALL) == 1
        finally:
            file.write_bytes(before)
            if not teacher.exists():
                teacher.with_name("away").rename(teacher)
        message = f"{SOURCE} has changed since the self-training began with it: {folder}/{file.name}. Begin anew: "
        assert capsys.readouterr().err.count(message) == 2
        assert record.read_bytes() == noted
    record.unlink()  # as with models of earlier versions
    assert cli.main(CALL) == 0 and record.read_bytes() == noted


def test_results_of_a_version_without_some_options_are_gone_on_with(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = here / "nnUNet_results" / SOURCE / f"selftrain__{MODEL}__fold_0"
    if not out.exists():
        pytest.skip("the first test made nothing")
    options, record = out / "selftrain_options.json", here / "nnUNet_raw" / NEW / "selftrain.json"
    before = {file: json.loads(file.read_text()) for file in (options, record)}
    new = ("teachers", "ignore_unstable", "finetune", "teacher_folds")
    made_by = {key: value for key, value in before[record]["made_by"].items() if key not in new}
    options.write_text(json.dumps({key: value for key, value in before[options].items() if key not in new}))
    record.write_text(json.dumps({**before[record], "made_by": made_by}))
    try:
        assert cli.main(CALL) == 0
        assert "$ nnUNetv2_" not in capsys.readouterr().out
        assert json.loads(options.read_text()) == before[options]
    finally:
        record.write_text(json.dumps(before[record]))


@pytest.mark.e2e
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_ensemble_labels_what_is_stable_and_the_student_is_fine_tuned_on_true_labels(
    workspace: Path, run_until: Callable[[list[str], str], None]
) -> None:
    raw, preprocessed, results = (workspace / name for name in FOLDERS)
    trainer, plans_name, out = "nnUNetTrainerSemiMeanTeacher", f"{PLANS}_selftrain", workspace / "ensemble"
    call = [*CALL, "-tr", trainer, "-f", "all", "--teachers", "2", "--ignore-unstable", "--finetune", "0.4", "--out",
            str(out)]  # fmt: skip
    split = preprocessed / SOURCE / "splits_final.json"
    split_before = split.read_bytes() if split.exists() else None
    run_until(call, "_finetuned")
    killed = start(workspace, call)

    def tuned() -> list[Path]:
        return list((results / SOURCE).glob(f"{trainer}__{plans_name}_finetuned*/fold_all"))

    try:
        end = time.monotonic() + 1200
        while not (tuned() and list(tuned()[0].glob("training_log_*"))) and killed.poll() is None \
                and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        killed.send_signal(signal.SIGKILL)
        text, _ = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, text
    process = start(workspace, call)
    try:
        text, _ = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 0, text
    assert text.count("$ nnUNetv2_") == 1 and "nnUNetv2_train" in text and " --c" in text, text

    # two teachers that differ in the seed; the pseudo-label is the prediction of both together
    models = [results / SOURCE / f"{trainer}__{name}__3d_fullres" / "fold_all" / "checkpoint_final.pth"
              for name in (plans_name, f"{plans_name}_teacher2")]  # fmt: skip
    weights = [torch.load(model, map_location="cpu", weights_only=False)["network_weights"] for model in models]
    assert any(not torch.equal(first, second) for first, second in zip(*map(dict.values, weights), strict=True))
    assert [(out / "ensemble" / f"fold_{number}" / "checkpoint_final.pth").resolve() for number in range(2)] == models
    folders = {name: out / "round_1" / "predictions" / name for name in ("final", "teacher_1", "teacher_2")}
    assert sorted(path.name for path in (out / "round_1" / "predictions").iterdir()) == sorted(folders)
    scores = read_scores(out / "round_1" / "stability.csv")
    for case, score in scores.items():
        final, *members = (voxels(folder / f"{case}.nii.gz") for folder in folders.values())
        assert score == stability(final, members, structures(raw))

    # voxels on which they differ are ignored
    result = json.loads((out / "selftrain_result.json").read_text())
    (student,) = {file.parent for file in raw.glob("*/selftrain.json")} - {raw / NEW}
    record = json.loads((student / "selftrain.json").read_text())
    wanted = {"teachers": 2, "ignore_unstable": True, "finetune": 0.4, "keep": 0.4, "fold": "all"}
    assert record["made_by"].items() >= wanted.items() and result["options"].items() >= wanted.items()
    assert record["teachers"] == [str(model.parent) for model in models]
    (kept,) = record["pseudo_labelled"]
    final, *members = (voxels(folder / f"{kept}.nii.gz") for folder in folders.values())
    labels = json.loads((student / "dataset.json").read_text())["labels"]
    ignore = max(json.loads((raw / SOURCE / "dataset.json").read_text())["labels"].values()) + 1
    assert labels["ignore"] == ignore
    differ = (members[0] != final) | (members[1] != final)
    assert np.array_equal(voxels(student / "labelsTr" / f"{kept}.nii.gz"), np.where(differ, ignore, final))

    # the student's epochs and those on the original data set make up a whole training, the later ones with the
    # learning rate of their place in it
    fine_tuned, first = tuned()[0], results / student.name / f"{trainer}__{plans_name}__3d_fullres" / "fold_all"
    before, after = (torch.load(model / "checkpoint_final.pth", map_location="cpu", weights_only=False)
                     for model in (first, fine_tuned))  # fmt: skip
    assert before["current_epoch"] == 2 and after["current_epoch"] == 3
    assert after["logging"]["train_losses"][:2] == before["logging"]["train_losses"]
    expected = before["logging"]["lrs"][0] * (1 - 2 / 3) ** 0.9
    assert after["logging"]["lrs"][2] == pytest.approx(expected)
    assert after["init_args"]["dataset_json"] == json.loads((preprocessed / SOURCE / "dataset.json").read_text())
    assert result["dataset"] == SOURCE and result["plans"] == fine_tuned.parent.name.split("__")[1]
    assert result["trainings"] == [*record["teachers"], str(fine_tuned)] and result["model"] == str(fine_tuned)
    assert f"nnUNetv2_predict -d {SOURCE} -c 3d_fullres -f all -p {result['plans']}" in text
    assert (split.read_bytes() if split.exists() else None) == split_before


@pytest.mark.e2e
def test_the_models_of_all_folds_label_together(
    here: Path, run_until: Callable[[list[str], str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    raw, _, results = (here / name for name in FOLDERS)
    out, trainer = here / "folds", "nnUNetTrainerSemiFixMatch"
    call = [*CALL, "-tr", trainer, "-f", "all", "--teacher-folds", "--out", str(out)]
    run_until(call, "_selftrain1")  # before the student's training
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ nnUNetv2_")]
    models = [results / SOURCE / MODEL.replace("nnUNetTrainerSemiSupervised", trainer) / f"fold_{fold}"
              for fold in range(3)]  # fmt: skip
    assert [" ".join(line.split()[1:5]) for line in commands[:3]] == [
        f"nnUNetv2_train {SOURCE} 3d_fullres {fold}" for fold in range(3)]  # fmt: skip
    assert all((model / "checkpoint_final.pth").is_file() for model in models)

    # the label is the prediction of the folds together, as nnU-Net makes it; a case is as stable as the folds agree
    predictions = {name: out / "round_1" / "predictions" / name for name in ("final", "fold_0", "fold_1", "fold_2")}
    assert sorted(path.name for path in (out / "round_1" / "predictions").iterdir()) == sorted(predictions)
    assert [line.split(" -f ")[1].split(" -tr")[0] for line in commands[3:7]] == ["0 1 2", "0", "1", "2"]
    for case, score in read_scores(out / "round_1" / "stability.csv").items():
        final, *members = (voxels(folder / f"{case}.nii.gz") for folder in predictions.values())
        assert score == stability(final, members, structures(raw))
    (record,) = [content for file in raw.glob("*/selftrain.json")
                 if (content := json.loads(file.read_text()))["made_by"]["folder"] == str(out)]  # fmt: skip
    assert record["teachers"] == list(map(str, models)) and record["made_by"]["teacher_folds"] is True


def test_folds_of_a_single_labelled_case_are_refused(here: Path) -> None:
    options = Options(SOURCE, "3d_fullres", "all", PLANS, "nnUNetTrainerSemiSupervised", 0.5, 1, True,
                      teacher_folds=True)  # fmt: skip
    with pytest.raises(UserError, match="needs two folds of .*, which has 0. Leave it out, or write your own splits"):
        _check_fold(options, _number_of_folds(here, 1), here)


def structures(raw: Path) -> list[list[int]]:
    labels = json.loads((raw / SOURCE / "dataset.json").read_text())["labels"]
    return [[value] for value in labels.values() if value]


def test_teachers_have_seeds_of_their_own_and_fine_tuning_does_not_lengthen_a_training(here: Path) -> None:
    options = Options(SOURCE, "3d_fullres", "all", PLANS, "nnUNetTrainerSemiSupervised", 0.5, 1, True, 3, False, 0.4)
    start = checked_start(options, read_source(SOURCE), Folders.from_environment())

    def semi(plans: dict) -> dict:
        return plans["configurations"]["3d_fullres"]["semi"]

    teachers = [start.teacher_plans(number) for number in (1, 2, 3)]
    assert [plans["plans_name"].removeprefix(PLANS) for plans in teachers] == [
        "_selftrain", "_selftrain_teacher2", "_selftrain_teacher3"]  # fmt: skip
    assert [semi(plans).get("seed", 0) for plans in teachers] == [0, 1000, 2000]
    assert [semi(plans)["num_epochs"] for plans in teachers] == [3, 3, 3]
    assert semi(start.student_plans())["num_epochs"] == start.student_epochs == 2
    assert semi(start.fine_tuning_plans("Dataset012_New"))["num_epochs"] == 3 and start.fine_tuning_epochs == 1
    assert start.student_plans()["plans_name"] == f"{PLANS}_selftrain"
    assert start.fine_tuning_plans("Dataset012_New")["plans_name"] == f"{PLANS}_selftrain_finetuned012"

    # what the trainer's own section says would win over what is set beside it
    semi(start.plans)["Supervised"] = {"seed": 5, "num_epochs": 100, "labelled_mixing": 1.0}
    assert [semi(start.teacher_plans(number))["Supervised"]["seed"] for number in (1, 2)] == [5, 1005]
    student = semi(start.student_plans())
    assert student["Supervised"] == {"seed": 5, "labelled_mixing": 1.0} and student["num_epochs"] == 2


def test_fine_tuning_begins_with_all_of_the_student_and_another_student_is_refused(tmp_path: Path) -> None:
    student, model, weights = tmp_path / "student", tmp_path / "model", torch.rand(3)
    of_second_network = Optimization.sgd([torch.nn.Parameter(weights.clone())], 0.1, 0, 0.9, 2).state_dict()
    student.mkdir()

    def trained(finished: float) -> None:
        torch.save({
            "logging": {"epoch_end_timestamps": [1.0, finished]}, "init_args": {"fold": "all", "plans": {}},
            "network_weights": {"seg_layers.0.weight": weights}, "current_epoch": 2,
            "nnunetv2_semi": {"optimizer_states": [of_second_network]},
        }, student / "checkpoint_final.pth")  # fmt: skip

    trained(2.0)
    begin_fine_tuning(student, model, {"plans_name": "P"}, {})
    begun = model / "checkpoint_latest.pth"
    content = begun.read_bytes()
    written = torch.load(begun, weights_only=False)
    assert written["init_args"] == {"fold": "all", "plans": {"plans_name": "P"}, "dataset_json": {}}
    assert torch.equal(written["network_weights"]["seg_layers.0.weight"], weights) and written["current_epoch"] == 2
    assert written["nnunetv2_semi"]["optimizer_states"] == [of_second_network]
    begin_fine_tuning(student, model, {"plans_name": "P"}, {})
    assert begun.read_bytes() == content
    trained(3.0)
    with pytest.raises(CommandFailed, match="was fine-tuned from another student"):
        begin_fine_tuning(student, model, {"plans_name": "P"}, {})


def test_the_page_tells_the_defaults_of_the_command() -> None:
    parser = argparse.ArgumentParser()
    self_training.add_arguments(parser)
    page = (Path(__file__).parents[2] / "docs" / "baselines.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `--([a-z-]+)` \| (\S+) \|", page, re.MULTILINE))
    options = parser.parse_args(["-d", "7"])
    assert options.keep == 0.9
    assert told == {"keep": f"{options.keep:g}", "snapshots": str(options.snapshots),
                    "teachers": str(options.teachers), "finetune": f"{options.finetune:g}",
                    "rounds": str(options.rounds), "ignore-unstable": "on" if options.ignore_unstable else "off",
                    "teacher-folds": "on" if options.teacher_folds else "off"}


@pytest.mark.parametrize("change, message", [
    (["-d", "9"], "Could not find a dataset with the ID 9"),
    (["-p", "nnUNetPlans"], "There is no .*nnUNetPlans.json"),
    (["-c", "2d"], "is not preprocessed: nnUNetv2_preprocess -d 1 .* -c 2d"),
    (["-c", "3d"], "have no configuration 3d; they have .*3d_fullres"),
    (["-tr", "nnUNetTrainerSemiNone"], "finds no trainer nnUNetTrainerSemiNone"),
    (["-tr", "nnUNetTrainer"], "nnUNetTrainer keeps no checkpoints on the way"),
    (["-tr", "nnUNetTrainerSemiStock"], "nnUNetTrainerSemiStock keeps no checkpoints on the way"),
    (["-tr", "nnUNetTrainerSemiMeanTeacher", "--keep", "0.9"], "leaves no unlabelled case"),
    (["-f", "3"], "3 folds .* no fold 3"),
    (["--keep", "0"], "--keep must be above 0"),
    (["--rounds", "0"], "--rounds must be at least 1"),
    (["--snapshots", "3"], "3 epochs has no room for 3 snapshots"),
    (["--snapshots", "2", "--finetune", "0.4"], "2 epochs has no room for 2 snapshots"),
    (["--teacher-folds"], "--teacher-folds needs -f all: .* validation cases of fold 0"),
    (["-f", "all", "--teacher-folds", "--teachers", "2"], "Give --teachers or --teacher-folds"),
    (["--teachers", "0"], "--teachers must be at least 1"),
    (["--finetune", "1"], "--finetune must be at least 0 and below 1"),
    (["--finetune", "0.1"], "--finetune 0.1 of 3 epochs leaves no epoch for the fine-tuning"),
])  # fmt: skip
def test_a_wrong_call_is_refused_before_anything_starts(
    here: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, change: list[str], message: str
) -> None:
    assert cli.main([*CALL, "--out", str(tmp_path / "out"), *change]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_missing_variables_and_unlabelled_cases_are_told(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(here / "nnUNet_raw" / SOURCE, tmp_path / SOURCE, ignore=lambda folder, names: {"imagesUn"})
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    assert cli.main(CALL) == 1
    assert "There are no unlabelled cases in" in capsys.readouterr().err
    monkeypatch.delenv("nnUNet_results")
    assert cli.main(CALL) == 1
    assert "missing: nnUNet_results" in capsys.readouterr().err


def test_the_second_stage_of_a_cascade_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / SOURCE
    folder.mkdir()
    stages = {"3d_lowres": {"architecture": {}},
              "3d_cascade_fullres": {"inherits_from": "3d_lowres", "previous_stage": "3d_lowres"}}
    (folder / f"{PLANS}.json").write_text(json.dumps({"plans_name": PLANS, "configurations": stages}))
    (folder / "dataset_fingerprint.json").write_text("{}")
    options = Options(SOURCE, "3d_cascade_fullres", "all", PLANS, "nnUNetTrainerSemiSupervised", 0.5, 1, False)
    with pytest.raises(UserError, match="3d_cascade_fullres is the second stage of a cascade, which self-training"):
        checked_start(options, SimpleNamespace(name=SOURCE, unlabelled={"a": None}), Folders(*[tmp_path] * 3))


def test_without_a_free_id_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pseudo_labelled, "free_ids", lambda after, count: [])
    source = SimpleNamespace(folder=str(tmp_path / SOURCE), name=SOURCE, labelled={}, unlabelled={})
    with pytest.raises(UserError, match="There is no free id from 2 to 999 for the pseudo-labelled data set"):
        pseudo_labelled_dataset(source, 1, {}, [], tmp_path, {}, [])


def test_the_same_models_are_trained_by_one_command_at_a_time(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from filelock import FileLock

    results = here / "nnUNet_results" / SOURCE
    results.mkdir(exist_ok=True)
    with FileLock(results / f".selftrain__{MODEL}__fold_0.lock"):
        assert cli.main(CALL) == 1
    assert "Another 'nnunetv2_semi selftrain' is at work on the same models" in capsys.readouterr().err


def test_a_labelled_image_among_the_unlabelled_ones_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(here / "nnUNet_raw" / SOURCE, tmp_path / SOURCE)
    case = cases(tmp_path / SOURCE / "imagesTr")[0]
    for image in (tmp_path / SOURCE / "imagesTr").glob(f"{case}_*"):
        shutil.copy(image, tmp_path / SOURCE / "imagesUn" / image.name.replace(case, "renamed"))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    assert cli.main([*CALL, "--out", str(tmp_path / "out")]) == 1
    assert "1 unlabelled case(s) hold the same image as a labelled case: renamed_0000" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_is_refused_before_a_teacher_trains(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(here / "nnUNet_raw" / SOURCE, tmp_path / SOURCE)
    cut_off = sorted((tmp_path / SOURCE / "imagesUn").iterdir())[0]
    cut_off.write_bytes(cut_off.read_bytes()[:200])
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    assert cli.main([*CALL, "--out", str(tmp_path / "out")]) == 1
    assert f"1 image(s) cannot be read. Replace them, or remove these cases: {cut_off} (" in capsys.readouterr().err
    cut_off.with_name(f"._{cut_off.name}").touch()
    assert cli.main([*CALL, "--out", str(tmp_path / "out")]) == 1
    assert f"nnU-Net reads them as cases: ._{cut_off.name}" in capsys.readouterr().err


def test_predictions_that_a_kill_cut_off_are_made_again(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folders = Folders.from_environment()
    start = checked_start(Options(SOURCE, "3d_fullres", "all", PLANS, "nnUNetTrainerSemiSupervised", 0.5, 1, True),
                          read_source(SOURCE), folders)  # fmt: skip
    steps = self_training.SelfTraining(start, folders, tmp_path, "cpu", 1)
    whole = min((here / "nnUNet_raw" / SOURCE / "labelsTr").iterdir())
    unfinished = tmp_path / "predictions" / "final.unfinished"
    unfinished.mkdir(parents=True)
    done, cut_off, missing = (unfinished / file for file in steps.files)
    shutil.copy(whole, done)
    cut_off.write_bytes(whole.read_bytes()[:-40])
    asked = []

    def run_logged(*arguments: object) -> float:
        asked.append([file.name for file in (done, cut_off, missing) if not file.exists()])
        shutil.copy(whole, cut_off)
        if len(asked) == 2:
            shutil.copy(whole, missing)
        return 0

    monkeypatch.setattr(self_training_models, "run_logged", run_logged)
    final = Predictor("final", "nnUNetv2_predict", ["-d", SOURCE])
    with pytest.raises(CommandFailed, match=f"no prediction for {missing.name}"):
        steps.predict(final, tmp_path)
    folder = steps.predict(final, tmp_path)
    assert asked == [[cut_off.name, missing.name], [missing.name]]
    assert sorted(file.name for file in folder.iterdir()) == steps.files and not unfinished.exists()


def test_two_at_a_time_get_different_ids_and_each_finds_its_own_again(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(here / "nnUNet_raw" / SOURCE, tmp_path / SOURCE)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    source = read_source(SOURCE)
    kept = sorted(source.unlabelled)
    for case in kept:
        shutil.copy(min((tmp_path / SOURCE / "labelsTr").iterdir()), tmp_path / f"{case}.nii.gz")

    def made(keep: float) -> str:
        return pseudo_labelled_dataset(source, 1, {"keep": keep}, [tmp_path], tmp_path, dict.fromkeys(kept, keep), kept)

    with ThreadPoolExecutor(4) as threads:
        names = list(threads.map(made, [0.1, 0.2, 0.3, 0.4]))
    assert len({name[:10] for name in names}) == 4
    assert [made(keep) for keep in (0.1, 0.2, 0.3, 0.4)] == names
    assert not (tmp_path / names[0] / "imagesUn").exists()  # all are labelled now
    with pytest.raises(UserError, match=f"{names[0]} has the pseudo-labels of other predictions, or of other cases"):
        pseudo_labelled_dataset(source, 1, {"keep": 0.1}, [tmp_path], tmp_path, dict.fromkeys(kept, 0.9), kept)


def test_a_true_label_is_never_overwritten_by_a_predicted_one(here: Path, monkeypatch: pytest.MonkeyPatch,
                                                              tmp_path: Path) -> None:
    """A case that became labelled after it was predicted."""
    shutil.copytree(here / "nnUNet_raw" / SOURCE, tmp_path / SOURCE)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    source = read_source(SOURCE)
    case = min(source.labelled)
    label = tmp_path / SOURCE / "labelsTr" / f"{case}.nii.gz"
    before = label.read_bytes()
    (tmp_path / label.name).write_bytes(b"predicted")
    with pytest.raises(UserError, match=f"would get two files named labelsTr/{label.name}"):
        pseudo_labelled_dataset(source, 1, {}, [], tmp_path, {case: 0.9}, [case])
    assert label.read_bytes() == before


def test_stabilities_of_other_cases_are_not_taken_up(tmp_path: Path) -> None:
    write_scores(tmp_path / "stability.csv", {"a": 0.5, "b": 0.75}, ["b"])
    steps = self_training.SelfTraining.__new__(self_training.SelfTraining)
    steps.source, steps.options = SimpleNamespace(unlabelled={"b": None, "c": None}), SimpleNamespace(keep=0.5)
    with pytest.raises(UserError, match="Other cases are unlabelled than when .* was made: a, c. Begin anew"):
        steps.rate(tmp_path, [], tmp_path / "stability.csv")
    steps.source.unlabelled = {"a": None, "b": None}
    assert steps.rate(tmp_path, [], tmp_path / "stability.csv") == ({"a": 0.5, "b": 0.75}, ["b"])


def test_a_study_predicts_with_the_model_that_self_training_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = Folders(*(tmp_path / name for name in FOLDERS))
    for name in ("labelsTr", "labelsTs"):
        (folders.raw / SOURCE / name).mkdir(parents=True)
    (folders.raw / SOURCE / "labelsTs" / "case.nii.gz").touch()
    (folders.raw / SOURCE / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz"}))
    (folders.preprocessed / SOURCE).mkdir(parents=True)
    (folders.preprocessed / SOURCE / "P.json").write_text(json.dumps({"configurations": {"3d_fullres": {}}}))
    entry = Entry("nnUNetTrainerSemiSupervised", selftrain={"rounds": 1, "keep": 0.3, "teachers": 2,
                                                            "ignore_unstable": True, "finetune": 0.2,
                                                            "teacher_folds": False})
    job = Job(Study(tmp_path / "study", (1,), (entry,)), entry, SOURCE, "method", "all", 0, "P", folders)
    trainings = [tmp_path / "teacher", tmp_path / "student"]
    commands = []

    def run_watched(command: list[str], *further: object) -> None:
        commands.append(command)
        if "selftrain" in command:
            parser = argparse.ArgumentParser()
            self_training.add_arguments(parser)
            call = parser.parse_args(command[command.index("selftrain") + 1 :])
            assert (call.rounds, call.keep, call.teachers) == (1, 0.3, 2)
            assert call.ignore_unstable is True and call.finetune == 0.2 and call.teacher_folds is False
            out = call.out
            out.mkdir(parents=True)
            (out / "selftrain_result.json").write_text(json.dumps(
                {"dataset": NEW, "plans": "Q", "trainings": list(map(str, trainings))}))  # fmt: skip
            for seconds, model in enumerate(trainings, 3):
                model.mkdir()
                log = {"epoch_start_timestamps": [0.0], "epoch_end_timestamps": [float(seconds)]}
                torch.save({"logging": log}, model / "checkpoint_final.pth")
        else:
            job.predictions.mkdir(parents=True)
            (job.predictions / "case.nii.gz").touch()

    image = job.raw / "imagesTs" / "case_0000.nii.gz"
    image.parent.mkdir()
    image.touch()
    (image.parent / "no_test_case_0000.nii.gz").touch()
    monkeypatch.setattr(execution, "run_watched", run_watched)
    monkeypatch.setattr(execution, "command_path", lambda name: name)
    execution.execute(job, "cuda:1")
    training, prediction = (" ".join(command) for command in commands)
    assert f"selftrain -d {SOURCE} -c 3d_fullres -f all -tr {entry.trainer} -p {job.plans_name}" in training
    assert "--rounds=1 --keep=0.3" in training and "-device cuda " in training
    assert f"-d {NEW} " in prediction and "-p Q " in prediction
    assert job.record["model"] == str(trainings[-1]) and job.record["training_seconds"] == 3 + 4
    assert job.record["method"] == "Supervised, self-training"
    assert list(job.record["test_images"]) == [image.name] and job.is_done()
    image.write_text("another")
    assert not job.is_done()
