from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import nnunetv2_semi
from nnunetv2_semi import cli
from nnunetv2_semi.errors import UserError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A subcommand `fake`, with one option."""
    module = ModuleType("fake_command")
    module.add_arguments = lambda parser: parser.add_argument("--status", type=int, default=0)  # type: ignore
    module.run = lambda args: args.status  # type: ignore
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setitem(cli.COMMANDS, "fake", ("fake_command", "does nothing"))
    return module


def test_the_status_of_a_command_is_returned(command: ModuleType) -> None:
    assert cli.main(["fake"]) == 0
    assert cli.main(["fake", "--status", "3"]) == 3


def test_a_user_error_is_a_message_without_traceback(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise UserError("plans.json: no such key")

    command.run = fail  # type: ignore
    assert cli.main(["fake"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "Error: plans.json: no such key\n" and captured.out == ""


def test_other_errors_keep_their_traceback(command: ModuleType) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise ZeroDivisionError

    command.run = fail  # type: ignore
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["trian"])
    assert stopped.value.code == 2 and "trian" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip().endswith(nnunetv2_semi.__version__)


@pytest.mark.e2e
def test_help_lists_every_command_without_importing_torch(tmp_path: Path) -> None:
    # Appended: site-packages at the front would put an outdated argparse.py, which lies there, before Python's own.
    root = str(Path(nnunetv2_semi.__file__).parents[1])
    script = (
        f"import sys; sys.path.append({root!r}); from nnunetv2_semi.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('TORCH' if 'torch' in sys.modules or 'nnunetv2' in sys.modules else 'LIGHT')"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert all(re.search(rf"^    {name}\s", result.stdout, re.MULTILINE) for name in cli.COMMANDS)
    assert result.stdout.rstrip().endswith("LIGHT")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"nnunetv2_semi {name}" in capsys.readouterr().out
