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


def is_going() -> bool:
    """Whether this node was told that it goes away (`python -m dtrain.runtime.preempted`)."""
    return (base() / GOING).exists()


class OwnFolder:
    """Made, and locked as long as this process or one that inherits `lock` lives."""

    def __init__(self, run_id: str, token: int, who: str) -> None:
        _sweep()
        self.path = base() / "runs" / f"{token}-{who}" / run_id
        make_base()
        for name in ("logs", "checkpoints", "tensorboard", "samples"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        self.lock = os.open(self.path / "lease", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self.lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Give it back, and the user's code where nothing else on this machine works on the run."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)
        _prune(self.path)


def _sweep() -> None:
    """Remove what killed processes left behind."""
    for lease in base().glob("runs/*/*/lease"):
        with contextlib.suppress(OSError):
            descriptor = os.open(lease, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lease.parent, ignore_errors=True)
                _prune(lease.parent)
            finally:
                os.close(descriptor)
    for folder in base().glob("runs/*/*"):
        with contextlib.suppress(OSError):
            if not (folder / "lease").exists() and time.time() - folder.stat().st_mtime > BEGUN_S:
                shutil.rmtree(folder, ignore_errors=True)
                _prune(folder)


def _prune(folder: Path) -> None:
    if not any(base().glob(f"runs/*/{folder.name}")):
        shutil.rmtree(code_folder(folder.name), ignore_errors=True)
    for parent in (folder.parent, base() / "runs", base() / "code"):
        with contextlib.suppress(OSError):
            parent.rmdir()
