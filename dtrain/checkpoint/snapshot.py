"""The training state in shared memory: it outlives the ranks, and feeds the checkpoint writer.

One segment a node holds one copy of the state, laid out as

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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

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


def layout(tensors: Mapping[str, torch.Tensor]) -> tuple[list[Entry], int]:
    """Where each tensor goes, in the order given, and how many bytes that takes."""
    entries, offset = [], 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * tensor.element_size()
        entries.append(Entry(name, offset, num_bytes, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")))
        offset += -(-num_bytes // ALIGNMENT) * ALIGNMENT
    return entries, offset


class Snapshot:
    """A node's segment, mapped into this process."""

    def __init__(self, path: Path, memory: mmap.mmap, num_slots: int, entries: list[Entry], data_offset: int) -> None:
        self.path = path
        self.entries = entries
        self.num_slots = num_slots
        self._memory = memory
        self._data_offset = data_offset

    @classmethod
    def create(cls, path: Path, tensors: Mapping[str, torch.Tensor], num_slots: int) -> "Snapshot":
        """Open the segment for `tensors`; make it, with no complete slot, where it is missing or laid out otherwise.

        Called by every rank of the node at the same time. Raises `StorageError` when shared memory is too small.
        """
        entries, size = layout(tensors)
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
        except (ValueError, TypeError, AttributeError):
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

    def write_whole(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy everything, in the name of all slots: what a survivor does for its node."""
        for slot in range(self.num_slots):
            self._mark(slot, step, False)
        _copy([(self.view(entry), tensors[entry.name].detach()) for entry in self.entries])
        for slot in range(self.num_slots):
            self._mark(slot, step, True)

    def invalidate(self) -> None:
        """Forget what is held."""
        for slot in range(self.num_slots):
            self._mark(slot, 0, False)

    def share(self, slot: int, tensors: Mapping[str, torch.Tensor]) -> "list[tuple[torch.Tensor, torch.Tensor]]":
        """(destination, source) pairs of what `slot` copies: an equal part of the bytes, cut inside tensors."""
        total = self.num_bytes
        begin, end = total * slot // self.num_slots, total * (slot + 1) // self.num_slots
        pairs, position = [], 0
        for entry in self.entries:
            source = tensors[entry.name].detach()
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

    def tensors(self) -> dict[str, torch.Tensor]:
        return {entry.name: self.view(entry) for entry in self.entries}

    def read_into(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Copy the held state into live tensors; returns its step. Raises `StorageError` when it is torn."""
        step = self.step
        if step is None:
            raise StorageError(f"{self.path}: the snapshot is not complete")
        with torch.no_grad():
            for entry in self.entries:
                tensors[entry.name].detach().copy_(self.view(entry))
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
    entries = [Entry(**{**row, "shape": tuple(row["shape"])}) for row in rows]
    for entry in entries:
        size = math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize
        if size != entry.num_bytes or entry.offset < 0 or data_offset + entry.offset + size > len(memory):
            raise ValueError
    return num_slots, entries, data_offset


def _copy(pairs: "list[tuple[torch.Tensor, torch.Tensor]]") -> None:
    with torch.no_grad():
        for destination, source in pairs:
            destination.copy_(source, non_blocking=source.is_cuda)
        if any(source.is_cuda for _, source in pairs[:1]):
            torch.cuda.current_stream().synchronize()


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to
