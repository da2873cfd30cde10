"""What a container runtime does for one container: start its first process, and end all others when that one ends.

python container.py PID_FILE COMMAND...     SIGTERM goes to the first process; when standard input ends, all are killed

No process can leave: whoever loses its parent is adopted here. Exits as the first process did.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.05


def main(pid_file: str, command: list[str]) -> int:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    first = subprocess.Popen(command, stdin=subprocess.DEVNULL).pid
    signal.signal(signal.SIGTERM, lambda *_: _signal(first, signal.SIGTERM))
    Path(pid_file).write_text(str(first))
    status: int | None = None
    while status is None and not select.select([sys.stdin], [], [], POLL_S)[0]:
        status = _reap(first)
    while left := _descendants():
        for pid in left:
            _signal(pid, signal.SIGKILL)
        status = _reap(first) if status is None else status
        _reap(first)
        time.sleep(0.01)
    return 137 if status is None else status


def _reap(first: int) -> int | None:
    """Take in who has ended; the exit status of the first process if it is among them."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == first:
                code = os.waitstatus_to_exitcode(ended[1])
                status = code if code >= 0 else 128 - code
    return status


def _descendants() -> list[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found, front = [], [os.getpid()]
    while front:
        front = [pid for pid, parent in parents.items() if parent in front]
        found += front
    return found


def _signal(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
