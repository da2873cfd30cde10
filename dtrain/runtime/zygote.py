"""The node's zygote as its clients see it: connect, fork a child, learn how it ended.

client                             zygote
fork(entry, args, descriptors) ->  fork; the child calls entry(args, descriptors)
                               <-  {"pid": ...}, with its pidfd
                               <-  {"refused": why}                 when there is no room for another process
                               <-  {"exited": pid, "status": ...}   when it has ended
(client gone)                      its children are killed, except those forked with `outlive=True`
"""

import contextlib
import json
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain import fingerprint
from dtrain.errors import ClusterError

LEAVE = {"leave": True}
MAX_MESSAGE = 256 * 1024
START_TIMEOUT_S = 120.0


def socket_path(folder: Path, until: int) -> Path:
    # A zygote whose cluster is gone may still be serving its last clients: the next cluster's is another one.
    return folder / f"zygote-{fingerprint.of_code()}-{until}.sock"


@dataclass
class Child:
    """A process forked by the zygote; `pidfd` turns readable the moment it ends."""

    pid: int
    pidfd: int
    status: int | None = None
    """Exit status as `os.waitstatus_to_exitcode` gives it: negative for a signal."""

    def kill(self, signum: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError, OSError):
            signal.pidfd_send_signal(self.pidfd, signum)

    @property
    def is_alive(self) -> bool:
        return not select.select([self.pidfd], [], [], 0)[0]


class Zygote:
    """A connection to the node's zygote. Not shared between threads."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._statuses: dict[int, int] = {}

    @classmethod
    def connect(cls, folder: Path, until: int, timeout_s: float = START_TIMEOUT_S) -> "Zygote":
        """Connect to the zygote that serves from `folder`; start it first where there is none.

        `until` is the process it must not outlive. Raises `ClusterError` when it does not come up.
        """
        path = socket_path(folder, until)
        deadline = time.monotonic() + timeout_s
        process = None
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.connect(str(path))
                return cls(connection)
            except OSError:
                connection.close()
            if process is None:
                process = start(folder, until)
            elif process.poll() not in (None, 0):
                raise ClusterError(f"the zygote ended with {process.returncode}; see {folder / 'zygote.log'}")
            if until and not _lives(until):
                raise ClusterError(f"the head of this cluster (pid {until}) is gone")
            if time.monotonic() > deadline:
                raise ClusterError(f"the zygote did not come up in {timeout_s:.0f} s; see {folder / 'zygote.log'}")
            time.sleep(0.01)

    def fork(
        self,
        entry: str,
        args: Mapping[str, Any],
        descriptors: Sequence[int],
        log: int,
        name: str,
        *,
        outlive: bool = False,
        cleanup: str = "",
        nice: int = 0,
    ) -> Child:
        """Fork a child that runs `entry` ("module:function") as `function(args, descriptors)`.

        Its output goes to the descriptor `log`. `outlive` lets it live on when this connection ends; the files that
        match the pattern `cleanup` are then removed after it. Raises `ClusterError` when the zygote is gone.
        """
        request = {
            "entry": entry,
            "args": dict(args),
            "name": name,
            "outlive": outlive,
            "cleanup": cleanup,
            "nice": nice,
        }
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [log, *descriptors])
            while True:
                reply = self._receive()
                if "refused" in reply:
                    raise ClusterError(
                        f"the zygote cannot fork {name} ({reply['refused']}); see ulimit -u and free memory"
                    )
                if "pid" in reply:
                    return Child(reply["pid"], reply["pidfd"])
        except OSError as error:
            raise ClusterError(f"the zygote is gone ({error.strerror or error})") from None

    def wait(self, child: Child, timeout_s: float) -> int | None:
        """The child's exit status, or None when it is still alive after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while child.status is None:
            child.status = self._statuses.pop(child.pid, None)
            if child.status is not None:
                break
            ready, _, _ = select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            try:
                self._receive()
            except OSError:
                child.status = -signal.SIGKILL  # the zygote is gone, and its children with it
        return child.status

    @property
    def is_alive(self) -> bool:
        """Whether the zygote still holds the other end; what it has said meanwhile is kept."""
        while select.select([self._socket], [], [], 0)[0]:
            try:
                self._receive()
            except OSError:
                return False
        return True

    def close(self) -> None:
        self._socket.close()

    def _receive(self) -> dict[str, Any]:
        data, descriptors, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
        if not data:
            raise ConnectionResetError("the zygote closed the connection")
        message: dict[str, Any] = json.loads(data)
        if descriptors:
            message["pidfd"] = descriptors[0]
        if "exited" in message:
            self._statuses[message["exited"]] = message["status"]
        return message


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def warm_up(folder: Path, until: int) -> None:
    """Start the node's zygote unless it serves already; does not wait for it."""
    if not socket_path(folder, until).exists():
        start(folder, until)


def start(folder: Path, until: int) -> subprocess.Popen[bytes]:
    """Start a zygote that serves from `folder`, detached from this process; a second one ends by itself."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(folder / "zygote.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dtrain.runtime.zygote_server", str(folder), "--until", str(until)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
