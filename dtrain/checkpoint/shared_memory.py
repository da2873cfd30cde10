"""Names of a run's shared memory on a node, and giving it back. Needs no torch: the driver knows them too."""

import contextlib
import fcntl
import hashlib
import os
from pathlib import Path

FOLDER = Path("/dev/shm")  # noqa: S108 - shared memory is what it is


def prefix(run_path: Path, node: int) -> str:
    """Start of the names of all segments of a run on a node; unique to the run's folder and this user."""
    key = hashlib.sha256(str(run_path.resolve()).encode()).hexdigest()[:12]
    return str(FOLDER / f"dtrain-{os.getuid()}-{key}-n{node}")


def remove(run_path: Path, node: int) -> None:
    """Give a run's shared memory on this node back."""
    base = Path(prefix(run_path, node))
    for path in base.parent.glob(base.name + "-*"):
        with contextlib.suppress(OSError):
            path.unlink()


def sweep() -> list[str]:
    """Remove what runs without an owner left behind (agent, driver and zygote all killed). Returns the names."""
    removed = []
    for owner in FOLDER.glob(f"dtrain-{os.getuid()}-*-owner"):
        try:
            lease = Path(owner.read_text()) / "lease"
            descriptor = os.open(lease, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            descriptor = -1
        except OSError:
            continue
        try:
            if descriptor >= 0:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            continue
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        for path in owner.parent.glob(owner.name.removesuffix("-owner") + "-*"):
            with contextlib.suppress(OSError):
                path.unlink()
                removed.append(path.name)
    return removed


def claim(run_path: Path, node: int) -> None:
    """Leave word of whose the segments are, for `sweep`."""
    Path(prefix(run_path, node) + "-owner").write_text(str(run_path.resolve()))
