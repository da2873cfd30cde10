"""A tree of files as one archive, named by what it holds: the same tree gives the same name, and the same bytes.

Times, owners and the order of the folder leave no trace, and of the modes only whether a file can be executed. What is
unpacked is compared with its name before anything is written.
"""

import gzip
import hashlib
import io
import os
import posixpath
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dtrain.errors import StorageError

Kind = Literal["file", "program", "link"]
MODES: dict[Kind, int] = {"file": 0o644, "program": 0o755, "link": 0o777}
UNPACKED_LIMIT = 2**30
"""Bytes. An archive that claims more is not one of ours."""


@dataclass(frozen=True)
class Item:
    """A file, or a link."""

    name: str
    """Relative, with `/` between parts."""
    kind: Kind
    data: bytes
    """Contents of a file, target of a link."""


def read(root: Path, files: Iterable[str], links: Iterable[tuple[str, str]]) -> list[Item]:
    """What is there now. Raises `OSError`."""
    items = [Item(name, "link", os.fsencode(target)) for name, target in links]
    for name in files:
        path = root / name
        items.append(Item(name, "program" if path.stat().st_mode & 0o100 else "file", path.read_bytes()))
    return items


def digest(items: Iterable[Item]) -> str:
    """SHA-256 of what a tree holds: names, kinds and contents."""
    found = hashlib.sha256(b"dtrain bundle 1\n")
    for item in _in_order(items):
        name = os.fsencode(item.name)
        found.update(f"{item.kind} {len(name)} {len(item.data)}\n".encode())
        found.update(name)
        found.update(item.data)
    return found.hexdigest()


def pack(items: Iterable[Item]) -> bytes:
    """As a .tar.gz."""
    out = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=out, compresslevel=6, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for item in _in_order(items):
            entry = tarfile.TarInfo(item.name)
            entry.mode = MODES[item.kind]
            if item.kind == "link":
                entry.type, entry.linkname = tarfile.SYMTYPE, os.fsdecode(item.data)
            else:
                entry.size = len(item.data)
            archive.addfile(entry, io.BytesIO(item.data) if item.kind != "link" else None)
    return out.getvalue()


def open_verified(packed: bytes, expected: str, where: str) -> list[Item]:
    """What an archive holds. Raises `StorageError` unless that is what the digest `expected` was made of."""
    broken = f"{where} is not what was submitted; delete it and submit again, which writes it anew"
    try:
        items = _items(packed)
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise StorageError(f"{broken} ({error})") from None
    if digest(items) != expected:
        raise StorageError(f"{broken} (its contents have another SHA-256)")
    if unsafe := _unsafe(items):
        raise StorageError(f"{where} holds {unsafe}, which leads out of its folder; it is not unpacked")
    return items


def write(items: Sequence[Item], target: Path) -> None:
    """Put a tree there, whole or not at all; one that is there already, from another process, is as good."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        return
    making = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for item in items:
            path = making / item.name
            path.parent.mkdir(parents=True, exist_ok=True)
            if item.kind == "link":
                path.symlink_to(os.fsdecode(item.data))
            else:
                path.write_bytes(item.data)
                path.chmod(MODES[item.kind])
        making.chmod(0o755)
        making.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _in_order(items: Iterable[Item]) -> list[Item]:
    return sorted(items, key=lambda item: os.fsencode(item.name))


def _items(packed: bytes) -> list[Item]:
    items, total = [], 0
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive:
        for entry in archive:
            total += entry.size
            if total > UNPACKED_LIMIT:
                raise ValueError(f"it unpacks to more than {UNPACKED_LIMIT:,} bytes")
            if entry.issym():
                items.append(Item(entry.name, "link", os.fsencode(entry.linkname)))
            elif entry.isreg():
                contents = archive.extractfile(entry)
                assert contents is not None
                items.append(Item(entry.name, "program" if entry.mode & 0o100 else "file", contents.read()))
            else:
                raise ValueError(f"{entry.name} is neither a file nor a link")
    return items


def _unsafe(items: Sequence[Item]) -> str:
    """The first name or link that would write, or lead, out of the folder; empty when there is none."""
    names = {item.name for item in items}
    links = {item.name for item in items if item.kind == "link"}
    if len(names) < len(items):
        return "a name twice"
    for item in items:
        if not _is_below(item.name) or names & set(_parents(item.name)):
            return repr(item.name)
        if item.kind == "link":
            text, folder = os.fsdecode(item.data), posixpath.dirname(item.name)
            target = posixpath.normpath(posixpath.join(folder, text))
            # A plain way to the target: one through another link may end elsewhere than it reads.
            is_plain = text == posixpath.relpath(target, folder or ".")
            if not is_plain or not (target == "." or _is_below(target)) or links & {target, *_parents(target)}:
                return f"{item.name!r} -> {text!r}"
    return ""


def _is_below(name: str) -> bool:
    return (
        not name.startswith("/")
        and "\0" not in name
        and ".." not in name.split("/")
        and posixpath.normpath(name) == name
    )


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]
