"""Weights of foundation models: where they are, what their file holds, and its SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from nnunetv2_semi.errors import UserError, one_line, shown

RANDOM = "random"
HUB = "hub:"
_INSTALL = 'pip install "nnunetv2-semi[foundation]"'


def local_weights(weights: str) -> Path | None:
    """The file or folder that ``weights`` stands for; None for ``"random"``.

    Args:
        weights: A path; or ``"hub:owner/name"``, a model on the hub, which is downloaded unless it was before; or
            ``"random"``.

    Raises:
        UserError: There is nothing there, or the hub cannot be reached.
    """
    if weights == RANDOM:
        return None
    if weights.startswith(HUB):
        return _downloaded(weights.removeprefix(HUB))
    path = Path(weights).expanduser()
    if not path.exists():
        raise UserError(f"There are no weights of a foundation model at {weights}. Give the path of a file or of a "
                        f'folder, or "{HUB}owner/name" for a model that is to be downloaded, or "{RANDOM}" '
                        "to start without weights. A trained model names them in its plans.json, which can be changed.")
    return path


def weights_digest(path: str | Path) -> str:
    """SHA-256, in hexadecimal, of a weights file; of a folder, that of the names and SHA-256 of what is read from it.

    Raises:
        UserError: The folder has no weights.
    """
    path = Path(path)
    if path.is_file():
        return _sha256(path)
    read = [file for file in (path / "config.json", *weight_files(path)) if file.is_file()]
    listed = [f"{file.name} {_sha256(file)}\n" for file in read]
    return hashlib.sha256("".join(listed).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights in a folder of transformers, safetensors where it has both kinds.

    Raises:
        UserError: It has none.
    """
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        files = sorted(folder.glob(pattern))
        if files:
            return files
    raise UserError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin.")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file, or in the files of a folder of transformers. Nothing in them is executed.

    A state dict under "model", as in checkpoints of a training, is found.

    Raises:
        UserError: A file cannot be read, or holds no state dict.
    """
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(path) if path.is_dir() else [path]:
        try:
            content = _read(file)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{file} cannot be read as the weights of a network: {one_line(error)}") from error
        if isinstance(content, dict) and isinstance(content.get("model"), dict):
            content = content["model"]
        if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise UserError(f"{file} holds no state dict (a dict of name to tensor).")
        state |= content
    return {name.removeprefix("module."): value for name, value in state.items()}


def require_same_parameters(own: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], path: str | Path,
                            hint: str = "") -> None:
    """Raise UserError, naming them, where parameters of a network are missing in a file, unknown or of another shape.

    Args:
        own: the network's, by name.
        found: the file's, under the network's names.
        path: of the file, for the message.
        hint: end of the message, how to mend it.
    """
    other = [f"{name} is {tuple(found[name].shape)}, must be {tuple(value.shape)}" for name, value in own.items()
             if name in found and found[name].shape != value.shape]
    wrong = {"are missing": [name for name in own if name not in found],
             "are not known": [name for name in found if name not in own],
             "have another shape": other}
    said = [f"{len(names)} {problem} ({shown(names, 8)})" for problem, names in wrong.items() if names]
    if said:
        raise UserError(f"The weights in {path} do not fit: of {len(own)} parameters " + "; ".join(said) + "."
                        + (f" {hint}" if hint else ""))


def missing_extra(package: str) -> UserError:
    """What to raise where ``package`` of the extra is not installed."""
    return UserError(f"This foundation model needs the package {package}: {_INSTALL}")


def _read(file: Path) -> object:
    if file.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise missing_extra("safetensors") from error
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _downloaded(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise missing_extra("huggingface_hub") from error
    try:
        folder = Path(snapshot_download(name, allow_patterns=["config.json", "model*.safetensors"]))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=["config.json", "pytorch_model*.bin"]))
    except Exception as error:
        # The hub's client raises errors of its own, of its network library and of the operating system.
        raise UserError(f"The model {name} cannot be had from the hub ({one_line(error)}). On a machine without a "
                        "network, download it elsewhere and give the path of its folder.") from error
    return folder


def _sha256(path: Path) -> str:
    state = path.stat()
    return _sha256_of_state(path, state.st_size, state.st_mtime_ns)


@lru_cache
def _sha256_of_state(path: Path, size: int, changed: int) -> str:
    """Read once by a process: the settings, the network and a teacher each ask for the digest of files of gigabytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
