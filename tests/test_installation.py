from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_semi import installation
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.installation import CLASS_FOLDERS, COPY_MARKER, link, unlink


def make_class_folder(path: Path, content: str = "value = 1\n") -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "__init__.py").touch()
    (path / "classes.py").write_text(content)


def make_nnunet(path: Path) -> Path:
    for folder in CLASS_FOLDERS:
        (path / folder.inside_nnunet).parent.mkdir(parents=True, exist_ok=True)
    (path / "__init__.py").touch()
    return path


@pytest.fixture
def nnunet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_nnunet(tmp_path / "nnunet_checkout" / "nnunetv2")
    monkeypatch.setattr(installation, "nnunet_folder", lambda: folder)
    return folder


@pytest.fixture
def source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "source"
    for folder in CLASS_FOLDERS:
        make_class_folder(root / folder.in_source_tree)
    monkeypatch.setattr(installation, "package_folder", lambda: root / "nnunetv2_semi")
    return root


def forbid_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("A required privilege is not held by the client")

    monkeypatch.setattr(os, "symlink", refuse)


def test_link_points_into_the_source_tree_and_unlink_removes_it(nnunet: Path, source_tree: Path) -> None:
    lines = link()
    for folder, line in zip(CLASS_FOLDERS, lines, strict=True):
        target = nnunet / folder.inside_nnunet
        assert target.is_symlink() and target.resolve() == source_tree / folder.in_source_tree
        assert str(target) in line and line.startswith("linked")
    assert all(line.startswith("already linked") for line in link())
    assert all(line.startswith("removed") for line in unlink())
    assert not any(os.path.lexists(nnunet / folder.inside_nnunet) for folder in CLASS_FOLDERS)
    assert all((source_tree / folder.in_source_tree / "classes.py").is_file() for folder in CLASS_FOLDERS)
    assert all("no such link" in line for line in unlink())


def test_a_link_to_an_older_checkout_is_replaced(nnunet: Path, source_tree: Path, tmp_path: Path) -> None:
    target = nnunet / CLASS_FOLDERS[0].inside_nnunet
    target.symlink_to(tmp_path / "gone")
    link()
    assert target.resolve() == source_tree / CLASS_FOLDERS[0].in_source_tree


def test_a_folder_that_is_not_ours_is_never_overwritten(nnunet: Path, source_tree: Path) -> None:
    target = nnunet / CLASS_FOLDERS[0].inside_nnunet
    make_class_folder(target, "somebody_elses = 1\n")
    with pytest.raises(UserError, match="not made by") as error:
        link()
    assert str(target) in str(error.value)
    unlink()
    assert (target / "classes.py").read_text() == "somebody_elses = 1\n"


def test_folders_are_copied_where_links_are_forbidden(
    nnunet: Path, source_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_links(monkeypatch)
    assert all(line.startswith("copied") for line in link())
    target = nnunet / CLASS_FOLDERS[0].inside_nnunet
    assert not target.is_symlink() and (target / COPY_MARKER).is_file()
    (source_tree / CLASS_FOLDERS[0].in_source_tree / "classes.py").write_text("value = 2\n")
    link()
    assert (target / "classes.py").read_text() == "value = 2\n", "a second link must bring the copy up to date"
    assert sorted(path.name for path in target.parent.iterdir()) == ["semi"], "nothing half-made is left"
    unlink()
    assert not target.exists()


def test_a_read_only_nnunet_is_a_clear_error(nnunet: Path, source_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="cannot be written") as error:
        link()
    assert str(nnunet) in str(error.value) and "virtual environment" in str(error.value)


def test_an_nnunet_of_another_version_is_a_clear_error(nnunet: Path, source_tree: Path) -> None:
    folder = (nnunet / CLASS_FOLDERS[0].inside_nnunet).parent
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="does not exist: this is not a complete nnunetv2 2.8") as error:
        link()
    assert str(folder) in str(error.value)


def test_a_link_that_cannot_be_made_is_a_clear_error(
    nnunet: Path, source_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    target = nnunet / CLASS_FOLDERS[0].inside_nnunet
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match="Could not make .*: No space left on device. Run the command as the user"):
            link()
    assert list(target.parent.iterdir()) == []


def test_the_folders_of_a_wheel_are_left_to_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site-packages"
    nnunet = make_nnunet(site / "nnunetv2")
    for folder in CLASS_FOLDERS:
        make_class_folder(nnunet / folder.inside_nnunet)
    monkeypatch.setattr(installation, "nnunet_folder", lambda: nnunet)
    monkeypatch.setattr(installation, "package_folder", lambda: site / "nnunetv2_semi")
    assert all(line.startswith("already in place") for line in link())
    assert all("pip uninstall" in line for line in unlink())
    assert all((nnunet / folder.inside_nnunet / "classes.py").is_file() for folder in CLASS_FOLDERS)


def test_missing_classes_are_named(nnunet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "package_folder", lambda: tmp_path / "empty" / "nnunetv2_semi")
    with pytest.raises(UserError, match="trainers"):
        link()


EDITABLE_NNUNET = """
import importlib.util, sys

class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "nnunetv2":
            folder = {nnunet!r}
            return importlib.util.spec_from_file_location(
                name, folder + "/__init__.py", submodule_search_locations=[folder])

sys.meta_path.append(Finder)
"""
LINK = "from nnunetv2_semi.installation import link\nprint('\\n'.join(link()))\n"
FIND = "import nnunetv2, nnunetv2.training.nnUNetTrainer.semi.classes as c\nprint(nnunetv2.__file__, c.value)\n"


@pytest.fixture
def hidden_nnunet(tmp_path: Path) -> tuple[Path, Path]:
    """site-packages with our wheel alone, and an nnunetv2 elsewhere that only an import hook knows."""
    site = tmp_path / "site-packages"
    for name in ("__init__.py", "errors.py", "installation.py"):
        (site / "nnunetv2_semi").mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(installation.__file__).with_name(name), site / "nnunetv2_semi" / name)
    rows = ["nnunetv2_semi/installation.py,sha256=a,1"]
    for folder in CLASS_FOLDERS:
        make_class_folder(site / "nnunetv2" / folder.inside_nnunet)
        rows.append(f"nnunetv2/{folder.inside_nnunet.as_posix()}/classes.py,sha256=b,2")
    (site / "nnunetv2_semi-0.1.0.dist-info").mkdir()
    (site / "nnunetv2_semi-0.1.0.dist-info" / "RECORD").write_text("\n".join(rows) + "\n")
    nnunet = make_nnunet(tmp_path / "checkout" / "nnunetv2")
    for folder in ("training", "training/nnUNetTrainer"):
        (nnunet / folder / "__init__.py").touch()
    return site, nnunet


def run_with_import_hook(site: Path, nnunet: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", "-c", EDITABLE_NNUNET.format(nnunet=str(nnunet)) + script],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=site,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_link_frees_an_nnunet_that_the_wheel_hides(hidden_nnunet: tuple[Path, Path]) -> None:
    site, nnunet = hidden_nnunet
    assert "None" in run_with_import_hook(site, nnunet, FIND).stdout, "the wheel's folder must hide nnunetv2 at first"
    linked = run_with_import_hook(site, nnunet, LINK)
    assert linked.returncode == 0, linked.stderr
    assert linked.stdout.startswith("moved:")
    assert not (site / "nnunetv2").exists()
    found = run_with_import_hook(site, nnunet, FIND)
    assert found.stdout.split() == [str(nnunet / "__init__.py"), "1"], found.stderr
    again = run_with_import_hook(site, nnunet, LINK)
    assert [line.split(":")[0] for line in again.stdout.splitlines()] == ["already linked"] * 3
    record = (site / "nnunetv2_semi-0.1.0.dist-info" / "RECORD").read_text().splitlines()
    assert all((site / row.split(",")[0]).is_file() for row in record), "pip uninstall must find the moved files"


def test_files_of_others_in_the_hiding_folder_are_not_removed(hidden_nnunet: tuple[Path, Path]) -> None:
    site, nnunet = hidden_nnunet
    stranger = site / "nnunetv2" / "training" / "somebody_elses.py"
    stranger.touch()
    result = run_with_import_hook(site, nnunet, LINK)
    assert result.returncode != 0 and "somebody_elses.py" in result.stderr
    assert stranger.is_file()


def test_a_missing_nnunet_is_a_clear_error(hidden_nnunet: tuple[Path, Path]) -> None:
    site, _ = hidden_nnunet
    shutil.rmtree(site / "nnunetv2")
    result = subprocess.run(
        [sys.executable, "-S", "-c", LINK],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=site,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "UserError: nnunetv2 is not installed" in result.stderr
