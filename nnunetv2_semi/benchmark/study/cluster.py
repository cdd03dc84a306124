"""The trainings of a study as jobs of a cluster, through submitit."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from nnunetv2_semi.benchmark.study.execution import execute
from nnunetv2_semi.benchmark.study.jobs import Job
from nnunetv2_semi.benchmark.study.progress import StudyBar
from nnunetv2_semi.benchmark.study.study import Study
from nnunetv2_semi.data.atomic_files import read_json_object, write_json_whole
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.processes.commands import CommandFailed

if TYPE_CHECKING:
    import submitit

SECONDS_BETWEEN_LOOKS = 2.0
# keys of a study's cluster: that are not submitit's
_OWN = ("executor", "device", "max_num_timeout")
# In a job's folder: executor and id.
RECORD = "cluster.json"


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


def run_on_cluster(jobs: Sequence[Job], study: Study, executor: submitit.AutoExecutor, bar: StudyBar) -> None:
    """Submit what is neither queued nor running from an earlier call, and wait for all.

    Stopping this leaves the jobs where they are; a later call watches them.

    Raises:
        UserError: The cluster refuses the jobs.
    """
    import submitit

    kind, device = _kind(study), str(study.cluster.get("device", "cuda"))
    submitted: dict[str, submitit.Job] = {}
    for job in jobs:
        known = read_json_object(str(job.folder / RECORD)) or {}
        if known.get("executor") == kind:
            found = executor._executor.job_class(folder=executor.folder, job_id=known["job"], tasks=[0])
            if not found.done():
                submitted[job.name] = found
    to_submit = [job for job in jobs if job.name not in submitted]
    for job in to_submit:
        job.write_record("waiting", made_with=job.made_with(), labelled=len(job.labelled_cases()), error=None)
    try:
        with executor.batch() if to_submit else nullcontext():  # one array of jobs
            handles = [executor.submit(ClusterTask(job, device)) for job in to_submit]
    except (submitit.core.utils.FailedSubmissionError, OSError, RuntimeError) as error:
        raise UserError(f"The cluster refuses the trainings: {error}") from error
    for job, handle in zip(to_submit, handles, strict=True):
        # in a file of its own: the job may be writing its record already
        write_json_whole(str(job.folder / RECORD), {"executor": kind, "job": handle.job_id})
        submitted[job.name] = handle
    while not all(handle.done() for handle in submitted.values()):
        bar.look()
        time.sleep(SECONDS_BETWEEN_LOOKS)
    time.sleep(SECONDS_BETWEEN_LOOKS)  # for what the nodes wrote to be seen here
    for job in jobs:
        if job.state not in ("finished", "failed"):
            # the scheduler ended it: out of memory, node lost, cancelled
            text = submitted[job.name].stderr() or "The cluster ended the job without a message."
            job.write_record("failed", error=text[-3000:])
    bar.look()


def cluster_executor(study: Study) -> submitit.AutoExecutor:
    """What submits jobs, as the study's ``cluster:`` says: ``executor`` (slurm or local; default slurm), ``device``
    (default cuda), ``max_num_timeout``, ``timeout_min``; everything else for submitit's ``update_parameters``.

    Raises:
        UserError: submitit is not installed, there is no such cluster here, or it refuses its arguments.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise UserError("Clusters need a further package: pip install \"nnunetv2-semi[cluster]\"") from error
    if "timeout_min" not in study.cluster:
        raise UserError("The study's cluster: must have timeout_min, the minutes that a training may take; after "
                        "them the job is queued again.")
    if str(study.cluster.get("device", "cuda")) not in ("cuda", "cpu"):
        raise UserError(f"The study's cluster: device must be cuda or cpu, got {study.cluster['device']!r}.")
    parameters = {key: value for key, value in study.cluster.items() if key not in _OWN}
    limits = {f"slurm_{key}": study.cluster[key] for key in ("max_num_timeout",) if key in study.cluster}
    try:
        executor = submitit.AutoExecutor(folder=study.folder / "cluster", cluster=_kind(study), **limits)
        executor.update_parameters(name=study.name, **parameters)
    except (RuntimeError, ValueError, NameError, TypeError, AssertionError) as error:
        raise UserError(f"The study's cluster: cannot be used: {error}") from error
    return executor


def _kind(study: Study) -> str:
    return str(study.cluster.get("executor", "slurm"))
