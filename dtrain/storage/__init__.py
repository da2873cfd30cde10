"""Where run folders live: a folder (of this machine, or shared), or a bucket: `s3://`, `gs://`, `abfs://`.

Everything is named relative to the place's root with `/` between parts (`gpt_small-k3f9/run.json`). An object is seen
whole or not at all, in a folder too. Credentials come from each store's standard chain, never from a file of dtrain's.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dtrain.errors import StorageError


class NotThere(StorageError):
    """There is no object of this name."""


class Conflict(StorageError):
    """A conditional write came too late: somebody else has written the object."""


@dataclass(frozen=True)
class Entry:
    """One object."""

    name: str
    bytes: int
    version: str
    """Changes whenever the object does; opaque."""


class Storage(Protocol):
    """A place for runs. Every method raises `StorageError` once its own retries, with backoff, are used up."""

    @property
    def uri(self) -> str:
        """Where it is, as a person would write it."""

    @property
    def local(self) -> Path | None:
        """The folder, where it is one that this machine sees."""

    def read(self, name: str) -> tuple[bytes, str]:
        """The bytes of an object and its version. Raises `NotThere`."""

    def read_if_changed(self, name: str, version: str | None) -> tuple[bytes, str] | None:
        """The same, or None when it still has that version. Raises `NotThere`."""

    def write(self, name: str, data: bytes, *, if_absent: bool = False, if_version: str | None = None) -> str:
        """Put an object whole; returns its version.

        With a condition, `Conflict` is raised and nothing written unless it holds at the moment of writing.
        """

    def upload(self, file: Path, name: str) -> None:
        """Put a file, in several parts at once where it is large."""

    def download(self, name: str, file: Path) -> None:
        """Get an object into a file, which appears whole. Raises `NotThere`."""

    def entries(self, prefix: str = "") -> list[Entry]:
        """Every object below a prefix that ends with `/` (or is empty), at any depth, sorted by name."""

    def folders(self, prefix: str = "") -> list[str]:
        """The names directly below a prefix that have objects below them, sorted; without the prefix."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; those that are gone already are no error."""


def check_name(place: str, name: str) -> str:
    """The name again, when it can be an object's: one that leads out of its storage must not be followed."""
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise StorageError(f"{place}: {name!r} is no name of an object: no part of it may be empty, '.' or '..'")
    return name


def is_remote(place: str) -> bool:
    """Whether a `storage` setting is a URI rather than a folder."""
    return "://" in place and not place.startswith("file://")


def at(place: str) -> Storage:
    """The storage at a folder or URI. Raises `InputError` for a scheme nobody serves, or without its package."""
    if is_remote(place):
        from dtrain.storage import bucket

        return bucket.open(place)
    from dtrain.storage import folder

    return folder.open(place)
