"""Step time under each strategy over the smallest loop that is written by hand with the same library.

Both take turns in the same ranks, as in `step`.
"""

from tests.benchmarks import inside
from tests.benchmarks.harness import Figure, paired
from tests.benchmarks.running import workplace

TARGET = 1.03
STEPS, QUICK_STEPS = 400, 120
KEEPER = "tests.benchmarks.interleaved:StepKeeper"
STRATEGIES = {
    "ddp": ["strategy.name=ddp"],
    "fsdp": ["strategy.name=fsdp"],
    "deepspeed, stage 1": ["strategy.name=deepspeed", "strategy.stage=1"],
    "deepspeed, stage 2": ["strategy.name=deepspeed", "strategy.stage=2"],
    "deepspeed, stage 3": ["strategy.name=deepspeed", "strategy.stage=3"],
    "accelerate": ["strategy.name=accelerate"],
}
SAME = 1e-2
"""What may stay between weights after 400 steps whose sums were taken in another order.

Rounding grows from step to step. FSDP2's norm of sharded gradients is added up otherwise than by hand: weights then
differ by 7e-9 after 2 steps, 1e-5 after 20, 1e-4 after 60, 2e-3 after 400.
"""


def alike(difference: float | None) -> str:
    """Whether both sides have trained to the same weights, in words."""
    if difference is None:
        return ""
    if difference == 0:
        return "weights equal bit for bit; "
    return f"weights {'differ by' if difference <= SAME else 'DIFFER BY'} {difference:.0e} at most; "


def measure(*, is_quick: bool) -> list[Figure]:
    figures = []
    with workplace() as place:
        for name, settings in STRATEGIES.items():
            plan = place.plan("medium", f"train.steps={QUICK_STEPS if is_quick else STEPS}", *settings)
            measured = inside.run(plan, KEEPER, place.folder / "zygote")
            note = alike(measured["difference"])
            note += f"processor time {measured['work']['ours'] / measured['work']['theirs']:.3f}"
            figures.append(paired(f"{name} : by hand", measured["ours"], measured["theirs"], TARGET, note))
    return figures
