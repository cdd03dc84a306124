from __future__ import annotations

import threading

import pytest
from filelock import FileLock

from nnunetv2_semi.data.one_at_a_time import LOCK, one_at_a_time


def test_a_second_one_says_that_it_waits_and_goes_on_after_the_first(tmp_path):
    lines: list[str] = []
    entered, waits = threading.Event(), threading.Event()

    def second():
        with one_at_a_time(str(tmp_path), lambda line: (lines.append(line), waits.set())):
            entered.set()

    with one_at_a_time(str(tmp_path), lines.append):
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(60) and not entered.is_set()
    thread.join(60)
    assert entered.is_set() and lines == [
        f"Waiting for another process that prepares cases in {tmp_path}, and holds {LOCK} there"]


def test_an_error_frees_the_lock(tmp_path):
    with pytest.raises(KeyError), one_at_a_time(str(tmp_path), print):
        raise KeyError
    with FileLock(tmp_path / LOCK).acquire(timeout=0):
        pass


def test_where_no_lock_can_be_had_nobody_waits(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with one_at_a_time(str(tmp_path), lambda line: pytest.fail(line)):
        pass
