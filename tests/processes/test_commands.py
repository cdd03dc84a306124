"""Child processes: watched, logged, and never left behind."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.processes import commands
from nnunetv2_semi.processes.commands import (
    CommandFailed,
    Progress,
    command_path,
    exclusive_exit_status_of,
    finished_epochs,
    run_logged,
)

T = TypeVar("T")


def test_command_beside_the_interpreter_wins_over_the_search_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("environment", "elsewhere"):
        (tmp_path / folder).mkdir()
        for name in ("both", "python") if folder == "environment" else ("both", "only_elsewhere"):
            (tmp_path / folder / name).write_text("#!/bin/sh\n")
            (tmp_path / folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "environment" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    assert command_path("both") == str(tmp_path / "environment" / "both")
    assert command_path("only_elsewhere") == str(tmp_path / "elsewhere" / "only_elsewhere")
    with pytest.raises(UserError, match="nowhere .* pip install nnunetv2"):
        command_path("nowhere")


def test_output_goes_to_the_log_and_environment_to_the_command(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    script = "import os, sys; print('out', os.environ['ONE']); sys.stderr.write('err')"
    seconds = run_logged([sys.executable, "-c", script], log, {**os.environ, "ONE": "1"}, Progress())
    assert 0 < seconds < 60
    assert set(log.read_text().split()) == {"out", "1", "err"}


def test_progress_is_asked_while_the_command_runs(tmp_path: Path) -> None:
    counted: list[int] = []
    marker = tmp_path / "log.txt"

    def done() -> int:
        counted.append(finished_epochs(marker))
        return counted[-1]

    script = "import time\nfor _ in range(2): print('Epoch time: 1 s', flush=True); time.sleep(0.6)"
    run_logged([sys.executable, "-c", script], marker, os.environ, Progress(2, "epoch", done))
    assert {1, 2} <= set(counted)
    assert finished_epochs(tmp_path / "absent") == 0


def test_failure_tells_exit_code_and_the_last_lines(tmp_path: Path) -> None:
    script = f"print('early'); [print('late') for _ in range({commands.SHOWN_LOG_LINES})]; raise SystemExit(7)"
    with pytest.raises(CommandFailed, match="exit code 7") as failure:
        run_logged([sys.executable, "-c", script], tmp_path / "log.txt", os.environ, Progress())
    assert "late" in str(failure.value)
    assert "early" not in str(failure.value)


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_command_and_its_workers_end_when_this_process_is_killed(tmp_path: Path) -> None:
    worker = "import time; time.sleep(100)"
    command = (f"import os, subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', {worker!r}]); "
               f"print(os.getpid(), child.pid, flush=True); time.sleep(100)")
    log = tmp_path / "log.txt"
    parent = subprocess.Popen([sys.executable, "-c", f"""
import os, sys
from pathlib import Path
from nnunetv2_semi.processes.commands import run_watched
run_watched([sys.executable, "-c", {command!r}], Path({str(log)!r}), os.environ, lambda: None)
"""], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        pids = wait_for(lambda: log.exists() and log.read_text().split())
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(is_alive(int(pid)) for pid in pids))


def test_the_watcher_can_end_a_command_and_logs_are_appended(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    command = [sys.executable, "-c", "import time; print('started', flush=True); time.sleep(100)"]

    def stop() -> None:
        if "started" in log.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commands.run_watched(command, log, os.environ, stop)
    assert log.read_text().startswith("before\nstarted")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="not on this system")
def test_a_command_stays_on_its_cores(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    log = tmp_path / "log.txt"
    commands.run_watched([sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"], log, os.environ,
                         lambda: None, cores=[core])
    assert log.read_text().strip() == str({core})


def wait_for(condition: Callable[[], T]) -> T:
    for _ in range(200):
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError("waited for 20 s")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_work_that_another_process_does_is_refused(tmp_path: Path) -> None:
    from filelock import FileLock

    lock = tmp_path / ".lock"
    with FileLock(lock), pytest.raises(UserError, match="at work"):
        exclusive_exit_status_of(lambda: 0, lock, "Another command is at work.")
    assert exclusive_exit_status_of(lambda: 3, lock, "Another command is at work.") == 3
