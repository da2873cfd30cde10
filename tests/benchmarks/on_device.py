"""Measures on a GPU what `interleaved` measures on cores: one worker, whose rival finds all data on the device.

On a machine without a GPU a benchmark that uses this has nothing to measure; with `--quick` it then does all of it on
one core at tiny sizes, to see that it works.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.machine import Machine, probe
from dtrain.plan import Plan
from dtrain.planning import make_plan
from dtrain.spec import load
from tests.benchmarks import inside
from tests.benchmarks.harness import JOBS, NotHere
from tests.benchmarks.running import Workplace

KEEPER = "tests.benchmarks.interleaved:DeviceKeeper"
ON_GPU = ("cluster.device=gpu", "cluster.workers_per_node=1")
ON_ONE_CORE = (
    "cluster.device=cpu",
    "cluster.workers_per_node=1",
    "train.compile=false",
    "train.loading={workers: 1, prefetch: 1}",
)
ONE_CORE = Machine(num_cores=1, memory_gib=4.0)
SAME = 0.02
"""How far the losses of two that have trained alike may be apart: bf16, and sums in another order each time."""


@dataclass(frozen=True)
class Measured:
    """Seconds a step of both sides, block by block, and what was seen beside them."""

    plan: Plan
    ours: list[float]
    theirs: list[float]
    losses: tuple[float, float]
    """Mean over the last steps, of both sides."""
    device: str
    memory_gib: float
    """Most that both sides had of the device's memory at a time."""

    def says(self, what: str, per_step: float, *, is_same: bool = True) -> str:
        """Speeds and losses of both in words; `is_same` when both sides learn the same from the same."""
        ours, theirs = (per_step / statistics.median(times) for times in (self.ours, self.theirs))
        apart = abs(self.losses[0] / self.losses[1] - 1)
        said = "LOSSES" if is_same and not apart <= SAME else "losses"
        memory = f"; {self.memory_gib:.1f} GiB together" if self.memory_gib else ""
        return (
            f"{ours:,.0f} : {theirs:,.0f} {what}; {said} {self.losses[0]:.3f} : {self.losses[1]:.3f}; micro batch"
            f" {self.plan.batch.micro} x {self.plan.batch.accumulation}{memory}; {self.device}"
        )


def is_tiny(*, is_quick: bool) -> bool:
    """Whether only the machinery is tried here. Raises `NotHere` where there is nothing to measure."""
    if probe().gpus:
        return False
    if is_quick:
        return True
    raise NotHere("this machine has no GPU; --quick tries the machinery on one core")


def measure(place: Workplace, job: str | Path, *overrides: str, tiny: bool) -> Measured:
    """`job` (of the benchmarks, or any file) by turns with its rival, in one worker."""
    file = JOBS / f"{job}.yaml" if isinstance(job, str) else job
    where, machine = (ON_ONE_CORE, ONE_CORE) if tiny else (ON_GPU, None)
    plan = make_plan(*load.load_both(file, place.cluster, [*where, *overrides]), machine, file.parent)
    measured: dict[str, Any] = inside.run(plan, KEEPER, place.folder / "zygote")
    ours, theirs = measured["losses"]
    return Measured(
        plan, measured["ours"], measured["theirs"], (ours, theirs), measured["device"], measured["memory_gib"]
    )
