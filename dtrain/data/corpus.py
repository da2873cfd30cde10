"""Which text a corpus has, and which of it is held out.

Files are found, equal ones counted once, and held out by groups, so that nothing stands on both sides: a group is a
folder or file at the top of the corpus (for the standard library a module or package), and groups that share much of
their text are one. Files are read one at a time.
"""

import hashlib
import os
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dtrain.errors import InputError

PYTHON_STDLIB = "python-stdlib"
# Tests are not what one reads a library for, and `encodings` holds tables of characters that were generated.
_NOT_STDLIB = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
_SAMPLED_BYTES = 64 * 2**20
_LINE = 24
_COMMON = 4
_SHARED_RARE, _SHARED_ANY = 0.3, 0.6


@dataclass(frozen=True)
class File:
    """One file of a corpus: where it is, and its name within the corpus, which does not depend on the machine."""

    path: str
    name: str
    size: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class Piece:
    """The bytes `start` to `stop` of a file."""

    file: File
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def blocks(self, size: int = 2**20) -> Iterator[bytes]:
        """Its bytes, in blocks of about `size` that end with a line where there are lines."""
        left, rest = self.size, b""
        try:
            with open(self.file.path, "rb") as stream:
                stream.seek(self.start)
                while left:
                    read = stream.read(min(size, left))
                    if not read:
                        raise InputError(f"{self.file.path} became shorter while it was read; start again")
                    left -= len(read)
                    rest += read
                    cut = rest.rfind(b"\n") + 1 or len(rest)
                    if left:
                        yield rest[:cut]
                        rest = rest[cut:]
        except OSError as error:
            _unreadable(self.file.path, error)
        if rest:
            yield rest


@dataclass(frozen=True)
class Split:
    """What is learnt from and what is held out; `by` says what was kept together: folder, file or passage."""

    train: tuple[Piece, ...]
    held_out: tuple[Piece, ...]
    by: str


def find(source: str | Sequence[str]) -> list[File]:
    """The files behind `source`, sorted by name; sizes and hashes are not filled in yet.

    `source` is `python-stdlib`, or files, folders and globs. Raises `InputError` when there is none, or one that
    cannot be read. Under folders and globs, hidden files and binary ones are left out.
    """
    if source == PYTHON_STDLIB:
        root = sysconfig.get_path("stdlib")
        found = [File(p, os.path.relpath(p, root)) for p in _walk(root, _NOT_STDLIB) if p.endswith(".py")]
        if not found:
            raise InputError(
                f"data.source: this Python keeps no sources of its standard library under {root};"
                " name files of your own in data.source"
            )
        return sorted(found, key=lambda file: file.name)
    paths: set[str] = set()
    for pattern in [source] if isinstance(source, str) else source:
        paths.update(_expand(pattern))
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return sorted((File(p, os.path.relpath(p, root)) for p in paths), key=lambda file: file.name)


def read(files: Iterable[File]) -> list[File]:
    """The same files with size and sha256 of their contents; empty ones and repetitions of another are left out."""
    seen: dict[str, File] = {}
    for file in files:
        digest = hashlib.sha256()
        size = 0
        try:
            with open(file.path, "rb") as stream:
                while block := stream.read(2**20):
                    digest.update(block)
                    size += len(block)
        except OSError as error:
            _unreadable(file.path, error)
        if size:
            seen.setdefault(digest.hexdigest(), File(file.path, file.name, size, digest.hexdigest()))
    return sorted(seen.values(), key=lambda file: file.name)


def split(files: Sequence[File], fraction: float, limit: int) -> Split:
    """Hold out about `fraction` of the bytes, at most `limit`, by the largest kind of group that can fill half of it.

    A function of the files' names and contents. A corpus of too few files has the end of its largest one held out.
    Raises `InputError` when nothing could be held out.
    """
    total = sum(file.size for file in files)
    target = min(int(total * fraction), limit)
    for by, name_of in (("folder", _top), ("file", lambda file: file.name)):
        groups = _join(files, {file: name_of(file) for file in files})
        chosen, held = set(), 0
        for name in sorted(groups, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest()):
            size = sum(file.size for file in groups[name])
            if held + size <= target:
                chosen.add(name)
                held += size
        if held and held * 2 >= target:
            out = {file for name in chosen for file in groups[name]}
            return Split(
                tuple(Piece(file, 0, file.size) for file in files if file not in out),
                tuple(Piece(file, 0, file.size) for file in files if file in out),
                by,
            )
    largest = max(files, key=lambda file: (file.size, file.name))
    cut = largest.size - target
    before = Piece(largest, 0, cut)
    for line in before.blocks():  # up to the last line that ends before the cut
        last = line
    end = last.rfind(b"\n") + 1 if target and cut else 0
    cut -= len(last) - end if end else 0
    if not 0 < cut < largest.size:
        raise InputError(
            f"data.held_out {fraction} of a corpus of {total} bytes holds nothing out; give more text or a larger share"
        )
    train = [Piece(file, 0, cut if file is largest else file.size) for file in files]
    return Split(tuple(train), (Piece(largest, cut, largest.size),), "passage")


def _walk(root: str, without: set[str] = frozenset()) -> Iterator[str]:  # type: ignore[assignment]
    for folder, folders, names in os.walk(root, onerror=lambda error: _unreadable(str(error.filename), error)):
        folders[:] = sorted(f for f in folders if f not in without and not f.startswith("."))
        yield from (os.path.join(folder, name) for name in names if not name.startswith("."))


def _expand(pattern: str) -> Iterator[str]:
    import glob

    path = os.path.abspath(os.path.expanduser(pattern))
    if os.path.isfile(path):
        yield path
        return
    if os.path.isdir(path):
        found = [p for p in _walk(path) if not _is_binary(p)]
    elif glob.has_magic(path):
        found = [p for p in glob.glob(path, recursive=True) if os.path.isfile(p) and not _is_binary(p)]
    else:
        raise InputError(f"data.source: there is no file, folder or match for {pattern!r} (looked at {path})")
    if not found:
        raise InputError(f"data.source: {pattern!r} holds no text file (looked in {path})")
    yield from found


def _is_binary(path: str) -> bool:
    try:
        with open(path, "rb") as stream:
            return b"\0" in stream.read(8192)  # git's rule
    except OSError as error:
        _unreadable(path, error)


def _unreadable(path: str, error: OSError) -> NoReturn:
    raise InputError(
        f"data.source: cannot read {path}: {error.strerror or error}; make it readable or leave it out"
    ) from error


def _top(file: File) -> str:
    return Path(file.name).parts[0]


def _join(files: Sequence[File], group_of: dict[File, str]) -> dict[str, list[File]]:
    """Files by group, where groups of which a file shares much of its text with another's are one.

    Counted are lines of some length: a smaller share is enough of those that few groups have (a licence at the head
    of many files says little), a larger one of all of them, against the first group that has each. Of a large corpus
    every n-th line by hash is looked at, so that memory stays bounded.
    """
    every = sum(file.size for file in files) // _SAMPLED_BYTES + 1
    lines_of: dict[File, Counter[int]] = {}
    homes: dict[int, list[str]] = defaultdict(list)
    for file in files:
        weights: Counter[int] = Counter()
        for block in Piece(file, 0, file.size).blocks():
            for line in block.split(b"\n"):
                line = line.strip()
                if len(line) >= _LINE:
                    digest = int.from_bytes(hashlib.blake2b(line, digest_size=8).digest())
                    if digest % every == 0:
                        weights[digest] += len(line)
                        if group_of[file] not in homes[digest] and len(homes[digest]) <= _COMMON:
                            homes[digest].append(group_of[file])
        lines_of[file] = weights
    parent = {name: name for name in group_of.values()}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for file in files:
        rare: Counter[str] = Counter()
        first: Counter[str] = Counter()
        num_rare = 0
        for digest, weight in lines_of[file].items():
            first[homes[digest][0]] += weight
            if len(homes[digest]) <= _COMMON:
                num_rare += weight
                for name in homes[digest]:
                    rare[name] += weight
        like = {name for name, weight in rare.items() if weight > _SHARED_RARE * num_rare}
        like |= {name for name, weight in first.items() if weight > _SHARED_ANY * lines_of[file].total()}
        for name in like - {group_of[file]}:
            one, other = sorted((root(name), root(group_of[file])))
            parent[other] = one
    groups: dict[str, list[File]] = defaultdict(list)
    for file in files:
        groups[root(group_of[file])].append(file)
    return groups
