"""What a store must know to keep runs (`dtrain.storage.bucket`), and what one process holds of it: a connection.

fsspec runs requests in a thread, which a forked child does not have: a child makes a connection of its own.
"""

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from dtrain.storage import Entry

NUM_PARALLEL = 8
"""Requests at once that carry a part: what they hold in memory is bounded by this."""

REQUEST_S = 300.0
"""Longest time of one request: a network library lets one hang whose server stops reading."""
NUM_DELETED_AT_ONCE = 16

Verb = Literal["read", "written", "listed", "deleted"]
Kind = Literal["again", "gone", "conflict", "unchanged", "denied", "no bucket", "no credentials", "other"]


@dataclass(frozen=True)
class Answer:
    """What a store says instead of doing what it was asked."""

    kind: Kind
    text: str


class Store(Protocol):
    """One bucket of one store. Each method is one request (or its pages) and raises whatever its package does."""

    files: Any
    """The file system of fsspec that requests go through."""
    max_parts: int
    """Of one upload."""
    remedies: Mapping[Kind, str]
    """The next move after an answer, for a person who looks after credentials."""
    permissions: Mapping[Verb, str]
    """What this store calls the permission."""

    def answer(self, error: Exception) -> Answer:
        """What an exception of this store's package means."""

    def get(self, key: str, known: str | None = None) -> tuple[bytes, str]:
        """An object and its version; answers "unchanged" when that is `known`."""

    def facts(self, key: str) -> tuple[int, str, str]:
        """Size, version and mark."""

    def get_range(self, key: str, version: str, start: int, stop: int) -> bytes:
        """Some bytes of that version; answers "conflict" when it has another by now."""

    def put(self, key: str, data: bytes, mark: str, if_absent: bool, if_version: str | None) -> str:
        """Put an object with a mark, a word beside it; returns its version."""

    def begin(self, key: str, mark: str) -> str:
        """Begin an upload in parts; returns what names it."""

    def put_part(self, key: str, upload: str, number: int, data: bytes) -> str:
        """Put a part, of any number from 1; returns a receipt."""

    def finish(self, key: str, upload: str, mark: str, receipts: list[str]) -> None:
        """Make an object of the parts."""

    def abandon(self, key: str, upload: str, num_parts: int) -> None:
        """Let parts go that will not become an object."""

    def entries(self, prefix: str) -> list[Entry]:
        """Every object whose key begins so."""

    def folders(self, prefix: str) -> list[str]:
        """What stands between a prefix and the next `/` in the keys that begin so."""

    def delete(self, keys: list[str]) -> None:
        """Delete objects that may be gone already."""


def wait_for(store: Store, begin: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """What a request comes to, made in the thread in which fsspec runs the requests of this store."""
    from fsspec.asyn import sync

    return sync(store.files.loop, begin, timeout=REQUEST_S)


def delete_each(store: Store, keys: list[str], delete: Callable[[str], Coroutine[Any, Any, None]]) -> None:
    """Where a store deletes but one object a request: several requests at once."""

    async def all_of_them() -> None:
        gate = asyncio.Semaphore(NUM_DELETED_AT_ONCE)

        async def one(key: str) -> None:
            async with gate:
                await delete(key)

        await asyncio.gather(*(one(key) for key in keys))

    wait_for(store, all_of_them)


class Connection:
    """What one process holds of a bucket."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.gate = threading.BoundedSemaphore(NUM_PARALLEL)
        self.has_answered = False


_CONNECTIONS: dict[tuple[int, str], Connection] = {}
"""By process and bucket. Those of a parent process stay here: to close them in a child would disturb it."""


def connection(name: str, connect: Callable[[], Store]) -> Connection:
    """What this very process holds of a bucket; made at the first call."""
    key = os.getpid(), name
    if key not in _CONNECTIONS:
        _CONNECTIONS.setdefault(key, Connection(connect()))
    return _CONNECTIONS[key]


def _leave_to_parent() -> None:
    """In a forked child: what its parent had opened is not closed when the child ends.

    The packages register that, and would wait for a thread that is not there: adlfs for ever.
    """
    inherited = {id(connection.store.files) for connection in _CONNECTIONS.values()}
    for closing in list(getattr(weakref.finalize, "_registry", ())):
        found = closing.peek()
        if found is not None and id(found[0]) in inherited:
            closing.detach()


os.register_at_fork(after_in_child=_leave_to_parent)
