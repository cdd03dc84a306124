"""What was read from files, kept in one JSON file: a file is read again when it, or what belongs to it, changed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from nnunetv2_semi.data.atomic_files import read_json_object, write_json_whole
from nnunetv2_semi.errors import one_line
from nnunetv2_semi.processes.pool import results_in_parallel

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Content = TypeVar("Content", bound=DataclassInstance)
else:
    Content = TypeVar("Content")

_SECONDS_BETWEEN_SAVES = 20.0
_ENDINGS_IN_TWO_PARTS = (".nii.gz",)


def read_cached(
    files: Iterable[str],
    read: Callable[[str], Content],
    from_json: Callable[[dict], Content],
    *,
    made_by: Mapping[str, object],
    raw_dataset_folder: str,
    cache_file: str | None,
    num_processes: int,
    description: str,
    show_progress_bar: bool = True,
    report: Callable[[str], None] = print,
) -> tuple[dict[str, Content], dict[str, str]]:
    """What ``read`` gives for each file; unchanged files (see `file_stamp`) are not read again.

    The cache saves time and nothing else: where it cannot be written, as in a folder that is read-only, all goes on
    without it.

    Args:
        files: paths.
        read: gives a dataclass; it must pickle, and so must what it gives.
        from_json: makes one of what `dataclasses.asdict` gives, after a trip through JSON.
        made_by: what else the content depends on, such as the reader; a cache with other values is not used.
        raw_dataset_folder: paths below it are cached relative to it.
        cache_file: JSON, written whole now and then and at the end; None for no cache.
        num_processes: of the reading.
        description: of the progress bar.
        show_progress_bar: one step per file that has to be read.
        report: receives one line if the cache cannot be written.

    Returns:
        Content by path, and the reason by path for files that cannot be read.
    """
    cache = (read_json_object(cache_file) if cache_file else None) or {}
    known = cache.get("files", {}) if all(cache.get(key) == value for key, value in made_by.items()) else {}
    contents: dict[str, Content] = {}
    unreadable: dict[str, str] = {}
    stamps: dict[str, list[int]] = {}
    for path in files:
        try:
            stamps[path] = file_stamp(path)
        except OSError as error:  # a link that leads nowhere, of which `read` says more
            unreadable[path] = _content_or_reason(read, path)[1] or one_line(error)
            continue
        entry = known.get(_cache_key(path, raw_dataset_folder))
        if entry is not None and entry["stamp"] == stamps[path]:
            contents[path] = from_json(entry["content"])

    to_read = [path for path in stamps if path not in contents]
    if not to_read:
        return contents, unreadable
    with saved_now_and_then(cache_file, {**made_by, "files": known}, report) as save:
        for path, (found, reason) in results_in_parallel(
            partial(_content_or_reason, read),
            to_read,
            num_processes=num_processes,
            description=description,
            show_progress_bar=show_progress_bar,
        ):
            if found is None:
                unreadable[path] = reason
            else:
                contents[path] = found
                known[_cache_key(path, raw_dataset_folder)] = {"stamp": stamps[path], "content": asdict(found)}
            save()
    return contents, dict(sorted(unreadable.items()))


@contextmanager
def saved_now_and_then(path: str | None, content: Mapping[str, object],
                       report: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """A function to call whenever ``content`` has changed, which `write_if_possible` writes now and then, and at last.

    path: None writes nothing. What cannot be written is not tried again.
    """
    possible, last_save = path is not None, time.monotonic()

    def save(at_once: bool = False) -> None:
        nonlocal possible, last_save
        if path is not None and possible and (at_once or time.monotonic() - last_save > _SECONDS_BETWEEN_SAVES):
            possible, last_save = write_if_possible(path, content, report), time.monotonic()

    try:
        yield save
    finally:
        save(at_once=True)


def write_if_possible(path: str, content: Mapping[str, object], report: Callable[[str], None]) -> bool:
    """Write what saves time and nothing else; whether that was possible. If not, one line says so."""
    try:
        write_json_whole(path, content)
    except OSError as error:
        report(f"{path} cannot be written ({one_line(error)}): what it would hold is found out again next time.")
        return False
    return True


def file_stamp(path: str) -> list[int]:
    """Size (bytes) and modification time (ns) of a file and of its companions: what tells that it changed."""
    stamp: list[int] = []
    for file in (path, *companion_files(path)):
        status = os.stat(file)
        stamp += [status.st_size, status.st_mtime_ns]
    return stamp


def companion_files(path: str) -> list[str]:
    """The files beside an image or label that nnU-Net's readers look into as well; those that are there.

    The voxel size of a TIFF file is in ``CASE.json``: without the number of the channel, which a label has not.
    """
    folder, name = os.path.split(path)
    ending = next((ending for ending in _ENDINGS_IN_TWO_PARTS if name.endswith(ending)), os.path.splitext(name)[1])
    stem = name[: len(name) - len(ending)]
    stems = dict.fromkeys((stem, re.sub(r"_\d{4}$", "", stem)))
    candidates = [os.path.join(folder, f"{stem}.json") for stem in stems]
    return [file for file in candidates if os.path.isfile(file)]


def _content_or_reason(read: Callable[[str], Content], path: str) -> tuple[Content | None, str]:
    try:
        return read(path), ""
    except MemoryError:
        raise
    except Exception as error:  # readers raise whatever their libraries do
        return None, one_line(error)


def _cache_key(path: str, raw_dataset_folder: str) -> str:
    try:
        relative = os.path.relpath(path, raw_dataset_folder)
    except ValueError:  # on another drive of Windows
        relative = os.pardir
    return os.path.abspath(path) if relative.startswith(os.pardir) else relative
