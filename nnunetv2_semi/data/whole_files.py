"""JSON files that are either absent or complete, whatever moment the process is killed at."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence


def write_json_whole(path: str, content: Mapping[str, object] | Sequence[object]) -> None:
    """Write `content` to `path`: under a temporary name in the same folder first, then renamed over `path`."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    unfinished = os.path.join(folder, f".{os.path.basename(path)}.{uuid.uuid4().hex}")
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def read_json_object(path: str) -> dict | None:
    """The object in `path`; None if the file is absent or is not a JSON object."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None
