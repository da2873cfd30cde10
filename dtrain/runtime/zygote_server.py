"""The process that every rank is forked from: torch imported once a node, no thread, no CUDA context.

A fork of it is ready in milliseconds where a new interpreter needs seconds to import torch. It stays on the node
between runs and ends with the process it was told to outlive no longer than (`until`), when asked, or when its socket
is gone. What it is asked and what it answers stands in `zygote`. Linux only: SOCK_SEQPACKET keeps messages whole,
pidfd and PDEATHSIG leave no orphan behind.
"""

import argparse
import contextlib
import ctypes
import fcntl
import gc
import glob
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.runtime.zygote import LEAVE, MAX_MESSAGE, socket_path

PRELOAD = (
    "torch",
    "torch._dynamo",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.nn.parallel",
    "torch.optim",
    "torch.utils.tensorboard",
    "dtrain.runtime.rank",
    "dtrain.runtime.agent",
    "dtrain.checkpoint.writer",
    "dtrain.models.networks",
)
"""Imported before the first fork. Without torch._dynamo the first optimizer step of every rank would import it."""

MAX_DESCRIPTORS = 8
REACHABLE_CHECK_S = 5.0
LAST_CLIENTS_S = 300.0
"""How long clients get to put their state on storage once the cluster is gone."""
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15


@dataclass
class _Session:
    connection: socket.socket
    children: set[int] = field(default_factory=set)


@dataclass
class _Forked:
    session: _Session | None
    outlive: bool
    cleanup: str


class Server:
    """The zygote's loop: accept, fork, reap."""

    def __init__(self, listener: socket.socket, until: int) -> None:
        self._listener = listener
        self._sessions: dict[int, _Session] = {}
        self._forked: dict[int, _Forked] = {}
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._poll.register(self._wake_read, select.POLLIN)
        self._until = os.pidfd_open(until) if until else -1
        if until:
            self._poll.register(self._until, select.POLLIN)
        self._is_leaving = False

    def serve(self) -> None:
        """Until it is told to leave, the process it must not outlive has ended, or nobody can reach it any more.

        Clients that it has then may finish first.
        """
        deadline = float("inf")
        while time.monotonic() < deadline and (self._sessions or not (self._is_leaving or self._is_out_of_reach())):
            for descriptor, _ in self._poll.poll(1000 * (1 if self._is_leaving else REACHABLE_CHECK_S)):
                if descriptor == self._listener.fileno():
                    connection, _address = self._listener.accept()
                    self._sessions[connection.fileno()] = _Session(connection)
                    self._poll.register(connection, select.POLLIN)
                elif descriptor == self._wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_read, 4096)
                    self._reap()
                elif descriptor == self._until:
                    self._poll.unregister(self._until)
                    self._is_leaving = True
                    deadline = time.monotonic() + LAST_CLIENTS_S
                elif descriptor in self._sessions:
                    self._serve_session(self._sessions[descriptor])

    def _is_out_of_reach(self) -> bool:
        """Its folder was removed, and its socket with it, and no child of it works on."""
        return not self._forked and not os.path.exists(self._listener.getsockname())

    def end_children(self) -> None:
        for pid in list(self._forked):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _serve_session(self, session: _Session) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(
                session.connection, MAX_MESSAGE, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._end_session(session)
            return
        try:
            request = json.loads(data)
            if request == LEAVE:
                self._is_leaving = True
                return
            forked = _Forked(session, bool(request["outlive"]), str(request["cleanup"]))
        except (ValueError, TypeError, KeyError):
            # Whoever says this is broken, and must not break the ranks of others.
            _close(descriptors)
            self._end_session(session)
            return
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            _close(descriptors)
            self._tell(session, {"refused": error.strerror})
            return
        if pid == 0:
            self._become(request, descriptors, parent)
        _close(descriptors)
        self._forked[pid] = forked
        session.children.add(pid)
        # Opened here, where the child is not reaped yet: a client could come too late, or meet another of this number.
        pidfd = os.pidfd_open(pid)
        self._tell(session, {"pid": pid}, [pidfd])
        os.close(pidfd)

    def _become(self, request: dict[str, Any], descriptors: list[int], parent: int) -> None:
        """In the child: leave everything of the zygote behind and run the entry. Never returns."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            libc = ctypes.CDLL(None)
            libc.prctl(PR_SET_NAME, request["name"].encode()[:15], 0, 0, 0)
            if not request["outlive"]:
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                if os.getppid() != parent:
                    os._exit(1)  # the zygote ended before it could be asked for
            self._listener.close()
            for session in self._sessions.values():
                session.connection.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            log, *rest = descriptors
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            if request["nice"]:
                os.nice(request["nice"])
            module, _, function = request["entry"].partition(":")
            code = getattr(importlib.import_module(module), function)(request["args"], rest) or 0
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _end_session(self, session: _Session) -> None:
        self._poll.unregister(session.connection)
        del self._sessions[session.connection.fileno()]
        session.connection.close()
        for pid in session.children:
            forked = self._forked.get(pid)
            if forked is None:
                continue
            forked.session = None
            if not forked.outlive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            forked = self._forked.pop(pid, None)
            if forked is None:
                continue
            if forked.session is not None:
                forked.session.children.discard(pid)
                self._tell(forked.session, {"exited": pid, "status": os.waitstatus_to_exitcode(status)})
            elif forked.cleanup:
                # Nobody is left who could want them: whoever asked for the child has gone before it.
                for path in glob.glob(forked.cleanup):
                    with contextlib.suppress(OSError):
                        os.unlink(path)

    def _tell(self, session: _Session, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        with contextlib.suppress(OSError):
            socket.send_fds(session.connection, [json.dumps(message).encode()], descriptors)


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _dismiss_older(path: Path, until: int) -> None:
    """Zygotes of this cluster with older code leave once their last clients have."""
    for other in path.parent.glob(f"zygote-*-{until}.sock"):
        if other != path:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                connection.connect(str(other))
                connection.send(json.dumps(LEAVE).encode())
            other.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve forks of a process that has torch imported.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--until", type=int, default=0)
    arguments = parser.parse_args()
    path = socket_path(arguments.folder, arguments.until)
    lock = os.open(arguments.folder / f"{path.stem}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # Not flock: the children would inherit it, and a killed zygote could not be followed while one of them lives.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # another one serves, or is about to
    (arguments.folder / "zygote.pid").write_text(str(os.getpid()))
    for name in PRELOAD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # children never walk, and so never copy, what was imported here
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(64)
    _dismiss_older(path, arguments.until)
    try:
        server = Server(listener, arguments.until)
    except ProcessLookupError:
        path.unlink(missing_ok=True)
        return
    try:
        server.serve()
    finally:
        server.end_children()
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    # Forked children pickle and import by module name: this module must be itself, not __main__.
    from dtrain.runtime import zygote_server

    zygote_server.main()
