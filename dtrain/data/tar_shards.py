"""Where the samples of tar shards lie: their members are found once, so that any of them is then one range to read.

Shards are in WebDataset's layout: the members of a sample follow each other and have the same name up to the first dot,
`0001.jpg` and `0001.cls`. They may lie wherever fsspec reads.
"""

import itertools
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.data.kept import digest
from dtrain.data.prepared import prepared, read_meta
from dtrain.errors import InputError

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
"""Raise when the same shards would be listed differently."""
_READERS = 8
_AHEAD = 2**20
"""Bytes read at a time while looking for members: fewer requests than one for each."""
_STATE = ("size", "mtime", "LastModified", "last_modified", "ETag", "etag", "md5Hash", "generation", "created")
"""What filesystems tell that changes with the contents of a file."""
_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
_WORDS = re.compile(r"\{([^{}]*,[^{}]*)\}")
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")


@dataclass(frozen=True)
class Shard:
    """A tar file: where it is, and what tells that it is as it was."""

    url: str
    state: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Sample:
    """Members of one sample by what follows the first dot in their names."""

    key: str
    members: dict[str, tarfile.TarInfo]


def expand(pattern: str) -> list[str]:
    """The names that `{000..099}` and `{a,b}` in `pattern` stand for."""
    found = _NUMBERS.search(pattern) or _WORDS.search(pattern)
    if found is None:
        return [pattern]
    if found.re is _NUMBERS:
        first, last = found.groups()
        width = len(first) if first.startswith("0") else 1
        words = [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    else:
        words = found[1].split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return list(itertools.chain.from_iterable(expand(before + word + after) for word in words))


def filesystem(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """What reads `url`, and its path there. Raises `InputError` when that is not installed."""
    import fsspec

    try:
        made, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError, TypeError) as error:
        raise InputError(
            f"data.source: cannot read {url} ({error}); install what fsspec needs for it, or correct the"
            " address or data.storage_options"
        ) from error
    return made, path


def find(patterns: Sequence[str], options: dict[str, Any]) -> list[Shard]:
    """The shards behind paths, globs and addresses, in order. Raises `InputError` when one is not there."""
    found: dict[str, Shard] = {}
    for pattern in patterns:
        reader, path = filesystem(pattern, options)
        names = expand(path)
        if len(names) == 1 and any(sign in path for sign in "*?["):
            details = _asked(pattern, reader.glob, path, detail=True)
            if not details:
                raise InputError(f"data.source: nothing matches {pattern!r}; correct it")
            infos = {name: details[name] for name in sorted(details)}
        else:
            infos = _infos(reader, names, pattern)
        for name, info in infos.items():
            url = reader.unstrip_protocol(name)
            if not name.endswith(".tar"):
                raise InputError(
                    f"data.source: {url} is no .tar; packed shards cannot be read from the middle: unpack them to .tar"
                )
            found[url] = Shard(url, tuple(str(info.get(key, "")) for key in _STATE))
    return list(found.values())


def listed(
    shard: Shard,
    options: dict[str, Any],
    cache: Path,
    settings: Any,
    chosen: Callable[[Shard, Any, Sample], list[int]],
) -> Path:
    """The folder in `cache` with `rows.npy`, int64 [n, 2 + ...], and the `names` of the members, found now or before.

    `chosen` gives for each sample the number in bytes of the member to read, where it lies, and more, as integers.
    `settings` are what its answers depend on. Raises `InputError` for a shard that is not whole.
    """
    name = f"tar-{digest(FORMAT, shard.url, shard.state, settings)}"
    return prepared(cache, name, partial(_list, shard, options, chosen))


def list_all(
    shards: Sequence[Shard],
    options: dict[str, Any],
    cache: Path,
    settings: Any,
    chosen: Callable[[Shard, Any, Sample], list[int]],
) -> list[Path]:
    """`listed` for each of `shards`, several at a time."""
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            return list(pool.map(lambda shard: listed(shard, options, cache, settings, chosen), shards))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def rows_of(folder: Path) -> "np.ndarray":
    """What `listed` put down in `folder`."""
    import numpy as np

    rows: np.ndarray = np.load(folder / "rows.npy")
    return rows


def names_of(folder: Path) -> list[str]:
    """The name of the member that is read of each sample."""
    names: list[str] = json.loads((folder / "names.json").read_text("utf-8"))
    return names


def digest_of(folder: Path) -> str:
    """Of what was put down in `folder`: the same wherever the shard lies."""
    files = read_meta(folder)["files"]
    return str(files["rows.npy"]["sha256"] + files["names.json"]["sha256"])


def samples(shard: Shard, stream: Any, size: int) -> Iterator[Sample]:
    """The samples of a shard, read through the file `stream` of `size` bytes.

    The stream may be read elsewhere meanwhile. Raises `InputError` where the shard is damaged or cut off: `tarfile`
    would take that for its end.
    """
    last = "its beginning"
    key, members = "", dict[str, tarfile.TarInfo]()
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else all of them are kept
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("it is cut off there")
                last = f"member {member.name}"
                named = _NAME.fullmatch(member.name.removeprefix("./"))
                if not member.isfile() or named is None or named[1].startswith("__"):
                    continue
                if named[1] != key and members:
                    yield Sample(key, members)
                    members = {}
                key, suffix = named[1], named[2].lower()
                if suffix in members:
                    raise tarfile.ReadError(f"it has two members {member.name}")
                members[suffix] = member
            stream.seek(tar.offset)  # type: ignore[attr-defined]
            if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError("what follows is no tar header")
    except (tarfile.TarError, EOFError) as error:
        raise InputError(
            f"data.source: the shard {shard.url} is damaged after {last}: {error}; copy it again or leave it out"
        ) from error
    if members:
        yield Sample(key, members)


def _list(
    shard: Shard, options: dict[str, Any], chosen: Callable[[Shard, Any, Sample], list[int]], folder: Path
) -> dict[str, Any]:
    import numpy as np

    rows, names = [], []
    reader, path = filesystem(shard.url, options)
    with _asked(shard.url, reader.open, path, "rb", block_size=_AHEAD) as stream:
        size = int(reader.info(path)["size"])
        for sample in samples(shard, stream, size):
            rows.append(chosen(shard, stream, sample))
            names.append(sample.key)
    if not rows:
        raise InputError(f"data.source: the shard {shard.url} holds no sample; leave it out")
    np.save(folder / "rows.npy", np.array(rows, dtype=np.int64))
    (folder / "names.json").write_text(json.dumps(names), "utf-8")
    return {"shard": shard.url}


def _infos(reader: Any, names: Sequence[str], pattern: str) -> dict[str, dict[str, Any]]:
    """Of files by name: with one question a folder, not one a file."""
    known: dict[str, dict[str, Any]] = {}
    if len(names) > 1:
        for parent in {name.rpartition("/")[0] for name in names}:
            known |= {info["name"]: info for info in _asked(parent, reader.ls, parent, detail=True)}
    return {name: known.get(name) or _asked(pattern, reader.info, name) for name in names}


def _asked(what: str, ask: Callable[..., Any], *words: Any, **more: Any) -> Any:
    try:
        return ask(*words, **more)
    except FileNotFoundError as error:
        raise InputError(f"data.source: there is no {error.filename or error or what}; correct data.source") from error
    except Exception as error:  # each filesystem has its own
        raise InputError(
            f"data.source: cannot read {what}: {type(error).__name__}: {error}; make it readable, or correct"
            " data.storage_options"
        ) from error
