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
    steps = BLOCK * (1 + NUM_TURNS * (1 if is_quick else 6)) + 1
    with workplace() as place:
        plan = place.plan("large", f"train.steps={steps}")
        memory = Memory(place.folder / "zygote")
        with memory:
            measured = inside.run(plan, KEEPER, place.folder / "zygote")
    waits, blocks = measured["waits"], measured["blocks"]
    size = measured["num_bytes"]
    note = f"{memory.segment / 1e6:.0f} MB shared, {memory.writer / 1e6:.0f} MB the writer's own"
    return [
        paired("wait: snapshot : torch.save with fsync", waits["ours"], waits["theirs"], WAIT_TARGET),
        paired("10 steps: with a checkpoint : without", blocks["ours"], blocks["none"], WALL_TARGET),
        Figure(
            "memory beside the training state, in copies of it",
            round((memory.segment + memory.writer) / size, 3),
            MEMORY_TARGET,
            note=f"{note}, state {size / 1e6:.0f} MB",
        ),
    ]


class Memory:
    """Looks again and again at what snapshot and writer take; keeps the most that both took together."""

    EVERY_S = 0.05

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
                own = sum(_anonymous(pid) for pid in writers)
                if segment + own > self.segment + self.writer:
                    self.segment, self.writer = segment, own

    @staticmethod
    def _segments() -> list[Path]:
        return list(shared_memory.FOLDER.glob("dtrain-*-state"))


def _anonymous(pid: int) -> int:
    """Bytes of a process's own memory; pages it shares with others count in part (proc_pid_smaps(5))."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) * 1024
    return 0
