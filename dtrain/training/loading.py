"""Processes that read batches ahead of a worker, into memory that both sides map.

worker -> loader                               loader -> worker
dataset, slot, indices, draws                  slot, where each array lies in it [and the slot's memory, when it is new]
                                               slot, the exception that reading raised
(closed)  leave

A loader is forked before its worker has a thread, a device or a process group, and opens the data itself: no file, lock
or thread is shared. The memory is anonymous and each loader is killed by the kernel when its worker ends, however that
comes about, so nothing is left behind.
"""

import ctypes
import json
import mmap
import os
import pickle
import signal
import socket
import struct
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from dtrain.data import Source
from dtrain.errors import DtrainError

TRAIN, HELD_OUT = 0, 1
NUM_HELD = 2
"""Batches that stay as they are besides the newest: a device may be as far behind with copying them."""
_REQUEST = struct.Struct("<BIQ")
_REPLY = struct.Struct("<BIQ")
_DONE, _DONE_IN_NEW, _FAILED = 0, 1, 2
_ALIGNMENT = 64
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15

Wanted = tuple[np.ndarray, np.ndarray]
"""indices and draws of the samples of a batch"""
Arrays = dict[str, np.ndarray]


class LoaderLost(DtrainError):
    """A loader ended before its worker did. Not the fault of the data or of the code: another attempt may succeed."""

    kind = "killed"


class Lent:
    """A batch in the memory of a loader, written to again some time after `NUM_HELD` others were handed out."""

    def __init__(self, loader: "_Loader", slot: int, arrays: Arrays) -> None:
        self._loader, self._slot = loader, slot
        self.arrays = arrays
        self.wait: Callable[[], None] | None = None
        """Returns when nobody reads the arrays any more, where a device may still be at it."""

    def give_back(self) -> None:
        if self.wait is not None:
            self.wait()
        self._loader.free.append(self._slot)


class Loaders:
    """The loaders of one worker."""

    def __init__(
        self,
        open_source: Callable[[], Source],
        num: int,
        prefetch: int,
        *,
        worker: int = 0,
        inherited: Sequence[socket.socket] = (),
        register: Callable[[np.ndarray], Callable[[], None]] | None = None,
    ) -> None:
        """Fork `num` loaders that keep `prefetch` batches ready each, and close what they have `inherited`.

        `register` is called with all bytes of each new piece of memory and returns what undoes it.
        """
        self.prefetch = prefetch
        self.loaders: list[_Loader] = []
        for number in range(num):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            parent, name = os.getpid(), f"loader-{worker}-{number}"
            pid = os.fork()
            if pid == 0:
                for other in [ours, *inherited, *(loader.socket for loader in self.loaders)]:
                    other.close()
                _become(theirs, open_source, name, parent)
            theirs.close()
            self.loaders.append(_Loader(name, pid, ours, register))
        self._turn = 0

    def read(self, dataset: int, wanted: Iterable[Wanted]) -> "Stream":
        """The batches of `dataset` (TRAIN or HELD_OUT) with the samples `wanted`, in that order."""
        return Stream(self, dataset, iter(wanted))

    def next_loader(self) -> "_Loader":
        self._turn += 1
        return self.loaders[self._turn % len(self.loaders)]

    def close(self) -> None:
        """End the loaders; a batch they are at is left unfinished."""
        for loader in self.loaders:
            loader.close()


class Stream(Iterator[Lent]):
    """Batches of one dataset, some of them on their way."""

    def __init__(self, loaders: Loaders, dataset: int, wanted: Iterator[Wanted]) -> None:
        self._loaders, self._dataset, self._wanted = loaders, dataset, wanted
        self._on_their_way: deque[tuple[_Loader, int]] = deque()
        self._lent: deque[Lent] = deque()
        self._ask()

    def __next__(self) -> Lent:
        if not self._on_their_way:
            raise StopIteration
        loader, slot = self._on_their_way.popleft()
        # Asked for before waiting: the loader that has just become free is not kept waiting itself.
        self._ask()
        arrays = loader.receive(slot)
        self._lent.append(Lent(loader, slot, arrays))
        if len(self._lent) > NUM_HELD:
            self._lent.popleft().give_back()
        return self._lent[-1]

    def close(self) -> None:
        """Wait for what is on its way, and give everything back."""
        for loader, slot in self._on_their_way:
            loader.discard(slot)
        self._on_their_way.clear()
        while self._lent:
            self._lent.popleft().give_back()

    def _ask(self) -> None:
        while len(self._on_their_way) < len(self._loaders.loaders) * self._loaders.prefetch:
            wanted = next(self._wanted, None)
            if wanted is None:
                return
            loader = self._loaders.next_loader()
            self._on_their_way.append((loader, loader.ask(self._dataset, *wanted)))


class _Memory:
    """One slot as its worker maps it."""

    def __init__(self, descriptor: int, register: Callable[[np.ndarray], Callable[[], None]] | None) -> None:
        self.bytes = np.frombuffer(mmap.mmap(descriptor, 0), dtype=np.uint8)
        self.undo = register(self.bytes) if register else None

    def arrays(self, layout: Sequence[tuple[str, str, list[int], int]]) -> Arrays:
        return {name: _view(self.bytes, dtype, shape, offset) for name, dtype, shape, offset in layout}


class _Loader:
    """A loader as its worker sees it."""

    def __init__(
        self,
        name: str,
        pid: int,
        channel: socket.socket,
        register: Callable[[np.ndarray], Callable[[], None]] | None,
    ) -> None:
        self.name, self.pid, self.socket = name, pid, channel
        self.free: list[int] = []
        self._register = register
        self._memory: dict[int, _Memory] = {}
        self._num_slots = 0
        self._answers: dict[int, Arrays | BaseException] = {}
        self._exit_code: int | None = None

    def ask(self, dataset: int, indices: np.ndarray, draws: np.ndarray) -> int:
        """Ask for a batch; returns the slot it will be in."""
        if not self.free:
            self.free.append(self._num_slots)
            self._num_slots += 1
        slot = self.free.pop(0)
        header = _REQUEST.pack(dataset, slot, len(indices))
        try:
            self.socket.sendall(
                b"".join((header, indices.astype(np.int64).tobytes(), draws.astype(np.uint64).tobytes()))
            )
        except OSError:
            self._lost()
        return slot

    def receive(self, slot: int) -> Arrays:
        """The batch in `slot`, waited for. Raises what reading it raised, and `LoaderLost`."""
        while slot not in self._answers:
            self._take()
        answer = self._answers.pop(slot)
        if isinstance(answer, BaseException):
            self.free.append(slot)
            raise answer
        return answer

    def discard(self, slot: int) -> None:
        """Wait for the batch in `slot` and forget it."""
        while slot not in self._answers:
            self._take()
        del self._answers[slot]
        self.free.append(slot)

    def close(self) -> None:
        self.socket.close()
        if self._exit_code is None:
            os.kill(self.pid, signal.SIGKILL)
            self._wait()
        for memory in self._memory.values():
            if memory.undo:
                memory.undo()
        self._memory.clear()

    def _take(self) -> None:
        header, descriptors = self._receive(_REPLY.size, 1)
        status, slot, size = _REPLY.unpack(header)
        body, _ = self._receive(size)
        if status == _FAILED:
            self._answers[slot] = pickle.loads(body)  # noqa: S301 -- written by a fork of this very process
            return
        if status == _DONE_IN_NEW:
            old = self._memory.pop(slot, None)
            if old is not None and old.undo:
                old.undo()
            self._memory[slot] = _Memory(descriptors[0], self._register)
            os.close(descriptors[0])
        self._answers[slot] = self._memory[slot].arrays(json.loads(body))

    def _receive(self, size: int, num_descriptors: int = 0) -> tuple[bytes, list[int]]:
        data = b""
        descriptors: list[int] = []
        while len(data) < size:
            try:
                if num_descriptors:
                    part, found, _, _ = socket.recv_fds(
                        self.socket, size - len(data), num_descriptors, socket.MSG_CMSG_CLOEXEC
                    )
                    descriptors += found
                else:
                    part = self.socket.recv(size - len(data))
            except OSError:
                part = b""
            if not part:
                self._lost()
            data += part
        return data, descriptors

    def _wait(self) -> int:
        if self._exit_code is None:
            _, status = os.waitpid(self.pid, 0)
            self._exit_code = os.waitstatus_to_exitcode(status)
        return self._exit_code

    def _lost(self) -> NoReturn:
        code = self._wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
        raise LoaderLost(
            f"{self.name}, which reads data ahead, {how}; if memory ran out, lower train.loading.workers or"
            " train.loading.prefetch"
        )


# -- the loader itself -----------------------------------------------------------------------------------------


def _become(channel: socket.socket, open_source: Callable[[], Source], name: str, parent: int) -> None:
    """In the child: serve until the worker closes its side. Never returns."""
    code = 1
    try:
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == parent:  # it may have ended before the kernel was told
            _serve(channel, open_source)
            code = 0
    except (ConnectionError, KeyboardInterrupt):
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _serve(channel: socket.socket, open_source: Callable[[], Source]) -> None:
    memory: dict[int, mmap.mmap] = {}
    datasets: Any = None
    with channel.makefile("rb") as requests:
        while header := requests.read(_REQUEST.size):
            dataset, slot, count = _REQUEST.unpack(header)
            words = np.frombuffer(requests.read(16 * count), dtype=np.int64)
            descriptor = -1
            try:
                if datasets is None:
                    source = open_source()
                    datasets = {TRAIN: source.train, HELD_OUT: source.held_out}
                arrays = datasets[dataset].batch(words[:count], words[count:].view(np.uint64))
                layout, size = _layout(arrays)
                if slot not in memory or len(memory[slot]) < size:
                    descriptor = os.memfd_create(f"batch-{slot}", os.MFD_CLOEXEC)
                    os.ftruncate(descriptor, size)
                    memory[slot] = mmap.mmap(descriptor, size)
                room = np.frombuffer(memory[slot], dtype=np.uint8)
                for name, dtype, shape, offset in layout:
                    np.copyto(_view(room, dtype, shape, offset), arrays[name])
                status, body = _DONE, json.dumps(layout).encode()
            except Exception as error:
                status, body = _FAILED, _pickled(error)
            if descriptor >= 0:
                if status == _DONE:
                    socket.send_fds(channel, [_REPLY.pack(_DONE_IN_NEW, slot, len(body))], [descriptor])
                    channel.sendall(body)
                else:
                    del memory[slot]  # the worker has not heard of it
                    channel.sendall(_REPLY.pack(status, slot, len(body)) + body)
                os.close(descriptor)
            else:
                channel.sendall(_REPLY.pack(status, slot, len(body)) + body)


def _layout(arrays: Arrays) -> tuple[list[tuple[str, str, list[int], int]], int]:
    """(name, dtype, shape, offset) of each array one after the other, and the bytes they take together."""
    layout, end = [], 0
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise TypeError(f"{name} of a batch has dtype {array.dtype}; give numbers")
        layout.append((name, array.dtype.str, list(array.shape), end))
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return layout, max(-(-end // mmap.PAGESIZE), 1) * mmap.PAGESIZE


def _view(room: np.ndarray, dtype: str, shape: Sequence[int], offset: int) -> np.ndarray:
    return np.ndarray(tuple(shape), dtype=dtype, buffer=room.data, offset=offset)


def _pickled(error: Exception) -> bytes:
    """The exception with where in the loader it came from; only its text where it cannot be sent."""
    error.add_note("in a loader, " + "".join(traceback.format_tb(error.__traceback__)).strip())
    try:
        body = pickle.dumps(error)
        pickle.loads(body)  # noqa: S301 -- our own, to see whether the other side will be able to
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return body
