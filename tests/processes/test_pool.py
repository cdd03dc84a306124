"""How many processes work is spread over."""

import os
import threading

import pytest
from nnunetv2 import configuration

from nnunetv2_semi.processes.pool import default_processes, processes_to_read, share_out


@pytest.mark.parametrize(("cores", "asked", "processes"), [
    (2, None, 2), (64, None, 8), (2, "6", 6), (64, "6", 6),  # nnU-Net's own number is 8
])
def test_no_more_processes_than_cores_unless_asked_for(monkeypatch, cores, asked, processes):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setattr(configuration, "default_num_processes", int(asked or 8))
    monkeypatch.delenv("nnUNet_def_n_proc", raising=False)
    if asked:
        monkeypatch.setenv("nnUNet_def_n_proc", asked)
    assert default_processes() == processes
    assert processes_to_read(range(1000)) == processes and processes_to_read(range(3)) == 1


def test_shared_out_work_takes_all_slots_and_keeps_the_order():
    both, begun, used = threading.Barrier(2, timeout=60), [], set()

    def work(task, slot, stop_if_asked):
        begun.append(task)
        used.add(slot)
        if task < 2:
            both.wait()  # passes only where two work at once

    share_out(range(6), ["a", "b"], work, lambda: None)
    assert sorted(begun) == list(range(6)) and set(begun[:2]) == {0, 1} and used == {"a", "b"}


def test_shared_out_work_ends_where_one_task_fails():
    begun = []

    def work(task, slot, stop_if_asked):
        begun.append(task)
        if task == 1:
            raise ValueError("the reason")
        while True:
            stop_if_asked()

    with pytest.raises(ValueError, match="the reason"):
        share_out(range(4), ["a", "b"], work, lambda: None)
    assert sorted(begun) == [0, 1]


def test_shared_out_work_ends_where_the_caller_is_stopped():
    def work(task, slot, stop_if_asked):
        while True:
            stop_if_asked()

    def look():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        share_out(range(4), ["a", "b"], work, look)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]
