"""The messages of programs and their translations, as this machine keeps them in GNU gettext's catalogues."""

import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from dtrain.errors import InputError

FOLDER = Path("/usr/share/locale")
_MAGIC = 0x950412DE
_CHARSET = re.compile(rb"charset=([-\w]+)", re.IGNORECASE)
_LISTS = "iso_"
"""Catalogues whose names begin so hold names of places and languages, not messages."""


def find(language: str) -> list[str]:
    """The catalogues of `language`, sorted. Raises `InputError` when this machine keeps none."""
    found = sorted((FOLDER / language / "LC_MESSAGES").glob("*.mo"))
    found = [path for path in found if not path.name.startswith(_LISTS)]
    if not found:
        known = sorted({path.parent.parent.name for path in FOLDER.glob("*/LC_MESSAGES/*.mo")})
        there = f"there is: {', '.join(known)}" if known else "it keeps none of any language"
        raise InputError(
            f"data.source: this machine keeps no translated messages of its programs for language {language!r} under"
            f" {FOLDER}; {there}; choose data.language, or name files of your own in data.source"
        )
    return [str(path) for path in found]


def read(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each (message, translation) in `paths` once; those that were left as they are do not count."""
    seen: set[tuple[str, str]] = set()
    for path in paths:
        for pair in _messages(path):
            if pair[0] != pair[1] and pair not in seen:
                seen.add(pair)
                yield pair


def _messages(path: str) -> Iterator[tuple[str, str]]:
    """Of one catalogue (GNU gettext manual, "The Format of GNU MO Files"); of a plural the form for one."""
    data = Path(path).read_bytes()
    order = "<" if data[:4] == struct.pack("<I", _MAGIC) else ">"
    try:
        magic, _, count, sources, targets = struct.unpack_from(f"{order}5I", data)
        if magic != _MAGIC:
            raise ValueError("it does not begin as one")
        charset = "utf-8"
        for number in range(count):
            size, start = struct.unpack_from(f"{order}2I", data, sources + 8 * number)
            source = data[start : start + size]
            size, start = struct.unpack_from(f"{order}2I", data, targets + 8 * number)
            target = data[start : start + size]
            if not source:  # the catalogue's own description
                found = _CHARSET.search(target)
                charset = found[1].decode("ascii") if found else charset
                continue
            source = source.rpartition(b"\4")[2].partition(b"\0")[0]  # without its context
            pair = (source.decode(charset), target.partition(b"\0")[0].decode(charset))
            if all(text.strip() for text in pair):
                yield pair
    except (struct.error, ValueError, LookupError) as error:
        raise InputError(
            f"data.source: {path} is no catalogue of messages ({error}); name files of your own in data.source"
        ) from error
