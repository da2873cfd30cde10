"""Reading: loaders against torch's DataLoader with as many workers and the same decoding, seeking, and time waited.

Both sides read the same samples in the same order, in blocks that take turns in one process. Between blocks each side's
workers fill up what they keep ready, as many batches on both, so that neither gains from the other's turn.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import Figure, paired
from tests.benchmarks.running import workplace

WORKERS, PREFETCH, BATCH, SIZE = 2, 2, 32, 224
NUM_PICTURES = 256
FAR = 100_000_000
SEEK_MS = 50.0
WAITING_SHARE = 0.05
WARM_UP = 20


def measure(*, is_quick: bool) -> list[Figure]:
    blocks, batches, steps = (4, 8, 200) if is_quick else (12, 16, 2000)
    figures = []
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-data-") as folder:
        names = draw_pictures(Path(folder))
        for what, dataset in (("decoded JPEG", Jpegs(names)), ("ready numbers", Ready())):
            figures.append(against_torch(what, dataset, blocks, batches))
    figures += seeking(num=20 if is_quick else 100)
    figures.append(waiting(steps))
    return figures


# -- the same work for both -----------------------------------------------------------------------------------


class Jpegs:
    """Photograph-sized JPEG files, decoded, scaled and normalised: float32 [3, SIZE, SIZE]."""

    num_samples = 2**40

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def one(self, index: int) -> tuple[Any, int]:
        import numpy as np
        from PIL import Image

        with Image.open(self._names[index % len(self._names)]) as picture:
            pixels = np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        return (pixels.transpose(2, 0, 1).astype(np.float32) / 255 - 0.5) / 0.25, index % 10

    def batch(self, indices: Any, draws: Any) -> dict[str, Any]:
        import numpy as np

        images, labels = zip(*(self.one(int(index)) for index in indices), strict=True)
        return {"images": np.stack(images), "labels": np.array(labels)}


class Ready(Jpegs):
    """Nothing to decode: what is measured is how a batch gets from one process to another."""

    def __init__(self) -> None:
        import numpy as np

        self._pixels = np.random.default_rng(0).standard_normal((64, 3, SIZE, SIZE), dtype=np.float32)

    def one(self, index: int) -> tuple[Any, int]:
        return self._pixels[index % 64], index % 10


class Source:
    fingerprint = ""

    def __init__(self, dataset: Any) -> None:
        self.train = self.held_out = dataset

    def yardsticks(self) -> dict[str, dict[str, float]]:
        return {}


def draw_pictures(folder: Path, num: int = NUM_PICTURES) -> list[str]:
    """Files of about 500 x 375 pixels with coarse and fine structure, as photographs have."""
    import numpy as np
    from PIL import Image

    random, names = np.random.default_rng(0), []
    for number in range(num):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
        pixels = np.asarray(coarse) + random.normal(0, 12, (375, 500, 3))
        names.append(str(folder / f"{number}.jpg"))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(names[-1], quality=88)
    return names


# -- loaders against torch's ----------------------------------------------------------------------------------


def against_torch(what: str, dataset: Any, blocks: int, batches: int) -> Figure:
    import torch
    from torch.utils.data import DataLoader

    from dtrain.data.order import Order
    from dtrain.training.feed import Feed
    from dtrain.training.loading import Loaders

    order = Order(0, NUM_PICTURES, BATCH, BATCH, 1, 1, 0)
    loaders = Loaders(lambda: Source(dataset), WORKERS, PREFETCH)
    torch.set_num_threads(1)
    feed = Feed(Source(dataset), order, torch.device("cpu"), loaders)
    rival = iter(
        DataLoader(
            MapStyle(dataset),
            batch_sampler=Batches(order),
            num_workers=WORKERS,
            prefetch_factor=PREFETCH,
        )
    )
    steps = itertools.count()

    def ours() -> float:
        return touched(feed.micro_batch(next(steps), 0)["images"])

    def theirs() -> float:
        return touched(next(rival)[0])

    seconds: dict[Any, list[float]] = {ours: [], theirs: []}
    read: dict[Any, list[float]] = {ours: [], theirs: []}
    try:
        for block in range(blocks + 1):
            for side in (ours, theirs) if block % 2 else (theirs, ours):
                read[side].append(side())
                time.sleep(0.3)  # both sides begin a block with all that they keep ready
                started = time.perf_counter()
                read[side] += [side() for _ in range(batches)]
                if block:  # the first one warms up
                    seconds[side].append(time.perf_counter() - started)
    finally:
        loaders.close()
    per_s = BATCH * batches / statistics.median(seconds[ours])
    note = f"{per_s:.0f} samples/s, {'the same on both sides' if read[ours] == read[theirs] else 'OTHER SAMPLES'}"
    return paired(f"loaders : DataLoader, {WORKERS} workers, {what}", seconds[ours], seconds[theirs], 1.0, note)


def touched(images: Any) -> float:
    """A number from each sample, so that a batch was really there."""
    return float(images[:, 1, 2, 3].sum())


class MapStyle:
    """What torch's DataLoader reads."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return int(self._dataset.num_samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import torch

        image, label = self._dataset.one(index)
        return torch.from_numpy(image), label


class Batches:
    """The samples of one batch after the other, as dtrain orders them."""

    def __init__(self, order: Any) -> None:
        self._order = order

    def __iter__(self) -> Iterator[list[int]]:
        for step in itertools.count():
            yield [int(index) for index in self._order.micro_batch(step, 0)[0]]


# -- seeking and waiting --------------------------------------------------------------------------------------


def seeking(num: int) -> list[Figure]:
    """To samples around number 100,000,000, back and forth, in a corpus of two hundred million."""
    import torch

    from dtrain.data.order import Order
    from dtrain.data.windows import Windows
    from dtrain.training.feed import Feed
    from dtrain.training.loading import Loaders

    class Repeated:
        """Tokens that take no room, in windows of 256."""

        def __init__(self) -> None:
            import numpy as np

            self._windows = Windows(np.arange(257 * 256, dtype=np.uint16), 256)
            self.num_samples = 2 * FAR

        def batch(self, indices: Any, draws: Any) -> dict[str, Any]:
            return self._windows.batch(indices % 256, draws)

    figures = []
    order = Order(0, 2 * FAR, BATCH, BATCH, 1, 1, 0)
    for loaders in (None, Loaders(lambda: Source(Repeated()), WORKERS, PREFETCH)):
        feed = Feed(Source(Repeated()), order, torch.device("cpu"), loaders)
        taken = []
        for number in range(num):
            feed.micro_batch(number * 1000, 0)
            started = time.perf_counter()
            feed.micro_batch(FAR // BATCH + number * 1000, 0)  # blocks of the order that nobody has computed yet
            taken.append(1000 * (time.perf_counter() - started))
        if loaders is not None:
            loaders.close()
        how = "with loaders" if loaders else "without"
        figures.append(
            Figure(
                f"seek to sample 100,000,000, {how}: milliseconds",
                statistics.median(taken),
                SEEK_MS,
                low=min(taken),
                high=max(taken),
                num=num,
                note="from asking to the batch; least and most",
            )
        )
    return figures


def waiting(num_steps: int) -> Figure:
    """Share of a small job's steps (about two milliseconds) in which it waits for its text."""
    import torch

    from dtrain import component
    from dtrain.data import cache
    from dtrain.data.order import Order
    from dtrain.training.feed import Feed
    from dtrain.training.optim import build_optimizer

    with workplace() as place:
        plan: Any = place.plan("small")
    assert plan.train.loading.workers == 0
    data: Any = component.load("data", plan.data.name)
    data.prepare(plan.data, cache.folder())
    source = data.open(plan.data, cache.folder())
    model: Any = component.load("models", plan.model.name)
    task = model.build(plan.model, data.describe(plan.data), plan.train)
    optimizer = build_optimizer(plan.optimizer, ((n, p, 1.0) for n, p in task.parts["model"].named_parameters()))
    order = Order(0, source.train.num_samples, plan.batch.micro, plan.batch.micro, 1, 1, 0)
    feed = Feed(source, order, torch.device("cpu"))
    torch.set_num_threads(1)
    waited, whole = [], []
    for step in range(-WARM_UP, num_steps):
        started = time.perf_counter()
        batch = feed.micro_batch(step + WARM_UP, 0)
        read = time.perf_counter()
        task.loss("train", task.parts, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        waited.append(read - started)
        whole.append(time.perf_counter() - started)
    waited, whole = waited[WARM_UP:], whole[WARM_UP:]
    note = f"{1e6 * statistics.median(waited):.0f} us of {1e3 * statistics.median(whole):.2f} ms"
    share = sum(waited) / sum(whole)
    return Figure("share of a small step spent waiting for text", share, WAITING_SHARE, num=num_steps, note=note)
