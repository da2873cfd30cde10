"""Where the checkpoints of a run are kept: in its folder, or in a bucket with copies on this node."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dtrain import storage
from dtrain.checkpoint import store
from dtrain.checkpoint.pieces import State
from dtrain.errors import StorageError
from dtrain.spec.job import Keep
from dtrain.storage.fencing import Fenced

PARTS_TIMEOUT_S = 600.0
Found = tuple[Path, dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """Which part of which checkpoint somebody writes."""

    step: int
    attempt: int
    node: int = 0
    num_nodes: int = 1
    """How many nodes write one; 1 where every node holds the whole state."""


@dataclass(frozen=True)
class Put:
    """What came of writing a part."""

    num_bytes: int
    deleted: tuple[int, ...] = ()
    """Steps of older checkpoints that the retention rule let go."""
    refused: str = ""
    """Why some of those are still there; they are tried again after the next one."""


class Shelf(Protocol):
    def steps(self) -> list[int]:
        """Steps of all checkpoints that count, ascending."""

    def newest_valid(self, rejected: Callable[[str], None]) -> Found | None:
        """The newest checkpoint, on this node, whose every byte is as it was written; see `store.newest_valid`."""

    def put(self, part: Part, state: State, facts: Mapping[str, Any], keep: Keep) -> Put:
        """Write a part; the first node commits the whole, and deletes what is not to be kept beside it.

        Raises `StorageError`.
        """


class FolderShelf:
    """In a folder that every node sees."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def steps(self) -> list[int]:
        return store.steps(self._folder)

    def newest_valid(self, rejected: Callable[[str], None]) -> Found | None:
        return store.newest_valid(self._folder, rejected)

    def put(self, part: Part, state: State, facts: Mapping[str, Any], keep: Keep) -> Put:
        if part.node:
            return Put(store.write_part(store.part_of(self._folder, part.step, part.node, part.attempt), state))
        others = range(1, part.num_nodes)
        parts = [store.part_of(self._folder, part.step, other, part.attempt) for other in others]
        store.await_parts(parts, PARTS_TIMEOUT_S)
        size = store.write(self._folder, part.step, state, facts, parts)
        return _pruned(size, lambda: store.prune(self._folder, keep))


class RemoteShelf:
    """In a bucket: written to this node's own folder, then carried there, where the list of them is the commit."""

    def __init__(self, folder: Path, place: str, run_id: str, token: int) -> None:
        self._folder, self._run_id, self._token = folder, run_id, token
        self._storage = storage.at(place)

    def steps(self) -> list[int]:
        from dtrain.checkpoint import remote

        return remote.steps(self._storage, self._run_id)

    def newest_valid(self, rejected: Callable[[str], None]) -> Found | None:
        from dtrain.checkpoint import remote

        found = remote.newest_valid(self._storage, self._run_id, rejected, self._folder)
        self._drop_copies(but=found[0].name if found else "")
        return found

    def put(self, part: Part, state: State, facts: Mapping[str, Any], keep: Keep) -> Put:
        from dtrain.checkpoint import remote

        where = self._storage, self._run_id
        if part.num_nodes == 1:
            store.write(self._folder, part.step, state, facts)
            path = store.path_of(self._folder, part.step)
            self._drop_copies(but=path.name)
            size = remote.publish(*where, path, self._token, part.attempt)
            return _pruned(size, lambda: remote.prune(*where, keep, self._token))
        path = store.part_of(self._folder, part.step, part.node, part.attempt)
        try:
            size = store.write_part(path, state)
            remote.publish_part(*where, path, part.step, part.node, self._token, part.attempt)
            if part.node:
                return Put(size)
            asked = part.step, part.num_nodes, self._token, part.attempt
            size = remote.commit_parts(*where, *asked, facts, PARTS_TIMEOUT_S)
            return _pruned(size, lambda: remote.prune(*where, keep, self._token))
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _drop_copies(self, but: str) -> None:
        for copy in self._folder.glob("step-*"):
            if copy.name != but:
                shutil.rmtree(copy, ignore_errors=True)


def of(folder: Path, away: Mapping[str, Any] | None) -> Shelf:
    """The shelf of a run; `away` names its storage, id and owner's token where that is a bucket."""
    if away is None:
        return FolderShelf(folder)
    return RemoteShelf(folder, away["storage"], away["run"], away["token"])


def _pruned(num_bytes: int, prune: Callable[[], list[int]]) -> Put:
    """What storage does not delete now stays for the next time: the checkpoint just written counts all the same."""
    try:
        return Put(num_bytes, tuple(prune()))
    except Fenced:
        raise
    except StorageError as error:
        return Put(num_bytes, refused=error.message)
