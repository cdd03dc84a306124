"""Ratios measured side by side, and tables of them.

Absolute times say little on a machine that does other work too. So what is compared runs alternately in one process,
and medians are divided. Memory is counted by the allocator and repeats to the byte.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read once, at import
import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402


@dataclass(frozen=True)
class Timing:
    """Medians over rounds, in seconds: wall-clock time and this process's CPU time."""

    wall: float
    cpu: float


def alternately(functions: Mapping[str, Callable[[], object]], rounds: int, warm_up: bool = True) -> dict[str, Timing]:
    """Call all ``functions`` in turn, ``rounds`` times after one round of warm-up; their median times."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for measured_round in range(-1 if warm_up else 0, rounds):
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if measured_round >= 0:
                measured[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: Timing(statistics.median(wall for wall, _ in times), statistics.median(cpu for _, cpu in times))
            for name, times in measured.items()}


class Allocations:
    """What torch's CPU allocator hands out and takes back within the block, tensors saved for the backward pass too.

    peak: most bytes held at once, of those allocated within the block. largest: bytes of the largest single one.
    Scratch memory of the convolution library does not pass through torch's allocator; nor does it on a GPU.
    """

    def __enter__(self) -> Allocations:
        self.peak = self.largest = 0
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(*error)  # type: ignore[arg-type]
        held = 0
        changes = [event for event in self._profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(changes, key=lambda event: event.start_ns()):
            held += event.nbytes()
            self.peak = max(self.peak, held)
            self.largest = max(self.largest, event.nbytes())


class GpuMemory:
    """Bytes that torch's CUDA allocator holds at most within the block, beyond what was there before."""

    def __enter__(self) -> GpuMemory:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.synchronize()
        self.peak = torch.cuda.max_memory_allocated() - self._before


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats are shown with two decimals."""
    shown = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    columns = list(zip(header, *shown, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in [header, *shown]]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """The kind of machine, in words."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_initialized() else ""
    return f"{gpu}{os.cpu_count()} CPU cores"
