"""Kill -9 of one of two ranks: the time to the next completed step, over torchrun's and Ray Train's own restarts.

All three train the same model and write a checkpoint every step. A round: each is started, warmed up, hit, ended.
"""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from tests.benchmarks.harness import Figure, paired
from tests.benchmarks.running import Script, Workplace, ray_train, rival_config, torchrun, workplace

TORCHRUN_TARGET, RAY_TARGET = 0.15, 0.05
JOB = ("small", "train.steps=1000000", "train.log_every_steps=1")
OURS = ("checkpoint.every_steps=1", "checkpoint.snapshot_every_steps=1", "retry.killed=1000")
WARM_STEPS = 20
NEVER_S = 75.0
"""A rival that has not taken a step by then is taken not to recover."""
KILLS = 2
"""In each round, of each of the three."""


def measure(*, is_quick: bool) -> list[Figure]:
    ours: list[float] = []
    torchruns: list[float | None] = []
    rays: list[float | None] = []
    with workplace() as place:
        config = rival_config(place.plan(*JOB))
        for number in range(1 if is_quick else 5):
            ours += _dtrain(place)
            place.down()  # the rivals have the machine to themselves
            folder = place.folder / str(number)
            folder.mkdir()
            facts = {**config, "checkpoint": str(folder / "state.pt")}
            torchruns += _rival(torchrun(folder / "torchrun.jsonl", facts, max_restarts=100))
            facts = {**config, "storage": str(folder / "ray"), "ray_folder": f"/tmp/bench-ray-{os.getpid()}"}
            rays += _rival(ray_train(folder / "ray.jsonl", facts))
    return [
        _figure("dtrain : torchrun --max-restarts", ours, torchruns, TORCHRUN_TARGET),
        _figure("dtrain : Ray Train", ours, rays, RAY_TARGET),
    ]


def _figure(name: str, ours: list[float], theirs: list[float | None], target: float) -> Figure:
    """A pair counts where the rival recovered; how often it did not is said beside it."""
    pairs = [(mine, rival) for mine, rival in zip(ours, theirs, strict=False) if rival is not None]
    never = sum(rival is None for rival in theirs)
    note = f"the rival never recovered {never} of {len(theirs)} times" if never else ""
    return paired(name, [mine for mine, _ in pairs], [rival for _, rival in pairs], target, note)


def _dtrain(place: Workplace) -> list[float]:
    submitted = place.submit(*JOB, *OURS)
    taken = []
    try:
        for attempt in range(1, KILLS + 1):
            step = submitted.await_step(lambda line, a=attempt: line["attempt"] == a)
            submitted.await_step(lambda line, s=step["step"]: line["step"] >= s + WARM_STEPS)
            killed = time.time()
            os.kill(place.ranks()["rank-1"], signal.SIGKILL)
            step = submitted.await_step(lambda line, a=attempt: line["attempt"] == a + 1)
            taken.append(step["time"] - killed)
    finally:
        submitted.stop()
    return taken


def _rival(script: Script) -> list[float | None]:
    """Seconds of each kill; None where no step was completed in time."""
    taken: list[float | None] = []
    gone: set[int] = set()
    try:
        for _ in range(KILLS):
            step = script.await_step(_of_new_rank_0(gone))
            pids = {0: step["pid"]}
            script.await_step(lambda line, s=step["step"]: line["step"] >= s + WARM_STEPS and line["rank"] == 0)
            pids[1] = _newest_pid(script, 1)
            time.sleep(2.5)  # Ray Train may lose a checkpoint that is younger
            killed = time.time()
            os.kill(pids[1], signal.SIGKILL)
            gone |= set(pids.values())
            try:
                step = script.await_step(_of_new_rank_0(gone), NEVER_S)
            except TimeoutError:
                return [*taken, None]
            taken.append(step["time"] - killed)
        return taken
    finally:
        script.end()


def _of_new_rank_0(gone: set[int]) -> Callable[[dict[str, Any]], bool]:
    return lambda line: line["rank"] == 0 and line["pid"] not in gone


def _newest_pid(script: Script, rank: int) -> int:
    return int([line["pid"] for line in script.lines() if line["rank"] == rank][-1])
