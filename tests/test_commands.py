"""Child processes: watched, logged, and never left behind."""

import os
import sys
from pathlib import Path

import pytest

from nnunetv2_semi import commands
from nnunetv2_semi.commands import CommandFailed, Progress, command_path, finished_epochs, run_logged
from nnunetv2_semi.errors import UserError


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
