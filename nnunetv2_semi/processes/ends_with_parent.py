"""Run as a program: runs a command, and ends its whole process group when the other end of a pipe is closed.

    python ends_with_parent.py PIPE CORES COMMAND ...

PIPE: file descriptor to read, whose other end the starting process holds: it is closed even by SIGKILL. CORES: the
command's, as 0,1,2, or "all". Unix only, and free of imports of ours, so that it starts at once.
"""

import os
import signal
import subprocess
import sys
import threading


def _end_group_when_closed(pipe: int) -> None:
    os.read(pipe, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main(pipe: int, cores: str, command: list[str]) -> int:
    if cores != "all" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    # The group's SIGTERM is for the command, which has the default action again after exec; this waits for its end.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    process = subprocess.Popen(command)
    threading.Thread(target=_end_group_when_closed, args=(pipe,), daemon=True).start()
    code = process.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
