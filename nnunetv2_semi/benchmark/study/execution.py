"""One training of a study, done with nnU-Net's own commands: train, predict the test cases."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_semi.benchmark.study.jobs import MARKER, Job, State
from nnunetv2_semi.data.atomic_files import read_json_object, write_json_whole
from nnunetv2_semi.errors import shown
from nnunetv2_semi.processes.commands import CommandFailed, command_path, prediction_options, run_watched

FINAL = "checkpoint_final.pth"
SELFTRAIN_RESULT = "selftrain_result.json"


@dataclass(frozen=True)
class TrainedModel:
    """What predicts a job's test cases. trainings: fold folders of all trainings that it took, its own is the last; one
    that was fine-tuned counts once, since its log goes on from before."""

    dataset: str
    plans: str
    trainings: Sequence[Path]


def trained_model(job: Job) -> TrainedModel:
    """The model of a job that is trained."""
    if job.entry.selftrain is None:
        return TrainedModel(job.dataset, job.plans_name, [job.model])
    result = json.loads((_selftrain_folder(job) / SELFTRAIN_RESULT).read_text(encoding="utf-8"))
    return TrainedModel(result["dataset"], result["plans"], list(map(Path, result["trainings"])))


def execute(job: Job, device: str, while_running: Callable[[], None] = lambda: None,
            cores: Sequence[int] | None = None) -> None:
    """Do what is left of a job; its state is in its folder before and after. Two of one job take turns.

    device: ``cpu``, ``mps``, ``cuda`` or ``cuda:N``. while_running: called a few times per second; what it raises stops
    the job, which then waits for the next start. cores: of the processor, for commands on the CPU.

    Raises:
        CommandFailed: A command failed; also in the job's record.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with job.lock(while_running):
        if job.is_done():
            return
        job.write_record("running", made_with=job.made_with(), labelled=len(job.labelled_cases()), error=None)
        data = read_json_object(str(job.data_record))
        write_json_whole(str(job.model / MARKER), {
            "made_with": job.made_with(), "study": str(job.study.folder), "data": data and job.data_digest(data)})
        state: State = "waiting"
        try:
            _train(job, device, while_running, cores)
            images = job.test_images()
            _predict(job, device, while_running, cores)
            trainings = trained_model(job).trainings
            job.write_record("finished", model=str(trainings[-1]), training_seconds=sum(map(_seconds, trainings)),
                             test_images=images)
            state = "finished"
        except CommandFailed as failure:
            job.write_record("failed", error=str(failure))
            state = "failed"
            raise
        finally:
            if state == "waiting":
                job.write_record("waiting")


def _train(job: Job, device: str, while_running: Callable[[], None], cores: Sequence[int] | None) -> None:
    kind = device.split(":")[0]
    if job.entry.selftrain is not None:
        if (_selftrain_folder(job) / SELFTRAIN_RESULT).is_file():
            return
        command = [sys.executable, "-m", "nnunetv2_semi.cli", "selftrain", "-d", job.dataset, "-c",
                   job.study.configuration, "-f", str(job.fold), "-tr", job.entry.trainer, "-p", job.plans_name,
                   "-device", kind, "--out", str(_selftrain_folder(job)),
                   *_selftrain_options(job.entry.selftrain),
                   *([] if job.study.test_time_mirroring else ["--disable_tta"])]
    else:
        if zipfile.is_zipfile(job.model / FINAL):
            return
        command = [command_path("nnUNetv2_train"), job.dataset, job.study.configuration, str(job.fold), "-tr",
                   job.entry.trainer, "-p", job.plans_name, "-device", kind, *continue_option(job.model)]
    run_watched(command, job.training_log, environment(device, cores), while_running, cores)


def continue_option(model: Path) -> list[str]:
    """nnUNetv2_train's option that goes on with what is in a fold folder, if there is anything."""
    for name in ("final", "latest", "best"):
        file = model / f"checkpoint_{name}.pth"
        if file.is_file() and not zipfile.is_zipfile(file):
            file.unlink()  # nnU-Net's own trainer was killed while it wrote
    begun = any((model / f"checkpoint_{name}.pth").is_file() for name in ("latest", "best"))
    return ["--c"] if begun else []


def _selftrain_folder(job: Job) -> Path:
    return job.folder / "selftrain"


def _selftrain_options(options: Mapping[str, object]) -> list[str]:
    """Options of `nnunetv2_semi selftrain` as a study names them; switches are true or false."""
    named = {f"--{name.replace('_', '-')}": value for name, value in options.items() if value is not False}
    return [name if value is True else f"{name}={value}" for name, value in named.items()]


def _predict(job: Job, device: str, while_running: Callable[[], None], cores: Sequence[int] | None) -> None:
    cases, model = job.test_cases(), trained_model(job)
    shutil.rmtree(job.predictions, ignore_errors=True)  # a kill may have left half a file there
    command = [command_path("nnUNetv2_predict"), "-i", str(job.raw / "imagesTs"), "-o", str(job.predictions), "-d",
               model.dataset, "-c", job.study.configuration, "-f", str(job.fold), "-tr", job.entry.trainer, "-p",
               model.plans, "-chk", FINAL, *prediction_options(device.split(":")[0], job.study.test_time_mirroring)]
    run_watched(command, job.folder / "prediction.log", environment(device, cores), while_running, cores)
    missing = [case for case in cases if not (job.predictions / case).is_file()]
    if missing:
        raise CommandFailed(f"nnUNetv2_predict left no prediction for {shown(missing)} in {job.predictions}.")


def environment(device: str, cores: Sequence[int] | None) -> Mapping[str, str]:
    """Environment variables of a command that is to run on a device, beside others."""
    variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
    kind, _, number = device.partition(":")
    if kind == "cuda" and number:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(number)] if visible else number
    if kind == "cpu":
        # Threads that spin while they wait bring training to a standstill where other programs run too.
        variables |= {"OMP_WAIT_POLICY": "PASSIVE", "nnUNet_compile": "f"}
    if cores is not None:
        variables |= {"OMP_NUM_THREADS": str(len(cores)), "nnUNet_n_proc_DA": "0" if len(cores) == 1 else "1"}
    return variables


def _seconds(model: Path) -> float:
    """Wall time of all epochs, whatever interrupted them, from nnU-Net's log in the final checkpoint."""
    import torch

    checkpoint = torch.load(model / FINAL, map_location="cpu", weights_only=False, mmap=True)
    log = checkpoint["logging"]
    return float(sum(log["epoch_end_timestamps"]) - sum(log["epoch_start_timestamps"]))
