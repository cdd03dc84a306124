"""Files and folders that are either absent or complete, whatever moment the process is killed at."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[str]:
    """A temporary name in the folder of ``path``, made if need be; renamed to ``path`` when the block ends well.

    What was written is on the disk before that, so that even a machine that fails then leaves one of the two whole.
    """
    folder, name = os.path.split(path)
    os.makedirs(folder or ".", exist_ok=True)
    unfinished = os.path.join(folder, f".{name}.{uuid.uuid4().hex}")
    try:
        yield unfinished
        with open(unfinished, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def remove_unfinished(folder: str, beginning: str) -> None:
    """Remove what a killed `whole_file` has left in ``folder`` of files whose names begin so.

    Only for files that no other process writes.
    """
    for name in os.listdir(folder):
        if re.fullmatch(rf"\.{re.escape(beginning)}.*\.[0-9a-f]{{32}}", name):
            os.remove(os.path.join(folder, name))


@contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[str]:
    """A new folder beside ``path``, hidden from nnU-Net by a dot; renamed to ``path`` when the block ends well.

    ``path`` may be there, as an empty folder. OSError is raised if something is in it by then.
    """
    folder, name = os.path.split(os.path.abspath(path))
    unfinished = os.path.join(folder, f".{name}.{uuid.uuid4().hex}")
    os.makedirs(unfinished)
    try:
        yield unfinished
        if os.path.isdir(path):
            os.rmdir(path)  # on Windows nothing can be renamed to what is there
        os.rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json_whole(path: str, content: Mapping[str, object] | Sequence[object]) -> None:
    """Write ``content`` to ``path`` as JSON."""
    with whole_file(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


def read_json_object(path: str) -> dict | None:
    """The object in `path`; None if the file is absent or is not a JSON object."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None
