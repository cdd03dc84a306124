"""``nnunetv2_semi benchmark``: run a study, see how far it is, report on it."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nnunetv2_semi.benchmark.report import report
from nnunetv2_semi.benchmark.report.runs import PredictedRun
from nnunetv2_semi.benchmark.study.jobs import Job
from nnunetv2_semi.benchmark.study.study import Study, read_study
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.processes.commands import exclusive_exit_status_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``nnunetv2_semi benchmark``."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    running = actions.add_parser("run", help="train and predict whatever of a study is not done yet")
    running.add_argument("study", type=Path, help="study file (YAML)")
    running.add_argument("--devices", nargs="+", default=None, metavar="DEVICE",
                         help="one training at a time on each, for instance cuda:0 cuda:1, or cpu (default: the study "
                              "file's; else all GPUs, or the CPU)")
    running.add_argument("--cluster", action="store_true", help="submit the trainings with submitit, as cluster: says")
    running.add_argument("--dry-run", action="store_true", help="plan, preprocess and check, but do not train")
    looking = actions.add_parser("status", help="how far a study is")
    looking.add_argument("study", type=Path, help="study file (YAML)")
    report.add_arguments(actions.add_parser("report", help="tables and a page from predictions of the test cases"))


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, 1 if a training failed or is not finished, 130 after Ctrl-C.

    Raises:
        UserError: Something is wrong with the study; nothing was trained.
    """
    if args.action == "report":
        return report.run(args, study_runs)
    study = read_study(args.study)
    if args.action == "status":
        return _show_status(study)
    # torch and nnU-Net take seconds to import: a wrong study file should be told at once
    from nnunetv2_semi.benchmark.study.local_pool import check_devices

    devices = [] if args.cluster else check_devices(study.devices if args.devices is None else args.devices)
    study.folder.mkdir(parents=True, exist_ok=True)
    return exclusive_exit_status_of(
        lambda: _run_study(study, devices, args), study.folder / ".lock",
        f"Another 'nnunetv2_semi benchmark run' is at work on this study ({study.folder}).")


def _run_study(study: Study, devices: Sequence[str], args: argparse.Namespace) -> int:
    from nnunetv2_semi.benchmark.study.cluster import cluster_executor, run_on_cluster
    from nnunetv2_semi.benchmark.study.local_pool import run_on_devices
    from nnunetv2_semi.benchmark.study.preparation import prepare
    from nnunetv2_semi.benchmark.study.progress import StudyBar

    executor = cluster_executor(study) if args.cluster else None
    prepared = prepare(study)
    left = [job for job in prepared.jobs if not job.is_done()]
    print(f"{len(prepared.jobs)} trainings in {study.folder / 'runs'}, {len(left)} to do.", flush=True)
    if args.dry_run:
        return 0
    with StudyBar(prepared.jobs, prepared.num_epochs) as bar:
        if executor is not None:
            run_on_cluster(left, study, executor, bar)
        else:
            run_on_devices(left, devices, bar)
    failed = [job for job in prepared.jobs if job.state == "failed"]
    for job in failed:
        print(f"\nFAILED: {job.name}\n{job.record['error']}\nWhole log: {job.training_log}", file=sys.stderr)
    unfinished = [job for job in prepared.jobs if job.state != "finished"]
    print(f"{len(prepared.jobs) - len(unfinished)} of {len(prepared.jobs)} trainings finished. "
          f"Report: nnunetv2_semi benchmark report {args.study}")
    return 1 if unfinished else 0


def _show_status(study: Study) -> int:
    from nnunetv2_semi.benchmark.study.preparation import list_jobs

    jobs = list_jobs(study)
    states = {job.name: job.state_now() for job in jobs}
    for name, state in states.items():
        print(f"{state:9} {name}")
    counts = Counter(states.values())
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return 0 if counts["finished"] == len(jobs) else 1


def study_runs(file: Path) -> tuple[Study, Sequence[PredictedRun]]:
    """A study and the finished ones of its trainings, for the report; tells which are not finished.

    Raises:
        UserError: None is, or they are of other settings, plans or test images than there are now.
    """
    from nnunetv2_semi.benchmark.study.comparability import check_predicted_images, check_unchanged
    from nnunetv2_semi.benchmark.study.preparation import list_jobs

    study = read_study(file)
    jobs = list_jobs(study)
    finished = [job for job in jobs if job.state == "finished"]
    if not finished:
        raise UserError(f"No training of {file} is finished. Start it: nnunetv2_semi benchmark run {file}")
    check_unchanged(finished)
    check_predicted_images(finished)
    _tell_unfinished([job for job in jobs if job.state != "finished"])
    return study, [job.predicted() for job in finished]


def _tell_unfinished(jobs: Sequence[Job]) -> None:
    if jobs:
        print(f"Not finished, and so not in the report: {len(jobs)} trainings\n  " +
              "\n  ".join(f"{job.name} ({job.state})" for job in jobs), file=sys.stderr)
