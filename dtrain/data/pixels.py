"""Pictures as a source of samples, wherever they come from: pixels in a memory map, or decoded on every reading."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dtrain.data.augmentation import Augmentation, flip_and_crop, parts
from dtrain.data.holding import absent_from, hold_out, shuffled
from dtrain.data.pictures import OnDisk, fit
from dtrain.data.prepared import read_meta
from dtrain.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from dtrain.data.pictures import Found, Pictures

HELD_OUT = 0.2
LARGE = 128
"""Pictures of this size in pixels are decoded on reading, unless told otherwise."""
_CHEAP_PIXELS = 32 * 32 * 3
_BLOCK = 1024
_NEIGHBOUR_WORK = 10**9


@dataclass(frozen=True)
class Look:
    """How pictures are to look; the fields are what the options of the same names say."""

    size: int
    channels: Literal[1, 3]
    center_crop: float
    decode: Literal["once", "on_read"]
    held_out: float | None
    augment: Augmentation
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    def check(self) -> None:
        """Raises `InputError` for what does not go together."""
        for name, given in (("mean", self.mean), ("std", self.std)):
            if given is not None and len(given) not in (1, self.channels):
                raise InputError(
                    f"data.{name} has {len(given)} numbers; write one, or one for each of {self.channels} channels"
                )
        if self.augment.crop_padding > self.size:
            raise InputError(
                f"data.augment.crop_padding {self.augment.crop_padding} is more than the size of a picture,"
                f" {self.size}; write a smaller one"
            )

    @property
    def is_cheap(self) -> bool:
        """Whether a batch costs less than a millisecond."""
        is_small = self.size**2 * self.channels <= _CHEAP_PIXELS
        return self.decode == "once" and self.augment.resized_crop == 1.0 and is_small

    def settings(self) -> list[Any]:
        """What changes what is kept of the pictures."""
        return [self.size, self.channels, self.center_crop, self.decode, self.held_out]


class ImageSource:
    """Samples are pictures with their labels."""

    def __init__(self, look: Look, folder: Path, reopen: "Callable[[str, np.ndarray], Pictures]") -> None:
        """`reopen(part, labels)` gives the pictures of a part again, where they are decoded on reading."""
        import numpy as np

        meta = read_meta(folder)
        self.fingerprint: str = folder.name
        """Changes with the pictures, how they are scaled and which are held out."""
        self.classes: tuple[str, ...] = tuple(meta["classes"])
        """What the labels stand for."""
        self._yardsticks: dict[str, float] = meta["accuracy"]
        given = [(look.mean, meta["mean"]), (look.std, meta["std"])]
        mean, std = (_per_channel(chosen or measured, look.channels) for chosen, measured in given)
        self._scaling = Scaling(mean, std)
        both: list[Kept | Decoded] = []
        for part, augment in (("train", look.augment), ("held_out", Augmentation())):
            labels = np.fromfile(folder / f"{part}_labels.bin", dtype=np.int64)
            if look.decode == "once":
                shape = (len(labels), look.size, look.size, look.channels)
                pixels = np.asarray(np.memmap(folder / f"{part}.bin", dtype=np.uint8, mode="r", shape=shape))
                both.append(Kept(pixels, labels, augment, self._scaling.normalised))
            else:
                both.append(Decoded(reopen(part, labels), look, augment, self._scaling.normalised))
        self.train, self.held_out = both

    def yardsticks(self) -> dict[str, dict[str, float]]:
        """Accuracy of always naming the most frequent class, and of the nearest neighbour where that is computed."""
        return {"accuracy": dict(self._yardsticks)}

    def to_pixels(self, images: "np.ndarray") -> "np.ndarray":
        """Pictures to look at, uint8 [n, h, w, c], for images as in a batch, float32 [n, c, h, w]."""
        return self._scaling.to_pixels(images)


class Scaling:
    """From pixels to the numbers that models learn from, and back; `mean` and `std` are fp32, one a channel."""

    def __init__(self, mean: "np.ndarray", std: "np.ndarray") -> None:
        self._scale, self._shift = (1 / (255 * std))[:, None, None], (-mean / std)[:, None, None]

    def to_pixels(self, images: "np.ndarray") -> "np.ndarray":
        """float32 [n, c, h, w] to uint8 [n, h, w, c]."""
        import numpy as np

        return np.clip(np.rint((images - self._shift) / self._scale), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)

    def normalised(self, pixels: "np.ndarray") -> "np.ndarray":
        """uint8 [b, h, w, c] to float32 [b, c, h, w]."""
        import numpy as np

        # Moving the channels is quickest while they are bytes.
        first = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        images = np.multiply(first, self._scale, dtype=np.float32)
        images += self._shift
        return images


class Kept:
    """Pictures whose pixels are in a memory map."""

    def __init__(self, pixels: "np.ndarray", labels: "np.ndarray", augment: Augmentation, normalised: Any) -> None:
        self.num_samples = len(labels)
        self._pixels, self._labels, self._augment, self._normalised = pixels, labels, augment, normalised

    def batch(self, indices: "np.ndarray", draws: "np.ndarray") -> "dict[str, np.ndarray]":
        """images, float32 [b, c, h, w], and labels, int64 [b]."""
        import numpy as np

        pixels = self._pixels[indices]
        if self._augment.resized_crop < 1.0:
            from PIL import Image

            size, grey = pixels.shape[1], pixels.shape[3] == 1
            boxes = parts(self._augment.resized_crop, np.full((len(indices), 2), size), draws)
            cut = (Image.fromarray(picture[..., 0] if grey else picture) for picture in pixels)
            pixels = np.stack([fit(one, size, tuple(box)) for one, box in zip(cut, boxes, strict=True)])
        pixels = flip_and_crop(pixels, self._augment, draws)
        return {"images": self._normalised(pixels), "labels": self._labels[indices]}


class Decoded:
    """Pictures that are decoded whenever they are read."""

    def __init__(self, pictures: "Pictures", look: Look, augment: Augmentation, normalised: Any) -> None:
        self.num_samples = len(pictures.labels)
        self._pictures, self._size, self._channels = pictures, look.size, look.channels
        self._center_crop, self._augment, self._normalised = look.center_crop, augment, normalised

    def batch(self, indices: "np.ndarray", draws: "np.ndarray") -> "dict[str, np.ndarray]":
        """images, float32 [b, c, h, w], and labels, int64 [b]. Raises `TrainingError` for a picture that is broken."""
        import numpy as np

        if self._augment.resized_crop < 1.0:
            cut = []
            for index, draw in zip(indices, draws[:, None], strict=True):
                picture = self._pictures.decoded(index, self._channels)
                box = parts(self._augment.resized_crop, np.array([picture.size]), draw)[0]
                cut.append(fit(picture, self._size, tuple(box)))
            pixels = np.stack(cut)
        else:
            pixels = self._pictures.fitted(indices, self._size, self._channels, self._center_crop)
        pixels = flip_and_crop(pixels, self._augment, draws)
        return {"images": self._normalised(pixels), "labels": self._pictures.labels[indices]}


def convert(look: Look, found: "Found", where: str, folder: Path) -> dict[str, Any]:
    """Fill `folder` with what is found in `where`, as `prepared` asks for: pixels, or which pictures to decode.

    Raises `InputError` for a picture that cannot be decoded, and where nothing is left to train on or to hold out.
    """
    import numpy as np

    sides = _sides(look, found, where)
    fitted = partial(_fitted, look)
    counts = np.zeros((look.channels, 256), dtype=np.int64)
    for part, (chosen, numbers) in sides.items():
        chosen.labels[numbers].tofile(folder / f"{part}_labels.bin")
        if look.decode == "on_read":
            assert isinstance(chosen, OnDisk), "pictures in memory are kept as pixels"
            chosen.note(folder, part, numbers)
            sampled = numbers[shuffled(len(numbers))[:_BLOCK]] if part == "train" else []
            blocks = fitted(chosen, sampled)
        else:
            blocks = fitted(chosen, numbers)
        with (folder / f"{part}.bin").open("wb") as out:
            for block in blocks:
                if look.decode == "once":
                    out.write(block.tobytes())
                if part == "train":
                    for channel in range(look.channels):
                        counts[channel] += np.bincount(block[..., channel].ravel(), minlength=256)
        if look.decode == "on_read":
            (folder / f"{part}.bin").unlink()
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum(axis=1)
    variance = counts @ values**2 / counts.sum(axis=1) - mean**2
    return {
        "classes": found.classes,
        "mean": [round(float(value), 6) for value in mean],
        "std": [round(max(float(value), 255**-2) ** 0.5, 6) for value in variance],
        "accuracy": _yardsticks(look, folder),
    }


def _sides(look: Look, found: "Found", where: str) -> "dict[str, tuple[Pictures, np.ndarray]]":
    """What is trained on and what is held out: pictures, and which of them in which order."""
    import numpy as np

    train, held_out = found.train, found.held_out
    if held_out is None:
        held = hold_out(train.labels, train.contents(look.decode == "on_read"), look.held_out or HELD_OUT)
        return {
            "train": (train, np.flatnonzero(~held)),
            "held_out": (train, np.flatnonzero(held)[shuffled(int(held.sum()))]),
        }
    if look.held_out is not None:
        raise InputError("data.held_out: the folder says itself which pictures are held out; leave it out")
    chosen = np.arange(len(train.labels))
    if look.decode == "once":
        chosen = np.flatnonzero(absent_from(train.contents(), held_out.contents()))
        if num_equal := len(train.labels) - len(chosen):
            logging.getLogger(__name__).warning(
                "%d pictures of %s are also held out, and are not trained on", num_equal, where
            )
    for part, labels in (("train on", train.labels[chosen]), ("hold out", held_out.labels)):
        if not len(labels):
            raise InputError(f"data.source: {where} has no picture to {part}; put some there")
    return {"train": (train, chosen), "held_out": (held_out, shuffled(len(held_out.labels)))}


def _fitted(look: Look, chosen: "Pictures", numbers: "Sequence[int] | np.ndarray") -> "Iterator[np.ndarray]":
    """The chosen pictures at their size, in blocks; decoded by as many threads as there are cores."""
    import numpy as np

    one = partial(chosen.fitted, size=look.size, channels=look.channels, center_crop=look.center_crop)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in range(0, len(numbers), _BLOCK):
            block = numbers[start : start + _BLOCK]
            if chosen.must_be_decoded:
                yield np.concatenate(list(threads.map(one, ([number] for number in block))))
            else:
                yield one(block)


def _yardsticks(look: Look, folder: Path) -> dict[str, float]:
    import numpy as np

    labels, held = (np.fromfile(folder / f"{part}_labels.bin", dtype=np.int64) for part in ("train", "held_out"))
    known = {"always the most frequent class": float((held == np.bincount(labels).argmax()).mean())}
    if look.decode == "once":
        pixels, others = (
            np.fromfile(folder / f"{part}.bin", dtype=np.uint8).reshape(len(of), -1)
            for part, of in (("train", labels), ("held_out", held))
        )
        if len(others) * pixels.size <= _NEIGHBOUR_WORK:
            pixels, others = pixels.astype(np.float32), others.astype(np.float32)
            # |a - b|^2 without |b|^2, which is the same for all a.
            distances = (pixels**2).sum(axis=1) - 2 * others @ pixels.T
            known["nearest neighbour"] = float((labels[distances.argmin(axis=1)] == held).mean())
    return known


def _per_channel(values: Sequence[float], channels: int) -> "np.ndarray":
    import numpy as np

    return np.broadcast_to(np.array(values, dtype=np.float32), (channels,))
