"""What the processes of a run printed, byte for byte; with several logs, each line says whose it is."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dtrain.errors import InputError
from dtrain.runs import Run

POLL_S = 0.2
BLOCK = 1 << 16


def show(run: Run, pattern: str, out: BinaryIO, *, follows: bool, num_lines: int | None = None) -> None:
    """Write the logs whose names match; go on until the run has ended when following.

    Raises `InputError` when there is no such log, unless it may still come.
    """
    tails: dict[Path, _Tail] = {}
    # Decided once: a log that appears later must not change how the lines of the others look.
    run.refresh("logs/")
    several = "*" in pattern and (run.stored_record().num_workers > 1 or len(list(run.logs.glob(pattern))) > 1)
    while True:
        ended = run.record.ended  # before reading: what was written until then is shown
        if follows:
            run.refresh("logs/")
        for path in sorted(run.logs.glob(pattern), key=_by_number):
            if path not in tails:
                tails[path] = _Tail(path, num_lines)
            label = f"{path.stem.replace('-', ' ')} | ".encode() if several else b""
            out.writelines(label + line for line in tails[path].lines(whole=not follows or ended))
        out.flush()
        if not follows or ended:
            break
        time.sleep(max(POLL_S, run.poll_s))
    if not tails:
        there = ", ".join(p.name for p in sorted(run.logs.glob("*.log"), key=_by_number)) or "none yet"
        raise InputError(f"run {run.id} has no log {pattern}; there is: {there}")


class _Tail:
    """One log, read from where the last look ended."""

    def __init__(self, path: Path, num_lines: int | None) -> None:
        self._path = path
        self._offset = 0 if num_lines is None else _start_of_last(path, num_lines)

    def lines(self, whole: bool) -> Iterator[bytes]:
        """Lines that are new, each ending in a newline; an unfinished last one only when `whole`."""
        try:
            file = self._path.open("rb")
        except OSError:
            return
        with file:
            file.seek(self._offset)
            for line in file:
                if line.endswith(b"\n"):
                    self._offset += len(line)
                    yield line
                elif whole:
                    self._offset += len(line)
                    yield line + b"\n"


def _start_of_last(path: Path, num_lines: int) -> int:
    """Offset at which the last `num_lines` lines begin, read backwards."""
    with path.open("rb") as file:
        position = size = file.seek(0, 2)
        if num_lines == 0:
            return size
        newlines = 0
        while position > 0:
            step = min(BLOCK, position)
            position -= step
            file.seek(position)
            block = file.read(step)
            at = len(block)
            while (at := block.rfind(b"\n", 0, at)) >= 0:
                newlines += position + at != size - 1  # the newline at the very end begins no line
                if newlines == num_lines:
                    return position + at + 1
    return 0


def _by_number(path: Path) -> tuple[str, int]:
    name, _, number = path.stem.rpartition("-")
    return (name, int(number)) if number.isdigit() else (path.stem, -1)
