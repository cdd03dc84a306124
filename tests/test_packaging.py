"""Real installations: each test makes a virtual environment that borrows the dependencies of the running one."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import nnunetv2
import pytest

from nnunetv2_semi.doctor.environment import PLANNING, PREPROCESSING

ROOT = Path(__file__).resolve().parent.parent
TRAINERS = tuple(sorted(file.stem for file in (ROOT / "trainers").glob("nnUNetTrainer*.py")))
PACKED = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "nnunetv2_semi", "trainers", "planners")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree"),
]

# What nnU-Net's commands do with the names they are given; in spawned workers too.
FIND = f"""
import multiprocessing, os, pickle, sys
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
import nnunetv2

def name_of(cls):
    return cls.__name__

if __name__ == "__main__":
    def find(folder, name):
        return recursive_find_python_class(os.path.join(nnunetv2.__path__[0], folder), name, "nnunetv2." + folder)

    classes = [recursive_find_trainer_class_by_name(name) for name in {TRAINERS!r}]
    classes += [find("experiment_planning", name) for name in {PLANNING!r}]
    classes += [find("preprocessing", name) for name in {PREPROCESSING!r}]
    assert None not in classes, classes
    assert all(pickle.loads(pickle.dumps(cls)) is cls for cls in classes)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        names = pool.map(name_of, classes)
    print("FOUND", *names)
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment with everything but nnunetv2 and this package."""

    folder: Path

    @property
    def site_packages(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "nnUNet_extTrainer")}
        return subprocess.run(
            [str(self.folder / "bin" / program), *arguments],
            env=clean,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def pip_install(self, *arguments: str) -> None:
        result = self.run("python", "-m", "pip", "install", "-q", "--no-deps", *arguments)
        assert result.returncode == 0, result.stdout + result.stderr

    def finds_all_classes(self) -> bool:
        script = self.folder / "find.py"
        script.write_text(FIND)
        result = self.run("python", str(script))
        found = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("FOUND")]
        return found == [[*TRAINERS, *PLANNING, *PREPROCESSING]]


@pytest.fixture(scope="session")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to all installed packages but nnunetv2 and this one."""
    folder = tmp_path_factory.mktemp("dependencies")
    hidden = ("nnunetv2", "__editable__", "_distutils_hack", "setuptools", "pip")
    for site in {Path(path) for path in sys.path if path.endswith("site-packages")}:
        for entry in site.iterdir():
            if not entry.name.startswith(hidden) and entry.suffix != ".pth" and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def environment(dependencies: Path, tmp_path: Path) -> Environment:
    if os.name == "nt":
        pytest.skip("the stand-in for an environment is made of links")
    venv.create(tmp_path / "venv", with_pip=True)
    made = Environment(tmp_path / "venv")
    (made.site_packages / "dependencies.pth").write_text(f"{dependencies}\n")
    return made


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, since building writes into it."""
    folder = tmp_path_factory.mktemp("source")
    for name in PACKED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.glob("*.whl"))


def copy_nnunet(folder: Path) -> Path:
    """nnunetv2 alone, without classes of ours, and what pip knows of it."""
    target = folder / "nnunetv2"
    shutil.copytree(nnunetv2.__path__[0], target, ignore=shutil.ignore_patterns("__pycache__", "semi"))
    metadata = importlib.metadata.distribution("nnunetv2")
    info = folder / f"nnunetv2-{metadata.version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(metadata.read_text("METADATA") or "")
    return target


def make_editable_nnunet(environment: Environment, folder: Path) -> Path:
    """nnunetv2 found by an import hook alone, as pip's editable installs have it."""
    folder.mkdir()
    nnunet = copy_nnunet(folder)
    hook = (
        "import sys\nfrom importlib.util import spec_from_file_location as spec\n\n"
        "class Finder:\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        if name == 'nnunetv2':\n"
        f"            folder = {str(nnunet)!r}\n"
        "            return spec(name, folder + '/__init__.py', submodule_search_locations=[folder])\n"
        "\nsys.meta_path.append(Finder)\n"
    )
    (environment.site_packages / "editable_nnunet.py").write_text(hook)
    (environment.site_packages / "editable_nnunet.pth").write_text("import editable_nnunet\n")
    for info in folder.glob("*.dist-info"):
        shutil.move(str(info), environment.site_packages)
    return nnunet


def test_the_wheel_holds_the_classes_where_nnunet_looks_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert all(f"nnunetv2/training/nnUNetTrainer/semi/{name}.py" in names for name in TRAINERS)
    assert "nnunetv2/experiment_planning/semi/__init__.py" in names
    assert "nnunetv2/preprocessing/semi/__init__.py" in names
    assert "nnunetv2/__init__.py" not in names, "the wheel must not overwrite nnU-Net's own files"
    packaged = {str(path.relative_to(ROOT)) for path in (ROOT / "nnunetv2_semi").rglob("*.py")}
    assert packaged <= set(names)
    assert not [name for name in names if name.startswith(("tests", "trainers", "planners"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_after_pip_install_nnunet_finds_the_classes_and_after_uninstall_they_are_gone(
    environment: Environment, wheel: Path
) -> None:
    nnunet = copy_nnunet(environment.site_packages)
    environment.pip_install(str(wheel))
    assert environment.finds_all_classes()
    assert environment.run("nnunetv2_semi", "doctor").stdout.count("visible to nnU-Net") == 3
    assert environment.run("python", "-m", "pip", "uninstall", "-y", "nnunetv2-semi").returncode == 0
    assert not list(nnunet.rglob("semi"))
    assert environment.run("python", "-c", "import nnunetv2.paths").returncode == 0


def test_an_editable_install_is_found_after_link_and_not_after_unlink(environment: Environment, source: Path) -> None:
    copy_nnunet(environment.site_packages)
    environment.pip_install("-e", str(source))
    assert environment.run("python", "-c", "import nnunetv2.paths, nnunetv2_semi.cli").returncode == 0
    told = environment.run("nnunetv2_semi", "doctor")
    assert told.returncode == 1 and "not visible" in told.stdout and "nnunetv2_semi link" in told.stdout
    assert environment.run("nnunetv2_semi", "link").returncode == 0
    assert environment.finds_all_classes()
    assert environment.run("nnunetv2_semi", "unlink").returncode == 0
    assert not environment.finds_all_classes()


@pytest.mark.parametrize("editable", [False, True])
def test_an_editable_nnunet_elsewhere_works_after_link(
    environment: Environment, source: Path, wheel: Path, tmp_path: Path, editable: bool
) -> None:
    nnunet = make_editable_nnunet(environment, tmp_path / "checkout")
    environment.pip_install(*(["-e", str(source)] if editable else [str(wheel)]))
    told = environment.run("nnunetv2_semi", "doctor")
    assert told.returncode == 1 and "nnunetv2_semi link" in told.stdout
    linked = environment.run("nnunetv2_semi", "link")
    assert linked.returncode == 0 and str(nnunet) in linked.stdout
    assert environment.finds_all_classes()
    assert environment.run("nnunetv2_semi", "unlink").returncode == 0
    assert environment.run("python", "-m", "pip", "uninstall", "-y", "nnunetv2-semi").returncode == 0
    assert not list(nnunet.rglob("semi")) and not list(environment.site_packages.rglob("nnunet_folders"))
    assert environment.run("python", "-c", "import nnunetv2.paths").returncode == 0
