"""A hundred kills of a rank at random steps in one run: each survived, and the weights those of an undisturbed run."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from dtrain.runs import Run
from tests.benchmarks.harness import Figure
from tests.benchmarks.running import Submitted, Workplace, workplace

SEED = 20261120
STEPS_PER_KILL = 40
LAST_STEPS = 200
"""Without kills, so that the run is never over before its last one."""
SETTINGS = ("train.log_every_steps=1", "checkpoint.every_steps=100", "retry.killed=1000")


def measure(*, is_quick: bool) -> list[Figure]:
    num_kills = 5 if is_quick else 100
    steps = num_kills * STEPS_PER_KILL + LAST_STEPS
    job = ("small", f"train.steps={steps}", *SETTINGS)
    with workplace() as place:
        disturbed = place.submit(*job)
        taken: list[float] = []
        with contextlib.suppress(TimeoutError):  # lost: the figures will say so
            _disturb(place, disturbed, num_kills, steps, taken)
        disturbed.process.wait(600)
        record = disturbed.run.record
        calm = place.submit(*job)
        calm.wait()
        num_recovered = sum(a.failure == "killed" for a in record.attempts)
        is_lost = record.state != "succeeded"
        differ = -1 if is_lost else len(_differences(disturbed.run, calm.run))
    sources = [a.source for a in record.attempts[1:]]
    taken = sorted(taken) or [float("inf")]
    note = f"half of them within {taken[len(taken) // 2] * 1000:.0f} ms, all within {taken[-1] * 1000:.0f} ms"
    note += f"; {sum(s == 'snapshot' for s in sources)} from the snapshot" if sources else ""
    return [
        Figure("recoveries", num_recovered, num_kills, target_is_most=False, num=num_kills, note=note),
        Figure("runs lost", float(is_lost), 0.0, note=record.cause),
        Figure("tensors that differ at the end", differ if differ >= 0 else float("inf"), 0.0, note="bit for bit"),
    ]


def _disturb(place: Workplace, submitted: Submitted, num_kills: int, steps: int, taken: list[float]) -> None:
    """Kill a rank at each of the chosen steps, at any moment within it; `taken`: the seconds to the next step."""
    dice = random.Random(SEED)
    at = sorted(dice.sample(range(2, steps - LAST_STEPS), num_kills))
    for number, step in enumerate(at, start=1):
        submitted.await_step(lambda line, s=step: line["step"] >= s)
        time.sleep(dice.random() * 0.01)
        killed = time.time()
        os.kill(place.ranks()[f"rank-{dice.randrange(2)}"], signal.SIGKILL)
        found = submitted.await_step(lambda line, n=number: line["attempt"] == n + 1)
        taken.append(found["time"] - killed)


def _differences(one: Run, other: Run) -> list[str]:
    """Names of tensors that are not equal in the last checkpoints of two runs."""
    import torch

    first, second = _state(one), _state(other)
    if first.keys() != second.keys():
        return sorted(first.keys() ^ second.keys())
    return [name for name in first if not torch.equal(first[name], second[name])]


def _state(run: Run) -> dict[str, Any]:
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    from dtrain.checkpoint import store

    newest = store.path_of(run.checkpoints, store.steps(run.checkpoints)[-1])
    flat = Path(run.path) / "flat.pt"
    dcp_to_torch_save(newest, flat)
    return dict(torch.load(flat, weights_only=True))
