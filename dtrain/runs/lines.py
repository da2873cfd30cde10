"""Files of JSON objects, one a line: appended to by many, read while they grow, torn by nobody's death."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_lines(path: Path, offset: int = 0) -> list[dict[str, Any]]:
    """The JSON objects of a .jsonl file from byte `offset`; a torn last line (a writer killed in it) is left out."""
    return [value for _, value in iterate_lines(path, offset)]


def iterate_lines(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte offset behind the line, object) for each whole line from `offset`; torn lines are passed over."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    yield offset, value


def last_lines(path: Path, max_bytes: int = 1 << 16) -> list[dict[str, Any]]:
    """The JSON objects in the last `max_bytes` of a .jsonl file, however long it is."""
    try:
        size = path.stat().st_size
    except OSError:
        return []
    return read_lines(path, max(0, size - max_bytes))


def as_line(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, default=str) + "\n").encode()


def append(path: Path, value: dict[str, Any]) -> None:
    """Add one line; a full disk loses it, and says nothing."""
    line = as_line(value)
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line  # a full disk or a kill tore the line before: it must not take this one with it
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
