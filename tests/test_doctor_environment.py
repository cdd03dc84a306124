"""What doctor says of nnU-Net, torch, and nnU-Net's folders that are not as they should be."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnunetv2_semi import doctor
from nnunetv2_semi.doctor import environment
from nnunetv2_semi.doctor.checks import Check, Level, ok
from nnunetv2_semi.errors import UserError


def only(checks: list[Check]) -> Check:
    assert len(checks) == 1, [check.line() for check in checks]
    return checks[0]


def raising(error: Exception) -> object:
    def fail(*_: object) -> None:
        raise error
    return fail


def torch_with(gpus: bool = False, mps: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        __version__="2.9", cuda=SimpleNamespace(is_available=lambda: gpus, get_device_name=lambda number: "H100"),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)))  # fmt: skip


def test_an_absent_nnunet_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "nnunet_folder", raising(UserError("nnunetv2 is not installed for python.")))
    found = only(list(environment._check_nnunet()))
    assert found == Check(Level.PROBLEM, "nnunetv2 is not installed", "nnunetv2 is not installed for python.")


@pytest.mark.parametrize("version, level, message", [
    ("2.8.1", Level.OK, "nnunetv2 2.8.1 in "),
    ("2.6.2", Level.PROBLEM, "nnunetv2 2.6.2 in /nnunetv2, but 2.8 is needed"),
    (None, Level.WARNING, "nnunetv2 in /nnunetv2 has no version that pip knows"),
])
def test_nnunet_must_have_the_right_version(
    monkeypatch: pytest.MonkeyPatch, version: str | None, level: Level, message: str
) -> None:
    monkeypatch.setattr(environment, "nnunet_folder", lambda: Path("/nnunetv2"))
    unknown = raising(importlib.metadata.PackageNotFoundError("nnunetv2"))
    monkeypatch.setattr(importlib.metadata, "version", (lambda name: version) if version else unknown)
    found = only(list(environment._check_nnunet()))
    assert found.level is level and found.finding.startswith(message)


def test_a_torch_that_cannot_be_imported_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", raising(OSError("libcudart.so: no such file")))
    found = only(list(environment._check_torch()))
    assert found.level is Level.PROBLEM and "pip install --force-reinstall torch" in found.remedy
    assert found.finding == "torch cannot be imported: OSError: libcudart.so: no such file"


@pytest.mark.parametrize("torch, level, message", [
    (torch_with(gpus=True), Level.OK, "torch 2.9, GPU: H100"),
    (torch_with(mps=True), Level.OK, "torch 2.9, Apple GPU: train with -device mps"),
    (torch_with(), Level.WARNING, "torch 2.9 sees no GPU: training is slow"),
])
def test_a_computer_without_gpu_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, torch: SimpleNamespace, level: Level, message: str
) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: torch)
    found = list(environment._check_torch())[0]
    assert (found.level, found.finding) == (level, message)
    assert level is Level.OK or "nnUNetPlannerSemiCPU" in found.remedy


def test_a_folder_that_hides_nnunet_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "hiding_folder", lambda: Path("/site-packages/nnunetv2"))
    found = only(list(environment.check_visibility()))
    assert found.finding == "/site-packages/nnunetv2 hides the nnunetv2 that is installed elsewhere"
    assert found.level is Level.PROBLEM and found.remedy == "nnunetv2_semi link"


def test_a_module_that_breaks_nnunets_search_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_is_found", raising(ImportError("cannot import name 'mine'")))
    found = list(environment.check_visibility())
    assert [check.level for check in found] == [Level.PROBLEM] * 3
    assert found[0].finding == "nnU-Net's search for trainers fails: ImportError: cannot import name 'mine'"


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "absent"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setattr(environment, "_is_writable", lambda folder: False)
    assert [check.finding for check in environment.check_folders()] == [
        "nnUNet_raw is not set", f"nnUNet_preprocessed={tmp_path / 'absent'} is not a folder",
        f"nnUNet_results={tmp_path} cannot be written"]  # fmt: skip
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    raw = next(environment.check_folders())
    assert raw.level is Level.WARNING and raw.finding == f"nnUNet_raw={tmp_path} cannot be written"


def test_a_data_set_is_not_checked_with_a_broken_nnunet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "check_environment", lambda: iter([ok("all fine")]))
    monkeypatch.setitem(sys.modules, "nnunetv2_semi.doctor.dataset", None)
    assert doctor.run(argparse.Namespace(dataset="7")) == 1
    assert "PROBLEM  the data set was not checked, nnU-Net cannot be imported: " in capsys.readouterr().out
