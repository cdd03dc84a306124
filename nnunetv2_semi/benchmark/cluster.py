"""The trainings of a study as jobs of a cluster, through submitit."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nnunetv2_semi.benchmark.execution import execute
from nnunetv2_semi.benchmark.jobs import Job
from nnunetv2_semi.benchmark.progress import StudyBar
from nnunetv2_semi.benchmark.study import Study
from nnunetv2_semi.commands import CommandFailed
from nnunetv2_semi.errors import UserError

if TYPE_CHECKING:
    import submitit

SECONDS_BETWEEN_LOOKS = 2.0
# keys of a study's cluster: that are not submitit's
_OWN = ("executor", "device")


class ClusterTask:
    """What a cluster job runs; after a preemption or timeout it is queued again and goes on."""

    def __init__(self, job: Job, device: str) -> None:
        self.job, self.device = job, device

    def __call__(self) -> None:
        try:
            execute(self.job, self.device)
        except CommandFailed as failure:
            print(failure, file=sys.stderr)  # in the job's record too

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit before a job is taken off its node."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def run_on_cluster(jobs: Sequence[Job], study: Study, bar: StudyBar) -> None:
    """Submit what is neither queued nor running from an earlier call, and wait for all.

    study.cluster: ``executor`` (slurm, local, debug; default slurm), ``device`` (default cuda), everything else for
    submitit's ``update_parameters``. Stopping this leaves the jobs where they are; a later call watches them.

    Raises:
        UserError: submitit is not installed, there is no such cluster here, or it refuses its arguments.
    """
    executor = _executor(study)
    submitted: dict[str, submitit.Job] = {}
    to_submit = []
    for job in jobs:
        known = job.record.get("cluster_job")
        found = _job_of(executor, str(known)) if known else None
        if found is not None and not found.done():
            submitted[job.name] = found
        else:
            to_submit.append(job)
    device = str(study.cluster.get("device", "cuda"))
    if to_submit:
        with executor.batch():  # one array of jobs
            handles = [executor.submit(ClusterTask(job, device)) for job in to_submit]
        for job, handle in zip(to_submit, handles, strict=True):
            job.write_record("waiting", cluster_job=handle.job_id)
            submitted[job.name] = handle
    while not all(handle.done() for handle in submitted.values()):
        bar.look()
        time.sleep(SECONDS_BETWEEN_LOOKS)
    for job in jobs:
        if job.state not in ("finished", "failed"):
            # the scheduler ended it: out of memory, node lost, cancelled
            text = submitted[job.name].stderr() or "The cluster ended the job without a message."
            job.write_record("failed", error=text[-3000:])
    bar.look()


def _executor(study: Study) -> submitit.AutoExecutor:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise UserError("Clusters need a further package: pip install nnunetv2-semi[cluster]") from error
    kind = str(study.cluster.get("executor", "slurm"))
    parameters: Mapping[str, object] = {key: value for key, value in study.cluster.items() if key not in _OWN}
    try:
        executor = submitit.AutoExecutor(folder=study.folder / "cluster", cluster=kind)
        executor.update_parameters(name=study.name, **parameters)
    except (RuntimeError, ValueError, NameError, TypeError, AssertionError) as error:
        raise UserError(f"The study's cluster: cannot be used: {error}") from error
    return executor


def _job_of(executor: submitit.AutoExecutor, job_id: str) -> submitit.Job:
    inner = executor._executor
    return inner.job_class(folder=inner.folder, job_id=job_id, tasks=[0])
