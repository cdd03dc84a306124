"""The trainings of a study on this machine, one at a time on each device."""

from __future__ import annotations

import os
import queue
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from nnunetv2_semi.benchmark.study.execution import execute
from nnunetv2_semi.benchmark.study.jobs import Job
from nnunetv2_semi.benchmark.study.progress import StudyBar
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.processes.commands import CommandFailed

SECONDS_BETWEEN_LOOKS = 0.5


class _Stopped(Exception):
    """The user stopped the study."""


def run_on_devices(jobs: Sequence[Job], devices: Sequence[str], bar: StudyBar) -> None:
    """Do all jobs, N at a time on N devices; a failing one is recorded and does not stop the others.

    However this ends, even killed, the commands it started end with it.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    stop = threading.Event()

    def stop_if_asked() -> None:
        if stop.is_set():
            raise _Stopped

    def work(device: str, cores: Sequence[int] | None) -> None:
        while not stop.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                execute(job, device, stop_if_asked, cores)
            except CommandFailed:
                pass  # in the job's record
            except _Stopped:
                return
            except Exception:  # a disk that is full, a file that is gone: the other jobs go on
                job.write_record("failed", error=traceback.format_exc())

    with ThreadPoolExecutor(len(devices)) as threads:
        try:
            workers = [threads.submit(work, *slot) for slot in zip(devices, _cores(devices), strict=True)]
            while wait(workers, SECONDS_BETWEEN_LOOKS).not_done:
                bar.look()
            for worker in workers:
                worker.result()
        finally:
            stop.set()
    bar.look()


def check_devices(devices: Sequence[str]) -> list[str]:
    """The devices asked for, or all GPUs, or the CPU.

    Raises:
        UserError: There is no such device.
    """
    import torch

    gpus = torch.cuda.device_count()
    if not devices:
        return [f"cuda:{number}" for number in range(gpus)] or (
            ["mps"] if torch.backends.mps.is_available() else ["cpu"])
    for device in devices:
        kind, _, number = device.partition(":")
        usable = {"cpu": not number, "mps": not number and torch.backends.mps.is_available(),
                  "cuda": gpus > 0 and (not number or (number.isdigit() and int(number) < gpus))}
        if not usable.get(kind, False):
            raise UserError(f"There is no device {device} here. Devices are cpu, mps, cuda:0 to cuda:N; "
                            f"this machine has {gpus} GPUs.")
    return list(devices)


def _cores(devices: Sequence[str]) -> list[Sequence[int] | None]:
    """Cores per device: several trainings on the CPU share them out, others take what they find."""
    on_cpu = sum(device == "cpu" for device in devices)
    if on_cpu < 2 or not hasattr(os, "sched_getaffinity"):
        return [None] * len(devices)
    cores = sorted(os.sched_getaffinity(0))
    if on_cpu > len(cores):
        raise UserError(f"{on_cpu} trainings at a time on the CPU, but there are {len(cores)} cores.")
    shares = iter([cores[part::on_cpu] for part in range(on_cpu)])
    return [next(shares) if device == "cpu" else None for device in devices]
