"""Processes that would prepare the same data set do it one after another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

LOCK = ".semi_preparing.lock"


@contextmanager
def one_at_a_time(folder: str, report: Callable[[str], None]) -> Iterator[None]:
    """Wait for others that prepare a data set, such as folds that were started together: they do the work of all.

    Where no lock can be had, as in a folder that is read-only, nobody is waited for.

    Args:
        folder: of the preprocessed data set.
        report: receives one line if there is something to wait for.
    """
    lock = FileLock(os.path.join(folder, LOCK))
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(f"Waiting for another process that prepares cases in {folder}, and holds {LOCK} there")
            lock.acquire()
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        lock.release()
