"""Does a training step wait for our loader more than for nnU-Net's own?

Batches from our stream (labelled alone, and labelled with unlabelled) beside those of nnU-Net's loader and augmenter:
the same phantom, the same transforms, as many worker processes. The network is a no-op, so all time is spent waiting
for the next batch; with --step-share the step takes that share of the time in which nnU-Net makes a batch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from measuring import machine, table
from nnunetv2.experiment_planning.semi.nnUNetPlannerSemiCPU import nnUNetPlannerSemiCPU
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from phantom_plans import phantom

from nnunetv2_semi.data.loader import BatchStream, SeededBatches
from nnunetv2_semi.methods.mean_teacher import MeanTeacher

NNUNET, LABELLED, BOTH = "nnU-Net, labelled", "ours, labelled", "ours, labelled + unlabelled"
# Per batch, in seconds: wall-clock time, time waited in next(), CPU time of the workers.
Measured = tuple[float, float, float]


@contextmanager
def nnunet_stream(loader: nnUNetDataLoader, workers: int) -> Iterator[Iterator]:
    """nnU-Net's augmenter with the arguments that its trainer gives it."""
    stream = NonDetMultiThreadedAugmenter(loader, None, workers, max(6, workers // 2), seeds=None, pin_memory=False,
                                          wait_time=0.002)
    try:
        yield stream
    finally:
        # its thread is often still receiving a batch when its workers are stopped, and would print a traceback
        with mock.patch("threading.excepthook", lambda error: None):
            stream._finish()


@contextmanager
def our_stream(loaders: dict[str, nnUNetDataLoader], workers: int, prefetch: int) -> Iterator[Iterator]:
    stream = BatchStream(SeededBatches(loaders, seed=0), num_workers=workers, prefetch=prefetch)
    try:
        yield stream
    finally:
        stream.close()


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time of other processes so far; 0 where there is no /proc."""
    ticks = 0
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists():
            ticks += sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(stream: Iterator, batches: int, step_seconds: float) -> Measured:
    """Take ``batches`` batches from a stream that has settled."""
    for _ in range(8):
        next(stream)
    workers = [process.pid or 0 for process in multiprocessing.active_children()]
    waited, cpu, start = 0.0, cpu_seconds(workers), time.perf_counter()
    for _ in range(batches):
        asked = time.perf_counter()
        next(stream)
        waited += time.perf_counter() - asked
        if step_seconds:
            time.sleep(step_seconds)
    wall = time.perf_counter() - start
    return wall / batches, waited / batches, (cpu_seconds(workers) - cpu) / batches


def rounds_of(streams: dict[str, Callable], arguments: argparse.Namespace) -> dict[str, list[Measured]]:
    """All streams in turn, the workers of one at a time; the step's length follows nnU-Net's time in the same round."""
    measured: dict[str, list[Measured]] = {name: [] for name in streams}
    made_in = 0.0
    for _ in range(arguments.rounds):
        for name, make in streams.items():
            with make() as stream:
                if arguments.step_share and name == NNUNET:
                    made_in = measure(stream, arguments.batches, 0.0)[0]
                measured[name].append(measure(stream, arguments.batches, arguments.step_share * made_in))
    return measured


def median_ratio(values: list[Measured], reference: list[Measured], column: int, patches: int) -> str:
    """Median and range over rounds of the ratio per patch to nnU-Net's in the same round."""
    ratios = [value[column] / patches / other[column] if other[column] else float("nan")
              for value, other in zip(values, reference, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: 2)")
    parser.add_argument("--batches", type=int, default=40, help="batches per round (default: 40)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, all streams in each (default: 5)")
    parser.add_argument("--prefetch", type=int, default=2, help="batches ahead per worker of ours (default: 2)")
    parser.add_argument("--step-share", type=float, default=0.0,
                        help="a step's length as a share of nnU-Net's time per batch (default: 0, a no-op)")
    parser.add_argument("--shape", type=int, nargs=3, default=(32, 40, 32), help="of the phantom's images, voxels")
    parser.add_argument("--seed", type=int, default=0, help="of the phantom (default: 0)")
    arguments = parser.parse_args(argv)
    with ExitStack() as stack:
        data = stack.enter_context(phantom(4, 4, tuple(arguments.shape), arguments.seed))
        plans = data.plan(nnUNetPlannerSemiCPU)
        data.preprocess(plans)
        loaders = data.loaders(MeanTeacher, plans)
        patch = plans["configurations"]["3d_fullres"]["patch_size"]
        labelled = {"labelled": loaders["labelled"]}
        workers = arguments.workers
        measured = rounds_of({
            NNUNET: lambda: nnunet_stream(loaders["labelled"], workers),
            LABELLED: lambda: our_stream(labelled, workers, arguments.prefetch),
            BOTH: lambda: our_stream(loaders, workers, arguments.prefetch),
        }, arguments)
    print(f"{machine()}, {workers} worker processes, patch {patch}, batch size {loaders['labelled'].batch_size}, "
          f"{arguments.batches} batches x {arguments.rounds} rounds, seed {arguments.seed}, "
          f"step: {arguments.step_share:g} of nnU-Net's time per batch")
    print("Per patch, relative to nnU-Net in the same round: median (range)\n")
    print(table(["stream", "wall time", "time waited in next()", "CPU time of workers"],
                [[name, *(median_ratio(values, measured[NNUNET], column, 2 if name == BOTH else 1)
                          for column in range(3))] for name, values in measured.items()]))


if __name__ == "__main__":
    main()
