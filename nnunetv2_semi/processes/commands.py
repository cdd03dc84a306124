"""nnU-Net's commands as child processes: found, watched, logged, and never left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout
from tqdm import tqdm

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.processes import ends_with_parent

SHOWN_LOG_LINES = 25
POLL_SECONDS = 0.2
# What a stopped command gets to end by itself before it is killed.
SECONDS_TO_END = 3.0


@dataclass(frozen=True)
class Progress:
    """How far a running command is: ``done()`` of ``total`` times ``unit``; without total only time is shown."""

    total: int | None = None
    unit: str = ""
    done: Callable[[], int] = lambda: 0

    @contextmanager
    def bar(self) -> Iterator[Callable[[], None]]:
        """Within it, what it yields shows how far the command is, where there is a terminal."""
        bar_format = None if self.total else "{desc}{elapsed}"
        with tqdm(desc="  ", total=self.total, unit=self.unit, bar_format=bar_format, leave=False, disable=None) as bar:

            def look() -> None:
                bar.n = self.done()
                bar.refresh()

            yield look


class CommandFailed(Exception):
    """A command ended with an error; the message has the end of its output."""


def command_path(name: str) -> str:
    """Path of a command of the Python environment that runs this, or else on the search path.

    Raises:
        UserError: It is in neither.
    """
    # Not resolved: in a virtual environment the interpreter is a link, and the commands lie beside the link.
    beside = str(Path(sys.executable).parent)
    path = shutil.which(name, path=beside) or shutil.which(name)
    if path is None:
        raise UserError(f"{name} was not found in {beside} nor on PATH. Install nnU-Net there: pip install nnunetv2")
    return path


def prediction_options(device: str, mirroring: bool) -> list[str]:
    """Of nnUNetv2_predict. device: "cuda" or "cpu", where one process does everything. mirroring: test-time."""
    options = ["-device", device, *([] if mirroring else ["--disable_tta"])]
    return [*options, "-npp", "0", "-nps", "0"] if device == "cpu" else options


def run_logged(command: Sequence[str], log: Path, environment: Mapping[str, str], progress: Progress) -> float:
    """Run a command with its output in a file, written anew, and a progress bar where there is a terminal.

    However this ends, the command and all processes it started have ended before.

    Returns:
        Seconds it took.

    Raises:
        CommandFailed: It returned non-zero.
    """
    log.unlink(missing_ok=True)
    with progress.bar() as look:
        return run_watched(command, log, environment, look)


def run_watched(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    while_running: Callable[[], None],
    cores: Sequence[int] | None = None,
) -> float:
    """Run a command with its output appended to a file. It ends with this process, even if that is killed.

    Args:
        command: Program and arguments.
        log: File for what it prints.
        environment: All its environment variables.
        while_running: Called a few times per second; what it raises ends the command and is raised.
        cores: Processor cores to stay on (Linux); None leaves the choice to the system.

    Returns:
        Seconds it took.

    Raises:
        CommandFailed: It returned non-zero.
    """
    started = time.monotonic()
    guarded = list(command)
    pipe: tuple[int, ...] = ()
    if os.name == "posix":
        pipe = os.pipe()
        chosen = "all" if cores is None else ",".join(map(str, cores))
        guarded = [sys.executable, ends_with_parent.__file__, str(pipe[0]), chosen, *command]
    try:
        with log.open("ab") as output:
            # A group of its own, so that the workers it starts can be ended with it.
            process = subprocess.Popen(
                guarded,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
                pass_fds=pipe[:1],
            )
        try:
            while process.poll() is None:
                while_running()
                time.sleep(POLL_SECONDS)
        finally:
            end_group(process)
    finally:
        for descriptor in pipe:
            os.close(descriptor)
    if process.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        end = "\n".join(lines[-SHOWN_LOG_LINES:])
        name = Path(command[0]).name
        raise CommandFailed(f"{name} failed with exit code {process.returncode}. The end of its output:\n\n{end}")
    return time.monotonic() - started


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process started in its own session, and all that it started, politely at first."""
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            pass
    if process.returncode != 0:
        # Its workers may outlive it, whether it was stopped or failed.
        _signal_group(process, getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()


def finished_epochs(log: Path) -> int:
    """Number of epochs that nnU-Net's training output says are over."""
    try:
        return log.read_bytes().count(b"Epoch time:")
    except FileNotFoundError:
        return 0


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within it, SIGTERM unwinds the program as Ctrl-C does, so that clean-up takes place."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signal_number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_status_of(work: Callable[[], int]) -> int:
    """Exit status of a command that can be begun again: what ``work`` returns, 1 after a failed command, 130 after
    Ctrl-C, with a message."""
    try:
        with ended_by_sigterm():
            return work()
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where this one stopped.", file=sys.stderr)
        return 130
    except CommandFailed as failure:
        print(f"\n{failure}", file=sys.stderr)
        return 1


def exclusive_exit_status_of(work: Callable[[], int], lock: Path, refusal: str) -> int:
    """`exit_status_of`, while no other process holds the file ``lock``. Raises UserError (``refusal``) where one does.
    """
    try:
        with FileLock(lock, timeout=0):
            return exit_status_of(work)
    except Timeout as error:
        raise UserError(refusal) from error


def _signal_group(process: subprocess.Popen[bytes], signal_number: int) -> None:
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal_number)
        else:
            process.kill()
    except (ProcessLookupError, PermissionError):
        pass
