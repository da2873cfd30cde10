"""Pictures that nobody took, to measure with: as numbers in a file that is mapped into memory, and as JPEG files."""

from pathlib import Path
from typing import Any

NUM_HELD_OUT = 32
NUM_CLASSES = 10
FILE = "images.npy"


def draw(folder: Path, num: int, size: int) -> None:
    """`num` pictures of `size` pixels in height and width, as float32 [num, 3, size, size] of unit variance."""
    import numpy as np

    folder.mkdir()
    random = np.random.default_rng(0)
    images = np.lib.format.open_memmap(folder / FILE, "w+", np.float32, (num, 3, size, size))
    for start in range(0, num, 64):
        random.standard_normal(out=images[start : start + 64], dtype=np.float32)
    images.flush()


def draw_files(folder: Path, num_classes: int, num_each: int) -> None:
    """JPEG files of photographs' size, in a folder for each class."""
    from tests.benchmarks.data import draw_pictures

    for number in range(num_classes):
        (folder / str(number)).mkdir(parents=True)
        draw_pictures(folder / str(number), num_each)


class Opened:
    """What `draw` drew, with labels."""

    fingerprint = "drawn"

    def __init__(self, images: Any) -> None:
        import numpy as np

        labels = np.arange(len(images), dtype=np.int64) % NUM_CLASSES
        self.train = {"images": images[NUM_HELD_OUT:], "labels": labels[NUM_HELD_OUT:]}
        self.held_out = {"images": images[:NUM_HELD_OUT], "labels": labels[:NUM_HELD_OUT]}

    def to_pixels(self, images: Any) -> Any:
        """For people to look at, as dtrain's own pictures do it."""
        return (images.transpose(0, 2, 3, 1) * 64 + 128).clip(0, 255).astype("uint8")


def open_drawn(folder: str) -> Opened:
    """The pictures in `folder`: what a job's `data.open` names."""
    import numpy as np

    return Opened(np.load(Path(folder) / FILE, mmap_mode="r"))
