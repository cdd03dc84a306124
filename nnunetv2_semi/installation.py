"""Where nnU-Net is, where our classes are, and making nnU-Net's search find them.

nnU-Net looks up trainers, planners and preprocessors by reading the folders of the nnunetv2 package. A wheel puts ours
there. An editable install of this package, or of nnunetv2, cannot: there, `link` makes links in nnunetv2's folders.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import shutil
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

import nnunetv2_semi
from nnunetv2_semi.errors import UserError

COPY_MARKER = ".nnunetv2_semi_copy"
REINSTALL = 'Install it into this environment: pip install "nnunetv2>=2.8,<2.9"'


@dataclass(frozen=True)
class ClassFolder:
    """One folder of classes that nnU-Net looks up by name.

    Attributes:
        inside_nnunet: where it lies inside the nnunetv2 package.
        in_source_tree: where it lies in a checkout of this project.
        in_package: where it lies inside nnunetv2_semi once `link` has moved it out of nnunetv2's way.
    """

    inside_nnunet: Path
    in_source_tree: Path
    in_package: Path


CLASS_FOLDERS = (
    ClassFolder(Path("training/nnUNetTrainer/semi"), Path("trainers"), Path("nnunet_folders/trainers")),
    ClassFolder(Path("experiment_planning/semi"), Path("planners"), Path("nnunet_folders/planners")),
    ClassFolder(Path("preprocessing/semi"), Path("planners/preprocessing"), Path("nnunet_folders/preprocessing")),
)


def package_folder() -> Path:
    """The folder of the imported nnunetv2_semi."""
    return Path(nnunetv2_semi.__file__).resolve().parent


def nnunet_folder() -> Path:
    """The folder of the nnunetv2 package, also where a folder of the same name without `__init__.py` hides it.

    Raises:
        UserError: nnunetv2 is not installed.
    """
    finders = [finder for finder in sys.meta_path if finder is not importlib.machinery.PathFinder]
    try:
        candidates = [importlib.util.find_spec("nnunetv2")]
    except (ImportError, ValueError):
        candidates = []
    candidates += [finder.find_spec("nnunetv2", None) for finder in finders if hasattr(finder, "find_spec")]
    for spec in candidates:
        if spec is not None and spec.origin is not None and Path(spec.origin).name == "__init__.py":
            return Path(spec.origin).parent
    raise UserError(f"nnunetv2 is not installed for {sys.executable}. {REINSTALL}")


def hiding_folder() -> Path | None:
    """The folder in site-packages that hides an editable nnunetv2 from Python; None where nothing is hidden.

    The wheel's own folders below `nnunetv2/` make one, if nnunetv2 itself is not beside them: Python then takes that
    folder for the package, before it asks the import hook of the editable install.
    """
    candidate = package_folder().parent / "nnunetv2"
    if not candidate.is_dir() or (candidate / "__init__.py").exists():
        return None
    spec = importlib.machinery.PathFinder.find_spec("nnunetv2")
    return candidate if spec is not None and spec.origin is None else None


def class_folder_source(folder: ClassFolder) -> Path:
    """Where the classes of `folder` are: source tree, wheel, or moved into our own package.

    Raises:
        UserError: they are in none of these places.
    """
    package = package_folder()
    places = [
        package / folder.in_package,
        package.parent / folder.in_source_tree,
        package.parent / "nnunetv2" / folder.inside_nnunet,
    ]
    for place in places:
        if (place / "__init__.py").is_file() and not place.is_symlink():
            return place
    raise UserError(
        f"The folder of classes {folder.in_source_tree} was not found (looked for {', '.join(map(str, places))}). "
        "The installation is incomplete: pip install --force-reinstall --no-deps nnunetv2-semi"
    )


def link() -> list[str]:
    """Make our classes visible to the nnunetv2 that is imported; what was done, one line per folder.

    Links folders, or copies them where the system forbids links. Doing it twice changes nothing.

    Raises:
        UserError: nnunetv2 is missing or read-only, or a folder that is not ours stands in the way.
    """
    nnunet = nnunet_folder()
    done = _free_hidden_nnunet(nnunet)
    for folder in CLASS_FOLDERS:
        done.append(_link_folder(class_folder_source(folder), nnunet / folder.inside_nnunet))
    importlib.invalidate_caches()
    return done


def unlink() -> list[str]:
    """Remove what `link` made in the nnunetv2 package; what was done, one line per folder.

    Raises:
        UserError: nnunetv2 is missing or read-only.
    """
    nnunet = nnunet_folder()
    done = []
    for folder in CLASS_FOLDERS:
        target = nnunet / folder.inside_nnunet
        if not target.is_symlink() and not is_copy(target):
            reason = "installed by pip, removed by `pip uninstall nnunetv2-semi`" if target.is_dir() else "no such link"
            done.append(f"left alone: {target} ({reason})")
            continue
        _require_writable(target.parent)
        _remove(target)
        done.append(f"removed: {target}")
    importlib.invalidate_caches()
    return done


def is_copy(target: Path) -> bool:
    """Whether `link` made the folder `target` by copying."""
    return not target.is_symlink() and (target / COPY_MARKER).is_file()


def _link_folder(source: Path, target: Path) -> str:
    if target.is_symlink():
        if target.resolve() == source.resolve():
            return f"already linked: {target} -> {source}"
    elif target.is_dir() and target.resolve() == source.resolve():
        return f"already in place: {target} (installed by pip)"
    elif os.path.lexists(target) and not is_copy(target):
        raise UserError(
            f"{target} exists and was not made by `nnunetv2_semi link`. If it is left over from another installation, "
            "remove it and repeat the command."
        )
    _require_writable(target.parent)
    unfinished = target.with_name(f".semi.{uuid.uuid4().hex}")
    try:
        try:
            os.symlink(source, unfinished, target_is_directory=True)
            verb = "linked"
        except OSError:
            shutil.copytree(source, unfinished, ignore=shutil.ignore_patterns("__pycache__"))
            (unfinished / COPY_MARKER).write_text(f"{source}\n", encoding="utf-8")
            verb = "copied (this system forbids links: repeat the command after each change or update)"
        _remove(target)
        os.replace(unfinished, target)
    except OSError as error:
        raise UserError(f"Could not make {target}: {error}. {_how_to_write(target.parent)}") from error
    finally:
        _remove(unfinished)
    return f"{verb}: {target} -> {source}"


def _remove(target: Path) -> None:
    """Remove a link, or a folder that was made by copying; nothing if absent."""
    if target.is_symlink():
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)


def _require_writable(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: this is not a complete nnunetv2 2.8. {REINSTALL}")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written. {_how_to_write(folder)}")


def _how_to_write(folder: Path) -> str:
    return (
        f"Run the command as the user who owns {folder}, or use a virtual environment of your own with "
        "`pip install nnunetv2-semi`, which needs no links."
    )


def _free_hidden_nnunet(nnunet: Path) -> list[str]:
    """Move the wheel's folders from the `nnunetv2/` that hides the editable nnunetv2 into our own package."""
    hiding = hiding_folder()
    if hiding is None or hiding.resolve() == nnunet.resolve():
        return []
    _require_writable(hiding.parent)
    package = package_folder()
    ours = {hiding / folder.inside_nnunet: package / folder.in_package for folder in CLASS_FOLDERS}
    foreign = [
        path
        for path in hiding.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not any(own in path.parents for own in ours)
    ]
    if foreign:
        raise UserError(
            f"{hiding} hides the nnunetv2 in {nnunet}, and holds files that are not ours, such as {foreign[0]}. "
            f"Remove {hiding} if it is left over from another installation, then repeat the command."
        )
    for old, new in ours.items():
        if old.is_dir():
            _remove(new)
            new.parent.mkdir(parents=True, exist_ok=True)
            os.replace(old, new)
    shutil.rmtree(hiding)
    _rename_in_record(package.parent)
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name == "nnunetv2" or name.startswith("nnunetv2.")]:
        del sys.modules[name]
    return [f"moved: the classes in {hiding}, which hid the nnunetv2 in {nnunet}, to {package / 'nnunet_folders'}"]


def _rename_in_record(site_packages: Path) -> None:
    """Tell pip of the moved files, so that `pip uninstall` removes them."""
    for record in site_packages.glob("nnunetv2_semi-*.dist-info/RECORD"):
        text = record.read_text(encoding="utf-8")
        for folder in CLASS_FOLDERS:
            old = f"nnunetv2/{folder.inside_nnunet.as_posix()}/"
            new = f"nnunetv2_semi/{folder.in_package.as_posix()}/"
            text = "\n".join(new + line[len(old) :] if line.startswith(old) else line for line in text.split("\n"))
        unfinished = record.with_name(f".RECORD.{uuid.uuid4().hex}")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, record)
