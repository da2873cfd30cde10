"""Step time of each strategy on one GPU, over the smallest loop by hand with the same library, in bf16."""

from tests.benchmarks import on_device
from tests.benchmarks.harness import Figure, paired
from tests.benchmarks.running import workplace
from tests.benchmarks.strategies import STRATEGIES, TARGET

STEPS, QUICK_STEPS = 1500, 120
TINY = ("model.num_layers=2", "model.num_heads=2", "model.width=32", "data.sequence_length=32", "train.steps=60")


def measure(*, is_quick: bool) -> list[Figure]:
    tiny = on_device.is_tiny(is_quick=is_quick)
    figures = []
    with workplace() as place:
        for name, strategy in STRATEGIES.items():
            settings = [*strategy, "train.precision=bf16", f"train.steps={QUICK_STEPS if is_quick else STEPS}"]
            measured = on_device.measure(place, "medium", *settings, *(TINY if tiny else ()), tiny=tiny)
            note = measured.says("steps/s", 1)
            figures.append(paired(f"{name} : by hand, one GPU", measured.ours, measured.theirs, TARGET, note))
    return figures
