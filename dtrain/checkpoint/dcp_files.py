"""Pieces of a training state in the files of torch's distributed checkpoint (DCP), written by one process a node.

DCP shards what it is told is sharded, by processes that hold a process group together. Here one process holds the
pieces of many ranks, and none of their groups: planners of our own tell DCP which rectangle each piece is.
"""

import contextlib
import dataclasses
import math
import os
import pickle
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dtrain.checkpoint.direct import DirectFile
from dtrain.checkpoint.pieces import Piece
from dtrain.errors import StorageError

INDEX = ".metadata"


Sums = dict[str, str]
"""SHA-256 of files, by name."""


def save(path: Path, pieces: Sequence[Piece]) -> Sums:
    """Write the primary ones of `pieces`, and an index of them, to the existing folder `path`.

    Returns the sums of the files that hold the pieces.

    A rectangle without numbers is left out, unless it is all there is: it may begin where another's does.
    """
    mine = [piece for piece in pieces if piece.is_primary and (piece.tensor.numel() or piece.is_whole)]
    # One thread: DCP loses what goes wrong in any other, and writes an index that lacks what was to be there.
    writer = FileSystemWriter(path, single_file_per_rank=True, sync_files=True, thread_count=1)
    writer.fs = files = _DirectFiles()
    with _without_process_group():
        dcp.save({}, storage_writer=writer, planner=_SavePieces(mine), no_dist=True)
    return files.sums


def join(path: Path, parts: Sequence[tuple[Path, Sums]]) -> Sums:
    """Move the files of `parts`, given with their sums, into `path`, and make one index of all of theirs.

    Returns the sums under the files' new names. Raises `StorageError` when some numbers of a tensor are in none of
    them, or some in several.
    """
    index = _read_index(path)
    sums: Sums = {}
    for number, (part, held) in enumerate(parts, start=1):
        other = _read_index(part)
        for old in file_names(other):
            (part / old).replace(path / name_in_whole(old, number))
            sums[name_in_whole(old, number)] = held[old]
        _add(index, other, number)
    _check_whole(index)
    if parts:
        with open(path / INDEX, "wb") as file:
            pickle.dump(index, file)
            file.flush()
            os.fsync(file.fileno())
        for part, _ in parts:
            for left in part.iterdir():
                left.unlink()
            part.rmdir()
    return sums


def joined_index(parts: Sequence[Path]) -> bytes:
    """One index for the files of all `parts`, of which only the indexes need to be there, under their names as a whole.

    Raises `StorageError` as `join` does.
    """
    index = _read_index(parts[0])
    for number, part in enumerate(parts[1:], start=1):
        _add(index, _read_index(part), number)
    _check_whole(index)
    return pickle.dumps(index)


def file_names(index: Metadata | Path) -> list[str]:
    """The files that hold numbers, by an index or the folder it lies in."""
    held = _read_index(index) if isinstance(index, Path) else index
    return sorted({info.relative_path for info in held.storage_data.values()})


def name_in_whole(name: str, number: int) -> str:
    """What a file of part `number` is called in the whole."""
    return f"__{number}_{name.rpartition('_')[2]}" if number else name


def load(path: Path, pieces: Sequence[Piece]) -> None:
    """Read all of `pieces`, in place."""
    with _without_process_group(), torch.no_grad():
        dcp.load({}, storage_reader=FileSystemReader(path), planner=_LoadPieces(pieces), no_dist=True)


def names(path: Path) -> set[str]:
    """What a checkpoint holds."""
    return set(_read_index(path).state_dict_metadata)


class _DirectFiles(FileSystem):
    """Lets DCP write its data past the page cache; its index is a small file like any other."""

    def __init__(self) -> None:
        self.sums: Sums = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        name = os.path.basename(path)
        if mode != "wb" or name.startswith(INDEX):
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with DirectFile(Path(path)) as file:
            yield file
        self.sums[name] = file.sha256


class _SavePieces(DefaultSavePlanner):
    """One item a piece."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self._pieces = {_index(piece): piece for piece in pieces}

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(index, piece) for index, piece in self._pieces.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        # DCP's own asks here for every number of every tensor, and a node may hold some of them only.
        plans, index = create_default_global_save_plan(all_plans)
        return plans, index

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._pieces[_plain(index)].tensor.detach()


class _LoadPieces(DefaultLoadPlanner):
    """For each piece, what the checkpoint's chunks hold of it."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self._asked = pieces
        self._pieces = {_index(piece): piece for piece in pieces if piece.tensor.numel()}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        requests = []
        for piece in self._asked:
            found = self.metadata.state_dict_metadata.get(piece.name)
            if not isinstance(found, TensorStorageMetadata):
                raise StorageError(f"it holds no {piece.name}: it was written by another model or optimizer")
            if tuple(found.size) != piece.whole:
                raise StorageError(f"{piece.name} has shape {tuple(found.size)} in it, and {piece.whole} in the model")
            if not piece.tensor.numel():
                continue
            chunk = ChunkStorageMetadata(torch.Size(piece.at), piece.tensor.size())
            requests += create_read_items_for_chunk_list(piece.name, found, [chunk])
        return LoadPlan(requests)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._pieces[_plain(index)].tensor.detach()


def _index(piece: Piece) -> MetadataIndex:
    return MetadataIndex(piece.name, torch.Size(piece.at))


def _plain(index: MetadataIndex) -> MetadataIndex:
    return MetadataIndex(index.fqn, index.offset)


def _write_item(index: MetadataIndex, piece: Piece) -> WriteItem:
    properties = TensorProperties.create_from_tensor(piece.tensor.detach())
    chunk = ChunkStorageMetadata(torch.Size(piece.at), piece.tensor.size())
    kind = WriteItemType.TENSOR if piece.is_whole else WriteItemType.SHARD
    return WriteItem(index, kind, tensor_data=TensorWriteData(chunk, properties, torch.Size(piece.whole)))


def _read_index(path: Path) -> Metadata:
    return FileSystemReader(path).read_metadata()


def _add(index: Metadata, other: Metadata, number: int) -> None:
    """Let an index speak of part `number` too."""
    for name, tensor in other.state_dict_metadata.items():
        found = index.state_dict_metadata.get(name)
        if isinstance(found, TensorStorageMetadata) and isinstance(tensor, TensorStorageMetadata):
            found.chunks.extend(tensor.chunks)
        else:
            index.state_dict_metadata[name] = tensor
    index.storage_data.update(
        {
            at: dataclasses.replace(info, relative_path=name_in_whole(info.relative_path, number))
            for at, info in other.storage_data.items()
        }
    )


def _check_whole(index: Metadata) -> None:
    for name, tensor in index.state_dict_metadata.items():
        if isinstance(tensor, TensorStorageMetadata):
            # Each rectangle once: one written twice must not make up for another that nobody wrote.
            sizes = {tuple(chunk.offsets): math.prod(chunk.sizes) for chunk in tensor.chunks}
            if len(sizes) < len(tensor.chunks):
                raise StorageError(f"{name}: a rectangle of it was written by two workers, and one of them is to be")
            held = sum(sizes.values())
            if held != math.prod(tensor.size):
                raise StorageError(f"{held} numbers of {name} are held, and it has {math.prod(tensor.size)}")


@contextlib.contextmanager
def _without_process_group() -> Iterator[None]:
    """DCP warns when it works in a single process, which is just what is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to.*", category=UserWarning)
        yield
