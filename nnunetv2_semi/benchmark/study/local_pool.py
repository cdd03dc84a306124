"""The trainings of a study on this machine, one at a time on each device."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence

from nnunetv2_semi.benchmark.study.execution import execute
from nnunetv2_semi.benchmark.study.jobs import Job
from nnunetv2_semi.benchmark.study.progress import StudyBar
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.processes.commands import CommandFailed
from nnunetv2_semi.processes.pool import Stopped, core_numbers, share_out


def run_on_devices(jobs: Sequence[Job], devices: Sequence[str], bar: StudyBar) -> None:
    """Do all jobs, N at a time on N devices; a failing one is recorded and does not stop the others.

    However this ends, even killed, the commands it started end with it.
    """

    def work(job: Job, slot: tuple[str, Sequence[int] | None], stop_if_asked: Callable[[], None]) -> None:
        device, cores = slot
        try:
            execute(job, device, stop_if_asked, cores)
        except CommandFailed:
            pass  # in the job's record
        except Stopped:
            raise
        except Exception:  # a disk that is full, a file that is gone: the other jobs go on
            job.write_record("failed", error=traceback.format_exc())

    for job in jobs:
        if job.state != "waiting":  # left by an earlier run that failed or was killed
            job.write_record("waiting", error=None)
    share_out(jobs, list(zip(devices, _cores(devices), strict=True)), work, bar.look)


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
    on_cpu, cores = sum(device == "cpu" for device in devices), core_numbers()
    if on_cpu < 2 or not cores:
        return [None] * len(devices)
    if on_cpu > len(cores):
        raise UserError(f"{on_cpu} trainings at a time on the CPU, but there are {len(cores)} cores.")
    shares = iter([cores[part::on_cpu] for part in range(on_cpu)])
    return [next(shares) if device == "cpu" else None for device in devices]
