"""What a checkpoint of about 430 MB costs: time in which training waits, time in all, and memory."""

import contextlib
import threading
from pathlib import Path

from dtrain.checkpoint import shared_memory
from tests.benchmarks import inside
from tests.benchmarks.harness import Figure, paired
from tests.benchmarks.running import children, workplace

BLOCK, NUM_TURNS = 10, 3
"""Of `interleaved.CheckpointKeeper`, which needs torch."""
WAIT_TARGET, WALL_TARGET, MEMORY_TARGET = 0.2, 1.05, 1.0
KEEPER = "tests.benchmarks.interleaved:CheckpointKeeper"


def measure(*, is_quick: bool) -> list[Figure]:
    steps = BLOCK * (1 + NUM_TURNS * (1 if is_quick else 4)) + 1
    with workplace() as place:
        folder = place.folder / "zygote"
        with Memory(folder) as bare:  # what a writer takes whatever it writes: an interpreter's own memory
            plan = place.plan("small", "train.steps=121")
            inside.run(plan, KEEPER, folder)
        with Memory(folder) as memory:
            measured = inside.run(place.plan("large", f"train.steps={steps}"), KEEPER, folder)
    waits, blocks = measured["waits"], measured["blocks"]
    size = measured["num_bytes"]
    note = f"state {size / 1e6:.0f} MB; {memory.segment / 1e6:.0f} MB shared, and the writer's own"
    note += f" {memory.writer / 1e6:.0f} MB, of which {bare.writer / 1e6:.0f} MB whatever the state"
    return [
        paired("wait: snapshot : torch.save with fsync", waits["ours"], waits["theirs"], WAIT_TARGET),
        paired("10 steps: with a checkpoint : without", blocks["ours"], blocks["none"], WALL_TARGET),
        Figure(
            "memory beside the training state, in copies of it",
            round((memory.segment + memory.writer - bare.writer) / size, 2),
            MEMORY_TARGET,
            note=note,
        ),
    ]


class Memory:
    """Looks again and again at what snapshot and writer take; keeps the most of each."""

    EVERY_S = 0.1

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.segment = self.writer = 0

    def __enter__(self) -> "Memory":
        self._before = set(self._segments())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self.EVERY_S):
            with contextlib.suppress(OSError, ValueError):
                segment = sum(path.stat().st_blocks * 512 for path in self._segments() if path not in self._before)
                zygote = int((self._folder / "zygote.pid").read_text())
                writers = [pid for pid, name in children(zygote).items() if name == "writer"]
                own = sum(map(_own, writers))
                self.segment, self.writer = max(segment, self.segment), max(own, self.writer)

    @staticmethod
    def _segments() -> list[Path]:
        return list(shared_memory.FOLDER.glob("dtrain-*-state"))


def _own(pid: int) -> int:
    """Bytes of memory that a process shares with no other, the snapshot's left out (proc_pid_smaps(5))."""
    total, is_segment = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        word, _, rest = line.partition(" ")
        if not word.endswith(":"):
            is_segment = "/dtrain-" in rest
        elif word in ("Private_Clean:", "Private_Dirty:") and not is_segment:
            total += int(rest.split()[0]) * 1024
    return total
