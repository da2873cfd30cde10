"""The small block of shared memory with which the agent and the ranks of one node agree, without messages.

It holds every rank's last sign of life, and a few words with one writer each. The leader (local rank 0) decides
before it takes part in a step's all-reduce; the others read after it: so all see the same decision.
"""

import mmap
import os
import time
from pathlib import Path

from dtrain.runtime.watchdog import Beat


def _word(index: int, meaning: str) -> property:
    def read(control: "Control") -> int:
        return int(control._integers[index])

    def write(control: "Control", value: int) -> None:
        control._integers[index] = value

    return property(read, write, doc=meaning)


class Control:
    """The block, mapped into this process."""

    WORDS = 64
    PER_RANK = 8

    def __init__(self, memory: mmap.mmap) -> None:
        self._integers = memoryview(memory).cast("q")
        self._floats = memoryview(memory).cast("d")

    @classmethod
    def create(cls, path: Path, num_ranks: int) -> "Control":
        """A fresh control block for an attempt, written by the agent."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = 8 * (cls.WORDS + cls.PER_RANK * num_ranks)
            os.ftruncate(descriptor, size)
            memory = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        memory[:] = bytes(size)
        return cls(memory)

    @classmethod
    def open(cls, path: Path) -> "Control":
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(mmap.mmap(descriptor, os.fstat(descriptor).st_size))
        finally:
            os.close(descriptor)

    def beat(self, rank: int, step: int, micro: int, phase: int) -> None:
        """A sign of life; three stores, no system call."""
        at = self.WORDS + self.PER_RANK * rank
        self._integers[at + 1] = step
        self._integers[at + 2] = micro
        self._integers[at + 3] = phase
        self._floats[at] = time.monotonic()

    def last_beat(self, rank: int) -> Beat | None:
        at = self.WORDS + self.PER_RANK * rank
        if not self._floats[at]:
            return None
        return Beat(self._floats[at], self._integers[at + 1], self._integers[at + 2], self._integers[at + 3])

    stop = _word(0, "Set by the agent: leave after the step at hand.")
    last_step = _word(1, "Set by the leader: the step after which all leave; 0 for none.")
    snapshot_step = _word(2, "Set by the leader: the step after which all copy their share.")
    writing_step = _word(3, "Set by the leader, cleared by the agent: the snapshot the writer is reading; 0 for none.")
