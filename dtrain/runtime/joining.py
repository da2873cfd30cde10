"""How a driver comes to its cluster, and a waiting one to its run."""

import argparse
import contextlib
import os
import select
import socket
import threading
import time
from pathlib import Path
from typing import Any

from dtrain import fingerprint
from dtrain.errors import ClusterError
from dtrain.runtime.reservation import connect

POLL_S = 0.1
PATIENCE_S = 120.0


def join(arguments: argparse.Namespace, name: str, until: int) -> Any:
    """Connect to Ray, whose client would try for minutes to reach a head that has ended meanwhile.

    In a thread, where it also leaves this process's signal handlers alone. Raises `ClusterError`.
    """
    joined: list[Any] = []

    def join() -> None:
        try:
            joined.append(connect(arguments.address, arguments.token, name))
        except ClusterError as error:
            joined.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    deadline = time.monotonic() + PATIENCE_S
    while thread.is_alive():
        if time.monotonic() > deadline:
            raise ClusterError(f"the Ray cluster at {arguments.address} did not answer within {PATIENCE_S:.0f} s")
        if not is_alive(until):
            raise ClusterError(f"the Ray head at {arguments.address} ended before it could be joined")
        thread.join(POLL_S)
    if isinstance(joined[0], ClusterError):
        raise joined[0]
    return joined[0]


def await_run(folder: Path, until: int) -> Path | None:
    """Serve a socket until somebody hands over a run folder; None when the cluster ends first."""
    path = folder / f"driver-{fingerprint.of_code()}-{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(4)
        try:
            while True:
                ready, _, _ = select.select([listener.fileno(), until] if until >= 0 else [listener.fileno()], [], [])
                if listener.fileno() not in ready:
                    return None
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):  # who did not wait for the answer starts another driver
                    word = connection.recv(4096).decode()
                    if word == "leave":
                        return None
                    if word:
                        connection.send(b"taken")
                        return Path(word)
        finally:
            path.unlink(missing_ok=True)


def watch(pid: int) -> int:
    """A descriptor that turns readable when the process has ended, also when it has already; -1 for no process."""
    if not pid:
        return -1
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        read, write = os.pipe()
        os.close(write)
        return read


def is_alive(pidfd: int) -> bool:
    return pidfd < 0 or not select.select([pidfd], [], [], 0)[0]
