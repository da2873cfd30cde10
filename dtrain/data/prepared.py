"""Folders of converted data: made once, checked before every use, shared by processes.

A folder is made under another name and renamed when complete, under a lock that the system releases if its holder
dies. `meta.json` names every other file with its size and sha256; a folder that does not agree with it is made anew.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtrain.errors import StorageError

META = "meta.json"


def prepared(cache: Path, name: str, make: Callable[[Path], dict[str, Any]]) -> Path:
    """The folder `cache/name`, whole; `make(folder)` fills it and returns what `meta.json` shall say besides.

    Raises `StorageError` when it cannot be written, and what `make` raises.
    """
    target = cache / name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (problem := fault(target)) is None:
                return target
            if target.exists():
                logging.getLogger(__name__).warning("%s is damaged (%s); it is made anew", target, problem)
                shutil.rmtree(target)
            making = cache / f"{name}.making"
            shutil.rmtree(making, ignore_errors=True)  # whoever left one there is dead: the lock is ours
            making.mkdir()
            try:
                meta = make(making)
                files = {path.name: _signature(path) for path in sorted(making.iterdir())}
                (making / META).write_text(json.dumps({**meta, "files": files}, indent=1))
                making.rename(target)
            except BaseException:
                shutil.rmtree(making, ignore_errors=True)
                raise
    except OSError as error:
        raise StorageError(
            f"cannot keep prepared data under {cache}: {error.strerror or error};"
            " free space, or set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return target


def fault(folder: Path, sizes_only: bool = False) -> str | None:
    """What is wrong with a prepared folder; None when every file is as `meta.json` says."""
    try:
        for name, expected in read_meta(folder)["files"].items():
            path = folder / name
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['size']}"
            if not sizes_only and _signature(path) != expected:
                return f"{name} has other contents than were written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{META} or a file it names cannot be read: {error}"
    return None


def read_meta(folder: Path) -> dict[str, Any]:
    """What `meta.json` of a prepared folder says."""
    meta: dict[str, Any] = json.loads((folder / META).read_text())
    return meta


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that readers see all of it or nothing."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def _signature(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
