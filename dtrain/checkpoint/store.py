"""Checkpoints on storage: written whole or not at all, and trusted only after every byte was checked.

On several nodes with a sharded state each writes a part, `.step-.../`; the first moves them together and commits.

step-00000100/
  .metadata, *.distcp   torch's distributed checkpoint (DCP): any torch tool reads it
  manifest.json         step, metrics, size and SHA-256 of every file
  COMMITTED             SHA-256 of the manifest; written last: without it the checkpoint does not exist
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import CheckpointException

from dtrain.checkpoint import dcp_files
from dtrain.checkpoint.pieces import State, as_pieces
from dtrain.checkpoint.retention import Candidate, surplus
from dtrain.errors import StorageError
from dtrain.spec.job import Keep

MARKER, MANIFEST = "COMMITTED", "manifest.json"
NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})$")
PART = re.compile(r"\.step-(\d{8}|[1-9]\d{8,})-\d+-\d+$")
BLOCK = 1 << 20


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """Steps of all checkpoints that are committed, ascending; their bytes are not checked."""
    return [step for step in _all_steps(folder) if (path_of(folder, step) / MARKER).is_file()]


def write(folder: Path, step: int, state: State, facts: Mapping[str, Any], parts: Sequence[Path] = ()) -> int:
    """Write and commit one checkpoint; returns its size in bytes.

    `state` is read in place. `parts` are what other nodes have written (`write_part`); they become part of it.
    Raises `StorageError` when storage refuses or the state is not all there; what was begun is then removed, and no
    other checkpoint is touched.
    """
    path = path_of(folder, step)
    try:
        sums = _save(path, state)  # replaces one of the same step that was never committed, or of an abandoned line
        sums |= dcp_files.join(path, [(part, json.loads((part / MARKER).read_bytes())) for part in parts])
        sizes = {p.name: p.stat().st_size for p in sorted(path.iterdir())}
        files = {name: {"bytes": n, "sha256": sums.get(name) or _sha256(path / name)} for name, n in sizes.items()}
        manifest = json.dumps({"step": step, "files": files, **facts}, indent=2).encode()
        _write_durably(path / MANIFEST, manifest)
        _sync_folder(path)
        _mark(path, hashlib.sha256(manifest).hexdigest().encode())
        _sync_folder(path)
        _sync_folder(folder)
    except (Exception, CheckpointException) as error:  # DCP's own is no `Exception`
        raise _given_up(path, error) from error
    return sum(sizes.values())


def part_of(folder: Path, step: int, node: int, attempt: int) -> Path:
    """Where a node writes its part of a checkpoint."""
    return folder / f".step-{step:08d}-{attempt}-{node}"


def write_part(path: Path, state: State) -> int:
    """Write what one node holds of a checkpoint that another commits; returns its size in bytes.

    Raises `StorageError` when storage refuses; what was begun is then removed.
    """
    try:
        sums = _save(path, state)
        _mark(path, json.dumps(sums).encode())
        _sync_folder(path)
    except (Exception, CheckpointException) as error:
        raise _given_up(path, error) from error
    return sum(p.stat().st_size for p in path.iterdir())


def await_parts(paths: Sequence[Path], timeout_s: float) -> None:
    """Wait until other nodes have written their parts. Raises `StorageError` when one does not come."""
    deadline = time.monotonic() + timeout_s
    for path in paths:
        while not (path / MARKER).exists():
            if time.monotonic() > deadline:
                raise StorageError(f"{path}: another node did not write its part within {timeout_s:.0f} s")
            time.sleep(0.01)


def _save(path: Path, state: State) -> dcp_files.Sums:
    if path.exists():
        _remove(path)
    path.mkdir(parents=True)
    return dcp_files.save(path, as_pieces(state))


def _given_up(path: Path, error: BaseException) -> StorageError:
    with contextlib.suppress(OSError):
        _remove(path)
    cause = _root(error)
    if isinstance(cause, StorageError):
        return cause
    if isinstance(cause, OSError):
        return StorageError(f"{path}: {cause.strerror or cause}")
    return StorageError(f"{path}: {type(cause).__name__}: {cause}")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint. Raises `StorageError` when it is not committed or not whole."""
    try:
        marker = (path / MARKER).read_bytes()
    except FileNotFoundError:
        raise StorageError(f"{path.name}: no {MARKER} marker: it was never finished") from None
    except OSError as error:
        raise StorageError(f"{path.name}: {MARKER} cannot be read ({error.strerror})") from None
    try:
        manifest = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise StorageError(f"{path.name}: {MANIFEST} cannot be read ({error.strerror})") from None
    if hashlib.sha256(manifest).hexdigest().encode() != marker:
        raise StorageError(f"{path.name}: {MANIFEST} is not the one that was committed")
    return dict(json.loads(manifest))


def verify(path: Path) -> dict[str, Any]:
    """Check every byte of a checkpoint and return its manifest. Raises `StorageError` naming what is wrong."""
    manifest = read_manifest(path)
    for name, facts in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise StorageError(f"{path.name}: {name} is missing")
        size = file.stat().st_size
        if size != facts["bytes"]:
            raise StorageError(f"{path.name}: {name} has {size} bytes instead of {facts['bytes']}")
        if _sha256(file) != facts["sha256"]:
            raise StorageError(f"{path.name}: {name} has changed since it was written (SHA-256 differs)")
    return manifest


def newest_valid(folder: Path, rejected: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose every byte is as it was written, with its manifest; None when there is none.

    `rejected` is told, in a sentence, of each newer one that is passed over and why.
    """
    for step in reversed(_all_steps(folder)):
        path = path_of(folder, step)
        try:
            return path, verify(path)
        except StorageError as error:
            rejected(f"checkpoint {error.message}; going back to the one before")
        except OSError as error:
            rejected(f"checkpoint {path.name}: {error.strerror}; going back to the one before")
    return None


def read_into(path: Path, state: State) -> None:
    """Load a checkpoint into live tensors, in place, whoever wrote which piece of it.

    Raises `StorageError` when it does not fit them.
    """
    try:
        dcp_files.load(path, as_pieces(state))
    except (Exception, CheckpointException) as error:
        cause = _root(error)
        raise StorageError(f"{path.name} cannot be loaded: {type(cause).__name__}: {cause}") from error


def prune(folder: Path, keep: Keep) -> list[int]:
    """Delete what the retention rule lets go, and what was begun before the newest one and never finished.

    Returns the steps of the committed ones deleted. Called by the run's one writer. Raises `StorageError`, once all
    have been tried, when one could not be deleted.
    """
    candidates, committed = [], steps(folder)
    for step in committed:
        with contextlib.suppress(StorageError):
            metrics = read_manifest(path_of(folder, step)).get("metrics") or {}
            candidates.append(Candidate(step, metrics.get("loss")))
    gone = surplus(candidates, keep)
    newest = max((c.step for c in candidates), default=0)
    unfinished = [step for step in _all_steps(folder) if step < newest and step not in committed]
    refused = ""
    for step in [*gone, *unfinished]:
        try:
            _remove(path_of(folder, step))
        except OSError as error:
            refused = f"{error.filename or path_of(folder, step)}: {error.strerror or error}"
    for part in folder.glob(".step-*"):  # of a checkpoint that was never committed
        match = PART.match(part.name)
        if match and int(match[1]) < newest:
            shutil.rmtree(part, ignore_errors=True)
    if refused:
        raise StorageError(refused)
    return gone


def _all_steps(folder: Path) -> list[int]:
    """Steps of all checkpoints, finished or not, ascending."""
    if not folder.is_dir():
        return []
    found = ((NAME.match(p.name), p) for p in folder.iterdir())
    return sorted(int(match[1]) for match, p in found if match and p.is_dir())


def _remove(path: Path) -> None:
    # The marker goes first: a crash in between leaves a checkpoint that does not exist, not one with holes.
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _mark(path: Path, said: bytes) -> None:
    """Put the marker, which is read as soon as it is seen: it is there whole, or not at all."""
    making = path / f"{MARKER}.making"
    _write_durably(making, said)
    making.rename(path / MARKER)


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _root(error: BaseException) -> BaseException:
    """What storage said, inside DCP's wrapper and whatever else was raised on the way; else the wrapped error."""
    failures = getattr(error, "failures", None)
    if failures:
        return _root(next(iter(failures.values()))[0])
    nested: BaseException | None = error
    while nested is not None and not isinstance(nested, OSError | StorageError):
        nested = nested.__cause__ or nested.__context__
    return nested or error
