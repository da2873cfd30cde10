"""Files that were converted are converted once: found again by their state, and kept by the hash of their contents."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dtrain.data.prepared import fault, prepared, write_whole
from dtrain.errors import InputError


def keep(
    cache: Path,
    kind: str,
    settings: Any,
    paths: Sequence[str],
    contents: Callable[[], Any],
    convert: Callable[[Path], dict[str, Any]],
    watched: Sequence[str] = (),
) -> Path:
    """The folder that `convert` fills from the files `paths` (as for `prepared`), made when it is not there yet.

    It is named by `settings` and by what `contents` says of the files, which must not depend on the machine. `find`
    knows it afterwards by the states of `watched`, by default all of `paths`. Raises `InputError` for a file that
    cannot be read, and what `prepared` and `contents` raise.
    """
    # The states are taken before the contents are read: a file that changes meanwhile is then read again next time.
    notes = {_note(cache, kind, settings, chosen) for chosen in (paths, watched or paths)}
    known = _noted(cache, kind, _note(cache, kind, settings, paths))
    if known is None or fault(known) is not None:
        known = prepared(cache, f"{kind}-{digest(settings, contents())}", convert)
    for note in notes:
        write_whole(note, known.name)
    return known


def find(cache: Path, kind: str, settings: Any, watched: Sequence[str]) -> Path | None:
    """The folder that `keep` made when `watched` were as they are now; None when there is none that is whole."""
    known = _noted(cache, kind, _note(cache, kind, settings, watched))
    return None if known is None or fault(known, sizes_only=True) else known


def sha256(path: str | Path) -> str:
    """Of the contents of a file. Raises `InputError` when it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


def digest(*words: Any) -> str:
    """A short name for `words`, which JSON can hold."""
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode(errors="surrogateescape")).hexdigest()[:24]


def unreadable(path: str | Path, error: OSError) -> InputError:
    """The error to raise for a file of the user's that cannot be read."""
    return InputError(f"data.source: cannot read {path}: {error.strerror or error}; make it readable or leave it out")


def _note(cache: Path, kind: str, settings: Any, paths: Sequence[str]) -> Path:
    """Where `keep` writes which folder it made of files in the states they are in now."""
    states = []
    for path in paths:
        try:
            state = os.stat(path)
        except OSError as error:
            raise unreadable(path, error) from error
        states.append((path, state.st_ino, state.st_size, state.st_mtime_ns))
    return cache / f"{kind}-{digest(settings, states)}.seen"


def _noted(cache: Path, kind: str, note: Path) -> Path | None:
    try:
        name = note.read_text()
    except OSError:
        return None
    return cache / name if name.startswith(f"{kind}-") else None
