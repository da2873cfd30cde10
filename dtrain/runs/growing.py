"""Files that grow, as objects, which cannot: a file is kept in pieces of one size, and only its last is put again.

The first piece has the file's own name (`metrics.jsonl`), those after it a number behind it (`metrics.jsonl.000001`):
a file smaller than a piece is one object that any tool reads, and of a large one little is sent at a time.
"""

import re
from collections.abc import Callable
from pathlib import Path

from dtrain.storage import Conflict, NotThere, Storage

PIECE_BYTES = 1 << 20
NUMBERED = re.compile(r"(.+\.(?:log|jsonl))\.(\d{6})$")


def grows(name: str) -> bool:
    return name.endswith((".log", ".jsonl"))


def piece(name: str, index: int) -> str:
    """The object that holds a piece of a file."""
    return f"{name}.{index:06d}" if index else name


def file_of(name: str) -> tuple[str, int]:
    """The file that an object belongs to, and which piece of it this is."""
    match = NUMBERED.match(name)
    return (match[1], int(match[2])) if match else (name, 0)


class Growing:
    """One such file: a copy on this machine, and what of it is on storage."""

    def __init__(self, storage: Storage, name: str, path: Path) -> None:
        self._storage, self._name, self._path = storage, name, path
        self._versions: list[str] = []
        self._length = 0
        """Bytes known to be on storage."""

    def pull(self) -> None:
        """Bring the copy up to date."""
        index = max(0, len(self._versions) - 1)
        while True:
            known = self._versions[index] if index < len(self._versions) else None
            try:
                found = self._storage.read_if_changed(piece(self._name, index), known)
            except NotThere:
                return
            if found is not None:
                data, version = found
                self._versions[index:] = [version]
                self._length = index * PIECE_BYTES + len(data)
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with open(self._path, "r+b" if self._path.exists() else "wb") as file:
                    file.seek(index * PIECE_BYTES)
                    file.write(data)
                    file.truncate()
            if self._length < (index + 1) * PIECE_BYTES:
                return
            index += 1

    def push(self, is_mine: Callable[[], bool]) -> None:
        """Put on storage what the copy has gained.

        Raises `Conflict` when somebody else has written meanwhile and the file is not ours any more.
        """
        size = self._path.stat().st_size if self._path.exists() else 0
        while self._length < size:
            index = self._length // PIECE_BYTES
            with open(self._path, "rb") as file:
                file.seek(index * PIECE_BYTES)
                data = file.read(min(PIECE_BYTES, size - index * PIECE_BYTES))
            known = self._versions[index] if index < len(self._versions) else None
            self._versions[index:] = [put_ours(self._storage, piece(self._name, index), data, known, is_mine)]
            self._length = index * PIECE_BYTES + len(data)


def put_ours(storage: Storage, name: str, data: bytes, known: str | None, is_mine: Callable[[], bool]) -> str:
    """Put an object that we last saw, or wrote, in version `known` (None: not at all); returns its new version.

    What somebody whom we replaced has slipped in between is overwritten. Raises `Conflict` when it is we who were
    replaced: then `is_mine()` says so.
    """
    while True:
        try:
            return storage.write(name, data, if_absent=known is None, if_version=known)
        except Conflict:
            if not is_mine():
                raise
            try:
                known = storage.read(name)[1]
            except NotThere:
                known = None
