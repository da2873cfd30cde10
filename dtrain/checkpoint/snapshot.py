"""The training state in shared memory: it outlives the ranks, and feeds the checkpoint writer.

One segment a node holds one copy of a state that all its ranks hold alike; of a sharded state each rank has a
segment of its own, for its pieces. A segment is laid out as

    header   magic, size of the index, one slot a local rank: [step, is_complete]
    index    JSON: where each tensor lies, its shape and type
    data     the tensors, each aligned to 64 bytes

Local ranks copy equal shares of the bytes at the same time. A snapshot counts only when every slot says the same
step and complete: a rank killed in the middle of its copy leaves a slot that says so.
"""

import contextlib
import fcntl
import json
import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dtrain.checkpoint.pieces import Piece, State, as_pieces
from dtrain.checkpoint.shared_memory import FOLDER
from dtrain.errors import StorageError

MAGIC = b"dtrainS1"
ALIGNMENT = 64
SLOT = struct.Struct("<qq")
HEADER = struct.Struct("<8sqq")


@dataclass(frozen=True)
class Entry:
    name: str
    offset: int
    """Bytes from the start of the data."""
    num_bytes: int
    shape: tuple[int, ...]
    dtype: str
    whole: tuple[int, ...]
    at: tuple[int, ...]
    is_primary: bool


def layout(state: State) -> tuple[list[Entry], int]:
    """Where each piece goes, in the order given, and how many bytes that takes."""
    entries, offset = [], 0
    for piece in as_pieces(state):
        tensor = piece.tensor
        num_bytes = tensor.numel() * tensor.element_size()
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = tuple(tensor.shape)
        entries.append(Entry(piece.name, offset, num_bytes, shape, dtype, piece.whole, piece.at, piece.is_primary))
        offset += _aligned(num_bytes, ALIGNMENT)
    return entries, offset


def segments(path: Path, num_local: int) -> "list[Snapshot]":
    """The segments of a node with `num_local` ranks. Raises `StorageError` when one is missing."""
    if path.exists():
        return [Snapshot.open(path)]
    return [Snapshot.open(path_of(path, local, is_replicated=False)) for local in range(num_local)]


def path_of(path: Path, local_rank: int, *, is_replicated: bool) -> Path:
    """The segment that a rank copies to."""
    return path if is_replicated else path.with_name(f"{path.name}-{local_rank}")


def held_step(path: Path, num_local: int) -> int | None:
    """Steps done in the state that a node holds; None when it holds none, or a torn one."""
    with contextlib.suppress(StorageError):
        steps = {segment.step for segment in segments(path, num_local)}
        return steps.pop() if len(steps) == 1 else None
    return None


class Snapshot:
    """A node's segment, mapped into this process."""

    def __init__(self, path: Path, memory: mmap.mmap, num_slots: int, entries: list[Entry], data_offset: int) -> None:
        self.path = path
        self.entries = entries
        self.num_slots = num_slots
        self._memory = memory
        self._data_offset = data_offset

    @classmethod
    def create(cls, path: Path, state: State, num_slots: int) -> "Snapshot":
        """Open the segment for `state`; make it, with no complete slot, where it is missing or laid out otherwise.

        Called by every rank that shares it at the same time. Raises `StorageError` when shared memory is too small.
        """
        entries, size = layout(state)
        index = json.dumps([vars(entry) for entry in entries]).encode()
        data_offset = _aligned(HEADER.size + num_slots * SLOT.size + len(index), mmap.PAGESIZE)
        lock = os.open(f"{path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(StorageError):
                found = cls.open(path)
                if found.entries == entries and found.num_slots == num_slots:
                    return found
            # A new file, never the old one cut off: the writer may still be reading what was held before.
            path.unlink(missing_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                # Memory is reserved now: running out of it later would be a SIGBUS in the middle of training.
                os.posix_fallocate(descriptor, 0, data_offset + size)
                os.pwrite(descriptor, index, HEADER.size + num_slots * SLOT.size)
                os.pwrite(descriptor, HEADER.pack(MAGIC, num_slots, len(index)), 0)
            except OSError as error:
                path.unlink(missing_ok=True)
                raise StorageError(
                    f"shared memory has no room for a snapshot of {(data_offset + size) / 2**20:.0f} MiB in {FOLDER}"
                    f" ({error.strerror}); make it larger, or let fewer runs share this machine"
                ) from None
            finally:
                os.close(descriptor)
            return cls.open(path)
        finally:
            os.close(lock)

    @classmethod
    def open(cls, path: Path) -> "Snapshot":
        """Map an existing segment. Raises `StorageError` when there is none, or it is not one."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"{path}: no snapshot ({error.strerror})") from None
        try:
            size = os.fstat(descriptor).st_size
            if size < HEADER.size:
                raise StorageError(f"{path}: not a snapshot")
            memory = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        try:
            num_slots, entries, data_offset = _read_index(memory)
        except (ValueError, TypeError, AttributeError, KeyError):
            raise StorageError(f"{path}: not a snapshot") from None
        return cls(path, memory, num_slots, entries, data_offset)

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)

    @property
    def step(self) -> int | None:
        """Steps done in the state that is held; None while it is torn or empty."""
        slots = [SLOT.unpack_from(self._memory, HEADER.size + i * SLOT.size) for i in range(self.num_slots)]
        steps = {step for step, is_complete in slots if is_complete}
        return steps.pop() if len(steps) == 1 and all(is_complete for _, is_complete in slots) else None

    def write_share(self, slot: int, step: int, copies: "list[tuple[torch.Tensor, torch.Tensor]]") -> None:
        """Copy this rank's share (from `shares`) and mark its slot. Blocks for the copy only."""
        self._mark(slot, step, False)
        _copy(copies)
        self._mark(slot, step, True)

    def write_whole(self, step: int, state: State) -> None:
        """Copy everything, in the name of all slots: what a survivor does for its node."""
        for slot in range(self.num_slots):
            self._mark(slot, step, False)
        _copy([(self.view(e), piece.tensor.detach()) for e, piece in zip(self.entries, as_pieces(state), strict=True)])
        for slot in range(self.num_slots):
            self._mark(slot, step, True)

    def invalidate(self) -> None:
        """Forget what is held."""
        for slot in range(self.num_slots):
            self._mark(slot, 0, False)

    def share(self, slot: int, state: State) -> "list[tuple[torch.Tensor, torch.Tensor]]":
        """(destination, source) pairs of what `slot` copies: an equal part of the bytes, cut inside tensors."""
        total = self.num_bytes
        begin, end = total * slot // self.num_slots, total * (slot + 1) // self.num_slots
        pairs, position = [], 0
        for entry, piece in zip(self.entries, as_pieces(state), strict=True):
            source = piece.tensor.detach()
            size = source.element_size()
            low = max(0, -(-(begin - position) // size)) if begin > position else 0
            high = max(0, -(-(end - position) // size)) if end > position else 0
            low, high = min(low, source.numel()), min(high, source.numel())
            if high > low and source.is_contiguous():
                pairs.append((self.view(entry).view(-1)[low:high], source.view(-1)[low:high]))
            elif not source.is_contiguous() and begin <= position < end:
                pairs.append((self.view(entry), source))
            position += entry.num_bytes
        return pairs

    def room(self, share: "list[tuple[torch.Tensor, torch.Tensor]]") -> np.ndarray:
        """The memory that `share` (not empty) is copied to, uint8 [n]: whole pages, but for the last of the segment."""
        whole = np.frombuffer(self._memory, dtype=np.uint8)
        base = whole.ctypes.data
        begin = min(destination.data_ptr() for destination, _ in share) - base
        end = max(d.data_ptr() + d.numel() * d.element_size() for d, _ in share) - base
        return whole[begin // mmap.PAGESIZE * mmap.PAGESIZE : _aligned(end, mmap.PAGESIZE)]

    def view(self, entry: Entry) -> torch.Tensor:
        """The tensor as it lies in the segment: no copy."""
        dtype = getattr(torch, entry.dtype)
        if not entry.num_bytes:
            return torch.empty(entry.shape, dtype=dtype)
        # Each with a storage of its own: DCP copies a tensor that is a window on a larger one before it writes it.
        flat = torch.frombuffer(
            self._memory, dtype=dtype, count=math.prod(entry.shape), offset=self._data_offset + entry.offset
        )
        return flat.view(entry.shape)

    def pieces(self) -> list[Piece]:
        """What is held, as it lies in the segment."""
        return [Piece(e.name, self.view(e), e.whole, e.at, e.is_primary) for e in self.entries]

    def read_into(self, state: State) -> int:
        """Copy the held state into live tensors; returns its step. Raises `StorageError` when it is torn."""
        step = self.step
        if step is None:
            raise StorageError(f"{self.path}: the snapshot is not complete")
        with torch.no_grad():
            for entry, piece in zip(self.entries, as_pieces(state), strict=True):
                piece.tensor.detach().copy_(self.view(entry))
        return step

    def _mark(self, slot: int, step: int, is_complete: bool) -> None:
        SLOT.pack_into(self._memory, HEADER.size + slot * SLOT.size, step, int(is_complete))


def _read_index(memory: mmap.mmap) -> tuple[int, list[Entry], int]:
    """Number of slots, entries, and where the data begins. Raises `ValueError` for what leads outside the segment."""
    magic, num_slots, index_size = HEADER.unpack_from(memory, 0)
    start = HEADER.size + num_slots * SLOT.size
    data_offset = _aligned(start + index_size, mmap.PAGESIZE)
    if magic != MAGIC or num_slots < 1 or index_size < 1 or data_offset > len(memory):
        raise ValueError
    rows = json.loads(memory[start : start + index_size])
    entries = [Entry(**{**row, **{key: tuple(row[key]) for key in ("shape", "whole", "at")}}) for row in rows]
    for entry in entries:
        size = math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize
        if size != entry.num_bytes or entry.offset < 0 or data_offset + entry.offset + size > len(memory):
            raise ValueError
    return num_slots, entries, data_offset


def _copy(pairs: "list[tuple[torch.Tensor, torch.Tensor]]") -> None:
    with torch.no_grad():
        for destination, source in pairs:
            destination.copy_(source, non_blocking=source.is_cuda)
        if any(source.is_cuda for _, source in pairs):
            torch.cuda.current_stream().synchronize()


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to
