"""How many processes work is spread over."""

import os

import pytest
from nnunetv2 import configuration

from nnunetv2_semi.processes.pool import default_processes, processes_to_read


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
