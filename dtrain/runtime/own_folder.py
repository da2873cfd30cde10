"""The folder in which a process works on a run whose storage is a bucket: its own, on its node, gone when it is done.

<temporary folder>/dtrain-<uid>/runs/<token>-<who>/<run>/      who: `driver`, or the number of the node
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from dtrain.errors import StorageError

GOING = "going"
LEAVING_S = 30.0
"""How long a node may still be there when its runs had the time that they were given."""
BEGUN_S = 60.0
"""A folder without a lock that is older was left by a process that died while it made it."""


def base() -> Path:
    return Path(tempfile.gettempdir()) / f"dtrain-{os.getuid()}"


def make_base() -> None:
    """Raises `StorageError` where somebody else has taken the name: code is run from below it."""
    base().mkdir(mode=0o700, exist_ok=True)
    if base().is_symlink() or base().stat().st_uid != os.getuid():
        raise StorageError(f"{base()} belongs to somebody else; remove it, or set TMPDIR to a folder of yours")


def code_folder(run_id: str) -> Path:
    """Where the user's own code is unpacked: the same on every node, so that a plan names the same files everywhere."""
    make_base()
    return base() / "code" / run_id


def say_going(within_s: float) -> None:
    """Tell this node's runs that it goes away, and that they have so long. Raises `StorageError`."""
    make_base()
    making = base() / f".{GOING}-{os.getpid()}"
    making.write_text(f"{within_s}\n")
    making.replace(base() / GOING)


def is_going() -> bool:
    """Whether this node was told that it goes away (`python -m dtrain.runtime.preempted`).

    That counts for the time given and `LEAVING_S` more: a machine that is still there after that has stayed, and runs
    may begin on it again.
    """
    try:
        with (base() / GOING).open() as file:
            age_s = time.time() - os.fstat(file.fileno()).st_mtime
            return abs(age_s) < float(file.read()) + LEAVING_S
    except (FileNotFoundError, ValueError):
        return False


def node_folder(raylet: int) -> Path:
    """Where the zygote of a Ray node serves from; those whose node has gone are removed."""
    make_base()
    for folder in base().glob("node-*"):
        with contextlib.suppress(OSError, ValueError):
            if not _lives(int(folder.name.removeprefix("node-"))) and not _is_served(folder):
                shutil.rmtree(folder)
    return base() / f"node-{raylet}"


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _is_served(folder: Path) -> bool:
    """Whether a zygote still works there: for its last clients, or in a container that numbers processes anew."""
    for lock in folder.glob("*.lock"):
        with lock.open("r+b") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
    return False


class OwnFolder:
    """Made, and locked as long as this process or one that inherits `lock` lives."""

    def __init__(self, run_id: str, token: int, who: str) -> None:
        _sweep()
        self.path = base() / "runs" / f"{token}-{who}" / run_id
        make_base()
        while not self._is_locked():
            pass

    def _is_locked(self) -> bool:
        """Make and lock it; False when somebody swept it, or gave it back, before it was locked."""
        try:
            for name in ("logs", "checkpoints", "tensorboard", "samples"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / "lease", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            return False
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path / "lease"), os.fstat(lock)):
                self.lock = lock
                return True
        os.close(lock)
        return False

    def remove(self) -> None:
        """Give it back, and the user's code where nothing else on this machine works on the run."""
        _drop(self.path)
        os.close(self.lock)


def _sweep() -> None:
    """Remove what killed processes left behind."""
    for lease in base().glob("runs/*/*/lease"):
        with contextlib.suppress(OSError):
            descriptor = os.open(lease, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.stat(lease), os.fstat(descriptor)):
                    _drop(lease.parent)
            finally:
                os.close(descriptor)
    for folder in base().glob("runs/*/*"):
        with contextlib.suppress(OSError):
            if not (folder / "lease").exists() and time.time() - folder.stat().st_mtime > BEGUN_S:
                _drop(folder)


def _drop(folder: Path) -> None:
    """Remove a folder, and the user's code when nothing else on this machine works on the run."""
    gone = folder.with_name(f"{folder.name}.gone-{os.getpid()}")
    with contextlib.suppress(OSError):
        folder.rename(gone)  # whoever makes it anew meanwhile makes another one
    shutil.rmtree(gone, ignore_errors=True)
    if not any(base().glob(f"runs/*/{folder.name}")):
        shutil.rmtree(code_folder(folder.name), ignore_errors=True)
    for parent in (folder.parent, base() / "runs", base() / "code"):
        with contextlib.suppress(OSError):
            parent.rmdir()
