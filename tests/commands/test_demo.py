"""The demo with stand-ins for nnU-Net's commands: they print, write and fail as the real ones do, in milliseconds."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_semi.commands import demo
from nnunetv2_semi.data.phantom_anatomy import LABELS
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.processes.pool import allowed_cores

# Imports nothing slow. Plans carry a key of the planner's; training prints epochs; the control predicts background.
STAND_IN = """\
import json, os, pathlib, shutil, subprocess, sys, time
name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
preprocessed = pathlib.Path(os.environ["nnUNet_preprocessed"]) / "Dataset001_Phantom"
plans_name = arguments[arguments.index("-p") + 1] if "-p" in arguments else "nnUNetSemiCPUPlans"
plans = preprocessed / (plans_name + ".json")
if name == "nnUNetv2_plan_and_preprocess":
    preprocessed.mkdir()
    plans.write_text(json.dumps({"configurations": {"2d": {"semi": {"planned_graphs": 4, "num_epochs": 50}}}}))
elif name == "nnUNetv2_train":
    behaviour = os.environ.get("STAND_IN_TRAINING", "")
    if behaviour == "fails" and "nnUNetTrainerSemiMix" in arguments:
        print("first line", *range(100), "the reason", sep="\\n")
        sys.exit(3)
    if behaviour == "hangs":
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
        with open(os.environ["STAND_IN_PIDS"], "a") as pids:
            pids.write(f"{os.getpid()} {worker.pid} ")
        time.sleep(120)
    log = pathlib.Path(os.environ["nnUNet_results"]) / plans_name
    log.write_text(json.dumps([arguments, json.loads(plans.read_text()), dict(os.environ)]))
    print("Epoch time: 0.1 s")
elif name == "nnUNetv2_predict":
    images, output = (pathlib.Path(arguments[arguments.index(o) + 1]) for o in ("-i", "-o"))
    output.mkdir(parents=True)
    truths = sorted((images.parent / "labelsTs").iterdir())
    if os.environ.get("STAND_IN_PREDICTION") == "leaves one out":
        truths.pop()
    if "nnUNetTrainerSemiMix" in arguments:
        for truth in truths:
            shutil.copy(truth, output)
    else:
        for truth in truths:
            shutil.copy(truths[0], output / truth.name)
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder in which temporary folders are made; commands are stand-ins."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in demo.COMMANDS:
        file = commands / name
        file.write_text(f"#!{sys.executable}\n{STAND_IN}")
        file.chmod(0o755)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(demo, "command_path", lambda name: str(commands / name))
    monkeypatch.setattr(demo, "SHAPE", (12, 12))
    monkeypatch.setattr(demo, "UNLABELLED", 2)
    monkeypatch.setattr(demo.tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("nnUNet_raw", "/the/users/own")
    return temporary


def arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(options)


def test_demo_prints_table_draws_picture_and_leaves_nothing_else(
    environment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.run(arguments("--folder", str(tmp_path / "out"))) == 0
    printed = capsys.readouterr().out
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["demo.png"]
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert list(environment.iterdir()) == []
    assert os.environ["nnUNet_raw"] == "/the/users/own"
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    assert rows["Mix"] == ["1.000"] * 5
    assert 0 < float(rows["Supervised"][-1]) < 1
    assert [name for name in LABELS if name in printed] == list(LABELS)
    assert str(tmp_path / "out" / "demo.png") in printed
    assert (
        "$ nnUNetv2_train 1 2d all -tr nnUNetTrainerSemiSupervised -p nnUNetSemiCPUPlans_Supervised -device cpu\n\n"
        "$ nnUNetv2_train 1 2d all -tr nnUNetTrainerSemiMix -p nnUNetSemiCPUPlans_Mix -device cpu\n  took"
        in printed
    )
    assert len(printed.splitlines()) < 100
    assert printed.rstrip().splitlines()[-1].endswith("docs/which_trainer.md")
    gain = 1 - float(rows["Supervised"][-1])
    assert f"Mix: {gain:+.3f} over Supervised, which sees no unlabelled image." in printed
    assert "-i '$nnUNet_raw/Dataset001_Phantom/imagesTs'" not in printed
    assert "-i $nnUNet_raw/Dataset001_Phantom/imagesTs" in printed


def test_all_trainers_train_equally_long_in_folders_of_their_own(
    environment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--keep", "--folder", str(tmp_path), "--seed", "3", "--iterations", "205")
    options += ("--trainers", "Mix", "Semi-CML")
    assert demo.run(arguments(*options)) == 0
    work = tmp_path / demo.KEPT_FOLDER
    titles = ["Supervised", "Mix", "CML on labels", "Semi-CML"]
    names = [f"nnUNetSemiCPUPlans_{title.replace(' ', '_')}" for title in titles]
    seen = [json.loads((work / "nnUNet_results" / name).read_text()) for name in names]
    semi = [plans["configurations"]["2d"]["semi"] for _, plans, _ in seen]
    assert [plans["plans_name"] for _, plans, _ in seen] == names
    assert semi[0] == semi[1] == semi[3]
    assert semi[2] == {**semi[0], "unlabelled_weight": 0.0, "SemiCML": {"prel": False}}
    assert semi[0]["planned_graphs"] == 4
    assert semi[0]["num_epochs"] == demo.EPOCHS
    assert (semi[0]["num_iterations_per_epoch"], semi[0]["seed"]) == (20, 3)
    assert seen[0][2]["nnUNet_raw"] == str(work / "nnUNet_raw")
    printed = capsys.readouterr().out
    assert [line[:22].strip() for line in printed.splitlines() if line[:22].strip() in titles] == titles
    assert len(printed.splitlines()) < 100
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        assert f"export {variable}={work / variable}" in printed
    assert (work / "nnUNet_raw" / "Dataset001_Phantom" / "imagesUn").is_dir()
    with pytest.raises(UserError, match=demo.KEPT_FOLDER):
        demo.run(arguments("--keep", "--folder", str(tmp_path)))


def test_failed_command_shows_the_end_of_its_output(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAND_IN_TRAINING", "fails")
    assert demo.run(arguments("--folder", str(tmp_path / "out"))) == 1
    error = capsys.readouterr().err
    assert "nnUNetv2_train failed with exit code 3" in error
    assert "the reason" in error
    assert "first line" not in error
    assert list(environment.iterdir()) == []
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_prediction_is_an_error(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAND_IN_PREDICTION", "leaves one out")
    assert demo.run(arguments("--folder", str(tmp_path / "out"))) == 1
    assert "no prediction for case_0025" in capsys.readouterr().err


@pytest.mark.e2e
@pytest.mark.skipif(os.name != "posix", reason="signals and process groups")
@pytest.mark.parametrize(("sent", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_ends_all_processes_and_cleans_up(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, exit_code: int
) -> None:
    monkeypatch.setenv("STAND_IN_TRAINING", "hangs")
    pids_file = tmp_path / "pids"
    monkeypatch.setenv("STAND_IN_PIDS", str(pids_file))
    monkeypatch.setenv("TMPDIR", str(environment))
    script = (
        "import argparse, signal, sys; from nnunetv2_semi.commands import demo\n"
        # Programs started in the background, this test perhaps, have Ctrl-C ignored and hand that on.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"demo.command_path = lambda name: {str(tmp_path / 'commands')!r} + '/' + name\n"
        "demo.SHAPE = (12, 12); demo.UNLABELLED = 2\n"
        "parser = argparse.ArgumentParser(); demo.add_arguments(parser); sys.exit(demo.run(parser.parse_args()))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, "--folder", str(tmp_path / "out")])
    pids: list[int] = []
    side_by_side = min(2, allowed_cores())  # the control and Mix; each notes itself and a worker
    try:
        deadline = time.monotonic() + 120
        while not (pids_file.exists() and len(pids_file.read_text().split()) == 2 * side_by_side):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pids = [int(pid) for pid in pids_file.read_text().split()]
        process.send_signal(sent)
        assert process.wait(60) == exit_code
        assert not any(is_running(pid) for pid in pids)
    finally:
        process.kill()
        process.wait()
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)
    assert list(environment.iterdir()) == []


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie waiting for the system to collect it."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return state != "" and not state.startswith("Z")


def test_too_few_iterations_are_refused_before_anything_starts(environment: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--iterations 9 "):
        demo.run(arguments("--iterations", "9", "--folder", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_table_averages_over_cases_and_leaves_out_absent_structures() -> None:
    first = {"liver": 0.5, "kidney": 1.0, "spine": 0.25, "lesion": float("nan")}
    second = {"liver": 0.7, "kidney": 0.0, "spine": 0.25, "lesion": 0.4}
    lines = demo.dice_table({"One": {"a": first, "b": second}}).splitlines()
    assert lines[0].split() == ["Dice,", "2", "test", "cases", *LABELS, "mean"]
    np.testing.assert_allclose([float(v) for v in lines[1].split()[1:]], [0.6, 0.5, 0.25, 0.4, 0.4375], atol=5e-4)


def test_each_trainer_is_compared_with_the_control_that_is_fair_to_it() -> None:
    dice = {title: {"a": dict.fromkeys(LABELS, value)} for title, value in (
        ("Supervised", 0.7), ("Mix", 0.75), ("CML on labels", 0.8), ("Semi-CML", 0.72))}
    assert demo.dice_table(dice).splitlines()[5:7] == [
        "Mix: +0.050 over Supervised, which sees no unlabelled image.",
        "Semi-CML: -0.080 over CML on labels, which sees no unlabelled image."]
