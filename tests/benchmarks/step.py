"""Step time of dtrain's loop over an equally tuned hand-written DDP loop, in blocks that take turns in the same ranks.

dtrain's side has all a real run has: signs of life, a snapshot every ten steps, metrics, and the agent that reads them.
"""

from tests.benchmarks import inside
from tests.benchmarks.harness import Figure, paired
from tests.benchmarks.running import workplace
from tests.benchmarks.strategies import alike

TARGETS = {"medium": 1.02, "small": 1.05}
STEPS = {"medium": 400, "small": 12000}
QUICK_STEPS = {"medium": 120, "small": 2000}
KEEPER = "tests.benchmarks.interleaved:StepKeeper"


def measure(*, is_quick: bool) -> list[Figure]:
    figures = []
    with workplace() as place:
        for job, target in TARGETS.items():
            steps = QUICK_STEPS[job] if is_quick else STEPS[job]
            plan = place.plan(job, f"train.steps={steps}")
            measured = inside.run(plan, KEEPER, place.folder / "zygote")
            ours, theirs = measured["ours"], measured["theirs"]
            note = alike(measured["difference"])
            note += f"processor time {measured['work']['ours'] / measured['work']['theirs']:.3f}"
            figures.append(paired(f"dtrain : hand-written, {job} step", ours, theirs, target, note))
    return figures
