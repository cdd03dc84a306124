"""Work spread over processes that never outlive the one that started them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from nnunetv2_semi.errors import UserError

_FILES_PER_PROCESS = 16  # small ones, which take about as long as the start of a process
_SECONDS_BETWEEN_LOOKS = 0.5

Task = TypeVar("Task")
Result = TypeVar("Result")
Slot = TypeVar("Slot")


class Stopped(Exception):
    """The work is to end: it was stopped, or other work beside it failed."""


def core_numbers() -> list[int]:
    """The cores this process may use; none where the system does not tell (macOS, Windows)."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def allowed_cores() -> int:
    """How many cores this process may use."""
    return len(core_numbers()) or os.cpu_count() or 1


def default_processes() -> int:
    """How many processes to work with: `nnUNet_def_n_proc`, else nnU-Net's number, but no more than allowed cores.

    A process takes seconds of a core to start: more of them than cores make small data sets slow.
    """
    from nnunetv2.configuration import default_num_processes

    asked = "nnUNet_def_n_proc" in os.environ
    return default_num_processes if asked else min(default_num_processes, allowed_cores())


def processes_to_read(files: Sequence[object]) -> int:
    """How many processes to read so many files with: `default_processes`, or fewer for a few files."""
    return max(1, min(default_processes(), len(files) // _FILES_PER_PROCESS))


def exit_with_parent() -> None:
    """Call in a child process: it then ends as soon as its parent is gone, even if that was killed by SIGKILL.

    A pool's worker would otherwise wait for work for ever, because it holds both ends of its own queue.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def wait_for_parent() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True, name="exit-with-parent").start()


def results_in_parallel(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    num_processes: int,
    description: str,
    show_progress_bar: bool = True,
) -> Iterator[tuple[Task, Result]]:
    """Yield `(task, function(task))` in order of completion, with a progress bar.

    Processes are spawned, not forked (the caller may hold threads and a CUDA context). With one process, or one task,
    the work is done in the calling process. `function` and the tasks must pickle. What `function` raises is raised.

    Raises:
        UserError: a worker process was killed, in practice by the system for want of memory.
    """
    num_processes = min(num_processes, len(tasks))
    with tqdm(total=len(tasks), desc=description, disable=not show_progress_bar or not tasks) as bar:
        if num_processes <= 1:
            for task in tasks:
                yield task, function(task)
                bar.update()
            return
        executor = ProcessPoolExecutor(
            num_processes, mp_context=multiprocessing.get_context("spawn"), initializer=exit_with_parent
        )
        try:
            futures = {executor.submit(function, task): task for task in tasks}
            for future in as_completed(futures):
                yield futures[future], future.result()
                bar.update()
        except BrokenProcessPool as error:
            raise UserError(
                f"{description}: a worker process was killed, most likely because memory ran out. What was finished is "
                f"kept. Start again with fewer processes than {num_processes} (environment variable nnUNet_def_n_proc)."
            ) from error
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def share_out(
    tasks: Sequence[Task],
    slots: Sequence[Slot],
    work: Callable[[Task, Slot, Callable[[], None]], None],
    look: Callable[[], None],
) -> None:
    """Do all tasks, one at a time on each slot, in threads of this process.

    What ``work`` raises ends all work, and is raised.

    Args:
        tasks: Begun in this order.
        slots: What a task gets to work with: a device, cores.
        work: Called with a task, a slot, and a function that it is to call now and then, and whose `Stopped` it is to
            raise.
        look: Called meanwhile, about twice a second, in the calling thread.
    """
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    stop = threading.Event()

    def stop_if_asked() -> None:
        if stop.is_set():
            raise Stopped

    def work_on(slot: Slot) -> None:
        while not stop.is_set():
            try:
                task = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                work(task, slot, stop_if_asked)
            except Stopped:
                return
            except BaseException:
                stop.set()
                raise

    with ThreadPoolExecutor(len(slots)) as threads:
        try:
            workers = [threads.submit(work_on, slot) for slot in slots]
            while wait(workers, _SECONDS_BETWEEN_LOOKS).not_done:
                look()
            for worker in workers:
                worker.result()
        finally:
            stop.set()
    look()
