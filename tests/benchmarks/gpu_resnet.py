"""ResNet-50 on pictures of 224 pixels, over a hand-written loop whose pictures lie on the GPU.

dtrain reads them from the node's memory, once as ready numbers and once as JPEG files that its loaders decode, crop and
flip; the rival's cost nothing in either.
"""

from dtrain.machine import probe
from tests.benchmarks import on_device, pictures
from tests.benchmarks.harness import Figure, paired
from tests.benchmarks.running import workplace

TARGETS = {"ready numbers": 1 / 0.99, "decoded JPEG": 1.05}
STEPS, QUICK_STEPS, TINY_STEPS = 640, 250, 60
TINY = ("model.width=8", "batch.global=4")
NUM_READY, NUM_CLASSES, MAX_LOADERS = 1024, 4, 12


def measure(*, is_quick: bool) -> list[Figure]:
    tiny = on_device.is_tiny(is_quick=is_quick)
    size, num_ready = (32, 64) if tiny else (224, NUM_READY)
    steps = f"train.steps={TINY_STEPS if tiny else QUICK_STEPS if is_quick else STEPS}"
    figures = []
    with workplace() as place:
        pictures.draw(place.folder / "ready", num_ready, size)
        pictures.draw_files(place.folder / "files", NUM_CLASSES, 16 if tiny else 256)
        shape = (f"data.shape.height={size}", f"data.shape.width={size}")
        ready = (f"data.options.folder={place.folder / 'ready'}", *shape)
        source = f"{{name: images, source: {place.folder / 'files'}, num_classes: {NUM_CLASSES}, size: {size},"
        source += " augment: {horizontal_flip: true, resized_crop: 0.08}, decode: on_read}"
        loaders = min(MAX_LOADERS, max(1, probe().num_cores - 2))
        loading = f"train.loading={{workers: {1 if tiny else loaders}, prefetch: 1}}"
        files = (f"data={source}", loading)
        for what, settings in (("ready numbers", ready), ("decoded JPEG", files)):
            measured = on_device.measure(place, "gpu_resnet50", steps, *(TINY if tiny else ()), *settings, tiny=tiny)
            note = measured.says("images/s", measured.plan.batch.global_size, is_same=what == "ready numbers")
            note += f"; {measured.plan.train.loading.workers} loaders"
            figures.append(
                paired(f"dtrain : by hand, ResNet-50, {what}", measured.ours, measured.theirs, TARGETS[what], note)
            )
    return figures
