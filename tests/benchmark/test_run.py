"""A study through the command: killed and begun again, with a trainer that fails, on this machine and on a cluster."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_semi import cli
from nnunetv2_semi.benchmark.study import execution, local_pool, planned_data
from nnunetv2_semi.benchmark.study.cluster import cluster_executor
from nnunetv2_semi.benchmark.study.local_pool import check_devices
from nnunetv2_semi.benchmark.study.preparation import list_jobs, prepare
from nnunetv2_semi.benchmark.study.study import read_study
from nnunetv2_semi.errors import UserError

FAILING = '''
from nnunetv2_semi.training.stock_trainer import nnUNetTrainerSemiStock


class nnUNetTrainerThatFails(nnUNetTrainerSemiStock):
    def train_step(self, batch):
        raise RuntimeError("on purpose")
'''
STUDY = """
datasets: [1]
trainers:
  - nnUNetTrainerSemiSupervised
  - nnUNetTrainerSemiMeanTeacher
  - nnUNetTrainerThatFails
planner: nnUNetPlannerSemiCPU
seeds: [0]
test_time_mirroring: false
settings: {num_epochs: 4, num_iterations_per_epoch: 1, num_val_iterations_per_epoch: 1, save_every: 1, pictures: 0}
cluster: {executor: local, device: cpu, timeout_min: 10}
"""


def study_without(*trainers: str) -> str:
    """The study above, all but these of its trainers."""
    left_out = {f"  - {trainer}\n" for trainer in trainers}
    return "".join(line for line in STUDY.splitlines(keepends=True) if line not in left_out)


@pytest.fixture(scope="module")
def workspace(
    tmp_path_factory: pytest.TempPathFactory, worker_threads: Callable[[], AbstractContextManager[None]]
) -> Iterator[Path]:
    """nnU-Net's folders with a phantom that has a fingerprint and no plans, and a folder with a trainer that fails."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints

    from nnunetv2_semi.data.phantom import make_phantom_dataset

    folder = tmp_path_factory.mktemp("study")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "trainers"):
        (folder / name).mkdir()
    make_phantom_dataset(folder / "nnUNet_raw", 1, "Phantom", labelled=3, unlabelled=2, test=1, shape=(16, 20, 16))
    (folder / "trainers" / "nnUNetTrainerThatFails.py").write_text(FAILING)
    with pytest.MonkeyPatch.context() as patch, worker_threads():  # nnU-Net's command would draw 10^8 voxels
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(name, str(folder / name))
        extract_fingerprints([1], num_processes=1)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def planned(workspace: Path, monkeypatch: pytest.MonkeyPatch, run_in_this_process: Callable[..., str]) -> Path:
    """The workspace, planned, with nnU-Net's variables and commands in this process."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(workspace / name))
    monkeypatch.setenv("nnUNet_extTrainer", str(workspace / "trainers"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    monkeypatch.setattr(planned_data, "run_logged", lambda command, *further: run_in_this_process(
        workspace, Path(command[0]).name, *command[1:]))
    if not list((workspace / "nnUNet_preprocessed").glob("*/nnUNetSemiCPUPlans.json")):
        (workspace / "planned.yaml").write_text(STUDY)
        prepare(read_study(workspace / "planned.yaml"))
    return workspace


def start(workspace: Path, *arguments: str) -> subprocess.Popen[str]:
    folders = {name: str(workspace / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    return subprocess.Popen(
        [sys.executable, "-m", "nnunetv2_semi.cli", "benchmark", *arguments], text=True, cwd=workspace,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, **folders, "nnUNet_extTrainer": str(workspace / "trainers"), "nnUNet_def_n_proc": "1",
             "PYTHONPATH": os.pathsep.join(sys.path)})


def output_of(workspace: Path, *arguments: str) -> tuple[int, str]:
    process = start(workspace, *arguments)
    try:
        text, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    return process.returncode, text


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def processes_of(workspace: Path) -> list[str]:
    lines = subprocess.run(["ps", "-eo", "args"], text=True, capture_output=True, check=True).stdout.splitlines()
    return [line for line in lines if "nnUNetv2_" in line and "_study_" in line]


@pytest.mark.e2e
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_it_goes_on_and_a_failing_trainer_stops_no_other(workspace, monkeypatch, capsys, run_in_this_process):
    two_trainers = study_without("nnUNetTrainerSemiMeanTeacher")
    (workspace / "study.yaml").write_text(two_trainers)
    logs = workspace / "study" / "runs"
    killed = start(workspace, "run", "study.yaml", "--devices", "cpu")
    try:
        wait_for(lambda: any("Epoch 2" in log.read_text() for log in logs.glob("*/training.log")) or
                 killed.poll() is not None)
    finally:
        killed.send_signal(signal.SIGKILL)
        text, _ = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, text
    wait_for(lambda: not processes_of(workspace), 20)

    code, text = output_of(workspace, "run", "study.yaml", "--devices", "cpu", "cpu")
    assert code == 1 and "1 of 2 trainings finished" in text, text
    assert "FAILED: Dataset001_Phantom__ThatFails" in text.replace("nnUNetTrainer", "") and "on purpose" in text
    records = {file.parent.name: json.loads(file.read_text()) for file in logs.glob("*/run.json")}
    assert sorted(record["state"] for record in records.values()) == ["failed", "finished"]
    first = next(logs.glob("*Supervised*"))
    assert "Epoch 0" in (first / "training.log").read_text() and list((first / "predictions").glob("*.nii.gz"))
    assert records[first.name]["labelled"] == 3 and records[first.name]["training_seconds"] > 0
    finished = {file: file.stat().st_mtime_ns for file in workspace.rglob("checkpoint_final.pth")}
    assert len(finished) == 1

    (workspace / "trainers" / "nnUNetTrainerThatFails.py").write_text(FAILING.replace("raise", "pass  #").replace(
        'RuntimeError("on purpose")', "mended\n        return super().train_step(batch)"))
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(workspace / name))
    monkeypatch.setenv("nnUNet_extTrainer", str(workspace / "trainers"))
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.chdir(workspace)

    def run_watched(command, log, *_):
        log.write_text(run_in_this_process(workspace, Path(command[0]).name, *command[1:]))
        return 0.0

    monkeypatch.setattr(execution, "run_watched", run_watched)
    assert cli.main(["benchmark", "run", "study.yaml", "--devices", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "2 trainings in" in text and "1 to do" in text, text
    assert all(file.stat().st_mtime_ns == time_ for file, time_ in finished.items())
    assert cli.main(["benchmark", "status", "study.yaml"]) == 0

    # what was done with other data or settings is not mixed with what would be done now
    label = min((workspace / "nnUNet_raw" / "Dataset001_Phantom" / "labelsTr").iterdir())
    before = label.read_bytes()
    voxels = sitk.ReadImage(str(label))
    voxels[0, 0, 0] = 1 - voxels[0, 0, 0]
    sitk.WriteImage(voxels, str(label))
    assert cli.main(["benchmark", "run", "study.yaml", "--devices", "cpu"]) == 1
    changed = f"Dataset001_Phantom has changed since 2 trainings of the study began with it: labelsTr/{label.name}."
    assert changed in capsys.readouterr().err
    record = workspace / "study" / "data_Dataset001_Phantom.json"
    record.rename(record.with_suffix(".away"))  # as with the study's folder removed
    assert cli.main(["benchmark", "run", "study.yaml", "--devices", "cpu"]) == 1
    assert "Dataset001_Phantom has other data than models of the study were trained with" in capsys.readouterr().err
    record.with_suffix(".away").rename(record)
    label.write_bytes(before)
    assert cli.main(["benchmark", "run", "study.yaml", "--devices", "cpu"]) == 0

    # predictions of other test images are not reported; they are made again, and nothing is trained
    finished = {file: file.stat().st_mtime_ns for file in workspace.rglob("checkpoint_final.pth")}
    os.utime(next((workspace / "nnUNet_raw" / "Dataset001_Phantom" / "imagesTs").glob("*_0000.nii.gz")))
    assert cli.main(["benchmark", "report", "study.yaml", "--out", str(workspace / "report")]) == 1
    assert "since 2 trainings predicted them: Dataset001_Phantom__" in capsys.readouterr().err
    assert cli.main(["benchmark", "run", "study.yaml", "--devices", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "2 trainings in" in text and "2 to do" in text, text
    assert all(file.stat().st_mtime_ns == time_ for file, time_ in finished.items())
    assert cli.main(["benchmark", "run", "study.yaml", "--devices", "cpu"]) == 0
    (workspace / "study.yaml").write_text(two_trainers.replace("num_epochs: 4", "num_epochs: 5"))
    assert cli.main(["benchmark", "run", "study.yaml", "--devices", "cpu"]) == 1
    assert "2 trainings of the study were begun with other settings" in capsys.readouterr().err


@pytest.mark.e2e
def test_on_a_cluster(workspace):
    pytest.importorskip("submitit")
    one_trainer = study_without("nnUNetTrainerSemiSupervised", "nnUNetTrainerThatFails") + "control: MeanTeacher\n"
    (workspace / "clustered.yaml").write_text(one_trainer.replace("num_epochs: 4", "num_epochs: 1"))
    code, text = output_of(workspace, "run", "clustered.yaml", "--cluster")
    assert code == 0 and "1 of 1 trainings finished" in text, text
    folder = next((workspace / "clustered" / "runs").iterdir())
    assert json.loads((folder / "run.json").read_text())["state"] == "finished"
    assert json.loads((folder / "cluster.json").read_text())["executor"] == "local"


@pytest.mark.parametrize("change, message", [
    (("trainers:\n", "trainers:\n  - {trainer: nnUNetTrainerSemiSupervised, name: long, settings: {num_epochs: 9}}\n"),
     "iterations differs .*Supervised: 4.*meant_differences"),
    (("nnUNetTrainerThatFails", "nnUNetTrainerThatIsNowhere"), "finds no trainer nnUNetTrainerThatIsNowhere"),
    (("pictures: 0", "picture: 0"), "unknown setting 'picture'"),
    (("datasets: [1]", "datasets: [1, 2]"), "Data set 2 is not in"),
    (("datasets: [1]", "datasets: [1]\nupper_bound: Dataset001_Phantom"), "names a data set twice"),
    (("datasets: [1]", "datasets: [1]\nconfiguration: 3d_lowres"), "no configuration 3d_lowres"),
])
def test_what_would_go_wrong_is_said_before_anything_is_trained(planned, monkeypatch, change, message):
    (planned / "refused.yaml").write_text(STUDY.replace(*change))
    with pytest.raises(UserError) as error:
        prepare(read_study(planned / "refused.yaml"))
    assert re.search(message, str(error.value), re.DOTALL)
    assert not (planned / "refused" / "runs").exists()


def test_a_study_without_unlabelled_or_test_cases_is_refused(planned, tmp_path):
    raw = planned / "nnUNet_raw" / "Dataset001_Phantom"
    (planned / "study.yaml").write_text(STUDY)
    for folder, message in (("imagesUn", "needs unlabelled cases"), ("labelsTs", "subset --test")):
        (raw / folder).rename(tmp_path / folder)
        try:
            with pytest.raises(UserError, match=message):
                prepare(read_study(planned / "study.yaml"))
        finally:
            (tmp_path / folder).rename(raw / folder)


def test_test_cases_that_are_training_cases_are_named(planned, capsys):
    raw = planned / "nnUNet_raw" / "Dataset001_Phantom"
    (planned / "study.yaml").write_text(STUDY)
    job = list_jobs(read_study(planned / "study.yaml"))[0]
    planned_data.check_test_cases(job)
    assert "WARNING" not in capsys.readouterr().out
    source = min(raw.glob("imagesUn/*_0000.nii.gz"))
    voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(source)))
    copies = {raw / "imagesTs" / f"{name}_0000.nii.gz": image
              for name, image in (("same", voxels), ("flipped", np.ascontiguousarray(voxels[:, ::-1])))}
    try:
        for file, image in copies.items():
            sitk.WriteImage(sitk.GetImageFromArray(image), str(file))
        planned_data.check_test_cases(job)
    finally:
        for file in copies:
            file.unlink()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert len(lines) == 2
    place = Path(source.parent.name, source.name)
    assert lines[0].startswith("WARNING: 1 pair(s) of a test case of Dataset001_Phantom and a training case are the "
                               f"same image: same_0000.nii.gz = {place}. Results on these test cases mean nothing")
    assert "seem to show the same scan" in lines[1] and f"flipped_0000.nii.gz = {place}. Results" in lines[1]


def test_test_images_that_cannot_be_read_are_refused_before_training(planned):
    (planned / "study.yaml").write_text(STUDY)
    file = planned / "nnUNet_raw" / "Dataset001_Phantom" / "imagesTs" / "cut_off_0000.nii.gz"
    file.write_bytes(b"nothing")
    try:
        with pytest.raises(UserError, match=f"1 image.s. cannot be read. Replace them, .* cases: {file} ."):
            planned_data.check_test_cases(list_jobs(read_study(planned / "study.yaml"))[0])
    finally:
        file.unlink()


def test_files_that_macos_writes_beside_test_images_are_refused_before_training(planned):
    (planned / "study.yaml").write_text(STUDY)
    file = planned / "nnUNet_raw" / "Dataset001_Phantom" / "imagesTs" / "._test_0000.nii.gz"
    file.write_bytes(b"nothing")
    try:
        with pytest.raises(UserError, match="1 file.s. in .*imagesTs are no images, .*: ._test_0000.nii.gz. macOS"):
            planned_data.check_test_cases(list_jobs(read_study(planned / "study.yaml"))[0])
    finally:
        file.unlink()


@pytest.mark.parametrize("which", ["dataset.json", "plans"])
def test_a_file_that_is_not_valid_json_is_named(planned, which):
    (planned / "study.yaml").write_text(STUDY)
    job = list_jobs(read_study(planned / "study.yaml"))[0]
    file = job.raw / "dataset.json" if which == "dataset.json" else job.base_plans_file
    before = file.read_text()
    file.write_text(before.rstrip()[:-1] + ",}")
    try:
        with pytest.raises(UserError, match=f"{file}"):
            job.test_cases() if which == "dataset.json" else job.own_plans()
    finally:
        file.write_text(before)


def test_nnunets_split_is_written_once_and_folds_that_it_lacks_are_refused(planned):
    split = planned / "nnUNet_preprocessed" / "Dataset001_Phantom" / "splits_final.json"
    (planned / "folds.yaml").write_text(STUDY + "folds: [all, 2]\n")
    prepare(read_study(planned / "folds.yaml"))
    assert len(json.loads(split.read_text())) == 3  # three labelled cases
    (planned / "folds.yaml").write_text(STUDY + "folds: [3]\n")
    study = read_study(planned / "folds.yaml")
    with pytest.raises(UserError, match="has 3 folds.*asks for 3"):
        prepare(study)
    split.write_text("[{")
    with pytest.raises(UserError, match="splits_final.json is not valid JSON.*Correct the file; or remove it"):
        planned_data.write_split(study, list_jobs(study)[0])
    split.unlink()


@pytest.mark.e2e
def test_data_sets_can_share_one_plan(planned):
    from nnunetv2_semi.data.phantom import make_phantom_dataset

    make_phantom_dataset(planned / "nnUNet_raw", 2, "Other", labelled=2, unlabelled=1, test=1, shape=(12, 20, 16),
                         seed=1)
    (planned / "shared.yaml").write_text(STUDY.replace("[1]", "[1, 2]") + "plans_from: 1\n")
    prepared = prepare(read_study(planned / "shared.yaml"))
    first, second = (json.loads(file.read_text())["configurations"]["3d_fullres"] for file in sorted(
        planned.glob("nnUNet_preprocessed/*/nnUNetSemiCPUPlans.json")))
    assert first["patch_size"] == second["patch_size"] and first["spacing"] == second["spacing"]
    assert {job.dataset for job in prepared.jobs} == {"Dataset001_Phantom", "Dataset002_Other"}


@pytest.mark.parametrize("cluster, message", [
    ("{executor: local, device: cpu}", "must have timeout_min"),
    ("{executor: local, device: tpu, timeout_min: 1}", "device must be cuda or cpu"),
    ("{executor: nowhere, timeout_min: 1}", "cannot be used"),
    ("{executor: local, timeout_min: 1, partition_: x}", "cannot be used"),
])
def test_a_cluster_that_cannot_be_used_is_refused_first(tmp_path, cluster, message):
    pytest.importorskip("submitit")
    (tmp_path / "study.yaml").write_text(STUDY[:STUDY.index("cluster:")] + f"cluster: {cluster}\n")
    with pytest.raises(UserError, match=message):
        cluster_executor(read_study(tmp_path / "study.yaml"))


def test_an_unforeseen_error_in_one_training_stops_no_other(tmp_path, monkeypatch):
    done = []

    class Jobs(SimpleNamespace):
        def write_record(self, state, **further):
            self.state, self.error = state, further["error"]

    def execute(job, device, stop_if_asked, cores):
        if job.name == "first":
            raise OSError("disk is full")
        done.append(job.name)

    monkeypatch.setattr(local_pool, "execute", execute)
    first, second = Jobs(name="first", state="waiting"), Jobs(name="second", state="waiting")
    local_pool.run_on_devices([first, second], ["cpu"], SimpleNamespace(look=lambda: None))
    assert done == ["second"] and first.state == "failed" and "disk is full" in first.error


def test_what_an_earlier_run_left_does_not_count_as_failed_or_running(planned, monkeypatch):
    (planned / "resumed.yaml").write_text(study_without("nnUNetTrainerSemiMeanTeacher"))
    jobs = list_jobs(read_study(planned / "resumed.yaml"))
    for job, state in zip(jobs, ("failed", "running"), strict=True):
        job.folder.mkdir(parents=True)
        job.write_record(state, error="of then", labelled=3)
    seen = []
    monkeypatch.setattr(local_pool, "execute", lambda *_: seen.append([job.state for job in jobs]))
    local_pool.run_on_devices(jobs, ["cpu"], SimpleNamespace(look=lambda: None))
    assert seen == [["waiting", "waiting"]] * 2
    assert all(job.record["error"] is None and job.record["labelled"] == 3 for job in jobs)


def test_devices_that_are_not_there_are_refused():
    assert check_devices(["cpu", "cpu"]) == ["cpu", "cpu"]
    for device in ("cuda:99", "cpu:1", "tpu"):
        with pytest.raises(UserError, match=f"no device {device}"):
            check_devices([device])
