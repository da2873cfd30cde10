"""DCGAN on pictures of 64 pixels, over a hand-written loop of the same two networks."""

from tests.benchmarks import on_device, pictures
from tests.benchmarks.harness import Figure, paired
from tests.benchmarks.running import workplace

TARGET = 1.03
STEPS, QUICK_STEPS = 1000, 60
TINY = ("model.generator_width=4", "model.discriminator_width=4", "batch.global=8")
NUM_READY = 4096


def measure(*, is_quick: bool) -> list[Figure]:
    tiny = on_device.is_tiny(is_quick=is_quick)
    size, num_ready = (16, 160) if tiny else (64, NUM_READY)
    settings = [f"train.steps={QUICK_STEPS if tiny else 300 if is_quick else STEPS}", *(TINY if tiny else ())]
    settings += [f"data.shape.height={size}", f"data.shape.width={size}"]
    with workplace() as place:
        pictures.draw(place.folder / "ready", num_ready, size)
        folder = f"data.options.folder={place.folder / 'ready'}"
        measured = on_device.measure(place, "gpu_dcgan", folder, *settings, tiny=tiny)
    # Noise is each side's own, so they do not learn quite the same.
    note = measured.says("steps/s", 1, is_same=False)
    return [paired("dtrain : by hand, DCGAN", measured.ours, measured.theirs, TARGET, note)]
