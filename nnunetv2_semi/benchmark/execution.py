"""One training of a study, done with nnU-Net's own commands: train, predict the test cases."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nnunetv2_semi.benchmark.jobs import Job
from nnunetv2_semi.commands import CommandFailed, command_path, run_watched
from nnunetv2_semi.data.whole_files import read_json_object


def execute(job: Job, device: str, while_running: Callable[[], None] = lambda: None,
            cores: Sequence[int] | None = None) -> None:
    """Do what is left of a job; its state is in its folder before and after.

    device: ``cpu``, ``mps``, ``cuda`` or ``cuda:N``. while_running: called a few times per second; what it raises stops
    the job, which then waits for the next start. cores: of the processor, for commands on the CPU.

    Raises:
        CommandFailed: A command failed; also in the job's record.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    job.write_record("running", made_with=job.made_with(), labelled=_labelled_cases(job.raw))
    state = "waiting"
    try:
        _train(job, device, while_running, cores)
        _predict(job, device, while_running, cores)
        job.write_record("finished", training_seconds=_training_seconds(job.model), error=None)
        state = "finished"
    except CommandFailed as failure:
        job.write_record("failed", error=str(failure))
        state = "failed"
        raise
    finally:
        if state == "waiting":
            job.write_record("waiting")


def _train(job: Job, device: str, while_running: Callable[[], None], cores: Sequence[int] | None) -> None:
    if (job.model / "checkpoint_final.pth").is_file():
        return
    command = [command_path("nnUNetv2_train"), job.dataset, job.study.configuration, str(job.fold), "-tr",
               job.entry.trainer, "-p", job.plans_name, "-device", device.split(":")[0]]
    if any((job.model / f"checkpoint_{name}.pth").is_file() for name in ("latest", "best")):
        command.append("--c")
    run_watched(command, job.training_log, environment(device, cores), while_running, cores)


def _predict(job: Job, device: str, while_running: Callable[[], None], cores: Sequence[int] | None) -> None:
    cases = job.test_cases()
    shutil.rmtree(job.predictions, ignore_errors=True)  # a kill may have left half a file there
    command = [command_path("nnUNetv2_predict"), "-i", str(job.raw / "imagesTs"), "-o", str(job.predictions), "-d",
               job.dataset, "-c", job.study.configuration, "-f", str(job.fold), "-tr", job.entry.trainer, "-p",
               job.plans_name, "-chk", "checkpoint_final.pth", "-device", device.split(":")[0]]
    command += [] if job.study.test_time_mirroring else ["--disable_tta"]
    command += ["-npp", "1", "-nps", "1"] if device == "cpu" else []
    run_watched(command, job.folder / "prediction.log", environment(device, cores), while_running, cores)
    missing = [case for case in cases if not (job.predictions / case).is_file()]
    if missing:
        raise CommandFailed(f"nnUNetv2_predict left no prediction for {', '.join(missing)} in {job.predictions}.")


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


def _labelled_cases(raw: Path) -> int:
    ending = (read_json_object(str(raw / "dataset.json")) or {})["file_ending"]
    return sum(file.name.endswith(ending) for file in (raw / "labelsTr").iterdir())


def _training_seconds(model: Path) -> float:
    """Wall time of all epochs, whatever interrupted them, from nnU-Net's log in the final checkpoint."""
    import torch

    checkpoint = torch.load(model / "checkpoint_final.pth", map_location="cpu", weights_only=False, mmap=True)
    log = checkpoint["logging"]
    return float(sum(log["epoch_end_timestamps"]) - sum(log["epoch_start_timestamps"]))
