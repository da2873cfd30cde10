"""What the loop reads: micro batches of a worker's own samples, as tensors on its device."""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from dtrain.data import Dataset, Source
from dtrain.data.order import Order
from dtrain.training.loading import HELD_OUT, TRAIN, Lent, Loaders, Stream, Wanted

Batch = dict[str, torch.Tensor]


class Feed:
    """Micro batches in the order of training, and held-out ones; read ahead by `loaders` where there are some.

    A batch on the CPU may lie in a loader's memory: it stays as it is until the second one after it is asked for.
    `passes` is how often the micro batches of a step are gone through before the next step.
    """

    def __init__(
        self, source: Source, order: Order, device: torch.device, loaders: Loaders | None = None, passes: int = 1
    ) -> None:
        self._source, self._order, self._loaders = source, order, loaders
        self._per_step = order.accumulation * (passes if order.accumulation > 1 else 1)
        self._to_device = Mover(device)
        self._last: tuple[tuple[int, int], Batch] | None = None
        self._stream: Stream | None = None
        self._position = -1

    def micro_batch(self, step: int, number: int) -> Batch:
        """Micro batch `number` of `step`, with the draws of its samples; asked twice in a row, it is read once."""
        if self._last is not None and self._last[0] == (step, number):
            return self._last[1]
        if self._loaders is None:
            wanted = self._order.micro_batch(step, number)
            batch = self._to_device(read(self._source.train, *wanted))
        else:
            batch = self._ahead(self._loaders, step, number)
        self._last = (step, number), batch
        return batch

    def held_out(self, wanted: Iterable[Wanted]) -> Iterator[Batch]:
        """Held-out batches of the samples `wanted`, with their draws."""
        if self._loaders is None:
            for indices, draws in wanted:
                yield self._to_device(read(self._source.held_out, indices, draws))
            return
        asked, wanted = itertools.tee(wanted)
        stream = self._loaders.read(HELD_OUT, asked)
        try:
            for (_, draws), lent in zip(wanted, stream, strict=True):
                yield self._taken(lent, draws)
        finally:
            stream.close()

    def _ahead(self, loaders: Loaders, step: int, number: int) -> Batch:
        self._position += 1
        if self._stream is None or self._place(self._position) != (step, number):
            if self._stream is not None:
                self._stream.close()
            self._position = step * self._per_step + number
            self._stream = loaders.read(TRAIN, self._from(self._position))
        return self._taken(next(self._stream), self._order.micro_batch(step, number)[1])

    def _place(self, position: int) -> tuple[int, int]:
        step, within = divmod(position, self._per_step)
        return step, within % self._order.accumulation

    def _from(self, position: int) -> Iterator[Wanted]:
        for following in itertools.count(position):
            yield self._order.micro_batch(*self._place(following))

    def _taken(self, lent: Lent, draws: np.ndarray) -> Batch:
        batch = self._to_device({**lent.arrays, "draws": _signed(draws)})
        lent.wait = self._to_device.when_copied()
        return batch


def read(dataset: Dataset, indices: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of `dataset` with the draws beside what it holds."""
    return {**dataset.batch(indices, draws), "draws": _signed(draws)}


def _signed(draws: np.ndarray) -> np.ndarray:
    return draws.astype(np.int64)  # a copy: what `order` keeps cannot be written to, which torch warns of


class Mover:
    """Arrays to tensors on the device; on GPUs from pinned memory, by a stream of its own beside what is computed."""

    NUM_AHEAD = 2
    """Batches that are copied while the device still computes with an older one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._computed: deque[torch.cuda.Event] = deque()

    def __call__(self, arrays: dict[str, np.ndarray]) -> Batch:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self._stream is None:
            return tensors
        computing = torch.cuda.current_stream(self._device)
        # Nothing else holds this process back from filling the device's memory with batches.
        if len(self._computed) > self.NUM_AHEAD:
            self._computed.popleft().synchronize()
        self._computed.append(computing.record_event())
        with torch.cuda.stream(self._stream):
            # What is pinned already is not copied by pin_memory.
            moved = {name: t.pin_memory().to(self._device, non_blocking=True) for name, t in tensors.items()}
        computing.wait_stream(self._stream)
        for tensor in moved.values():
            tensor.record_stream(computing)  # else a later copy could take its memory while it is computed with
        return moved

    def when_copied(self) -> Callable[[], None] | None:
        """What waits until the arrays given so far were copied; None when nothing is copied at all."""
        return None if self._stream is None else self._stream.record_event().synchronize


def pinned(memory: np.ndarray) -> Callable[[], None]:
    """Pin `memory` (uint8 [n]), so that a GPU copies from it by itself; returns what undoes it."""
    runtime, address = torch.cuda.cudart(), memory.ctypes.data
    if int(runtime.cudaHostRegister(address, memory.nbytes, 0)) == 0:
        return lambda: runtime.cudaHostUnregister(address)
    # Then `Mover` copies. The runtime tells a failure to whoever launches next: take it here.
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
    return lambda: None
