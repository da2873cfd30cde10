"""Pictures with labels, in memory or in files: what they are, and how they are decoded and fitted.

A set is given as one or two `Pictures`: to train on, and held out where the set says which.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, runtime_checkable

from dtrain.data.kept import sha256
from dtrain.errors import DtrainError, InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


class Pictures(Protocol):
    """Pictures in an order, each with a label below the number of classes."""

    labels: "np.ndarray"
    """int64 [n]"""
    must_be_decoded: bool
    """Whether each takes so long that several are best decoded at once."""

    def contents(self, quickly: bool = False) -> list[str]:
        """A hash for each picture, the same for equal ones; `quickly` may look only at those that could be equal."""

    def decoded(self, number: int, channels: int) -> "Image":
        """One of them as it was found, in 1 or 3 channels. Raises for one that cannot be decoded."""

    def fitted(
        self, numbers: "Sequence[int] | np.ndarray", size: int, channels: int, center_crop: float
    ) -> "np.ndarray":
        """Some of them at the size asked for: uint8 [b, size, size, channels]. Raises what `decoded` raises."""


@runtime_checkable
class OnDisk(Pictures, Protocol):
    """Pictures that can be decoded again whenever they are read."""

    def note(self, folder: Path, part: str, numbers: "np.ndarray") -> None:
        """Write down in `folder` which pictures a part has, to decode them later."""


@dataclass(frozen=True)
class Found:
    """A set of pictures; `held_out` is None when the set does not say what to hold out."""

    classes: tuple[str, ...]
    train: Pictures
    held_out: Pictures | None = None


class Pixels:
    """Pictures in memory: uint8 [n, h, w, c]."""

    must_be_decoded = False

    def __init__(self, pixels: "np.ndarray", labels: "np.ndarray") -> None:
        self._pixels = pixels
        self.labels = labels

    def contents(self, quickly: bool = False) -> list[str]:
        return [hashlib.sha256(picture.tobytes()).hexdigest() for picture in self._pixels]

    def decoded(self, number: int, channels: int) -> "Image":
        from PIL import Image

        picture = self._pixels[number]
        return in_channels(Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture), channels)

    def fitted(
        self, numbers: "Sequence[int] | np.ndarray", size: int, channels: int, center_crop: float
    ) -> "np.ndarray":
        if self._pixels.shape[1:] == (size, size, channels) and center_crop == 1.0:
            return self._pixels[numbers]
        return fit_all((self.decoded(number, channels) for number in numbers), size, center_crop)


class Files:
    """Pictures in files `names` under `root`, which are decoded when they are asked for.

    A file that cannot be decoded raises `error`, which is another class while training than while preparing.
    """

    must_be_decoded = True

    def __init__(
        self, root: str, names: Sequence[str], labels: "np.ndarray", error: type[DtrainError] = InputError
    ) -> None:
        self.root, self.names, self.labels = root, names, labels
        self._error = error

    def contents(self, quickly: bool = False) -> list[str]:
        paths = [os.path.join(self.root, name) for name in self.names]
        if not quickly:
            return [sha256(path) for path in paths]
        sizes = [os.path.getsize(path) for path in paths]
        count = Counter(sizes)
        return [
            sha256(path) if count[size] > 1 else hashlib.sha256(os.fsencode(name)).hexdigest()
            for path, name, size in zip(paths, self.names, sizes, strict=True)
        ]

    def decoded(self, number: int, channels: int) -> "Image":
        path = os.path.join(self.root, self.names[number])
        return decode(path, path, channels, self._error)

    def fitted(
        self, numbers: "Sequence[int] | np.ndarray", size: int, channels: int, center_crop: float
    ) -> "np.ndarray":
        return fit_all((self.decoded(number, channels) for number in numbers), size, center_crop)

    def note(self, folder: Path, part: str, numbers: "np.ndarray") -> None:
        Names.write(folder, part, [self.names[number] for number in numbers])


class Names(Sequence[str]):
    """Names of files in a memory map: millions of them cost a worker nothing."""

    def __init__(self, folder: Path, part: str) -> None:
        import numpy as np

        self._ends = np.fromfile(folder / f"{part}_ends.bin", dtype=np.int64)
        self._bytes = np.memmap(folder / f"{part}_names.bin", dtype=np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: Any) -> Any:
        start = self._ends[number - 1] if number else 0
        return os.fsdecode(self._bytes[start : self._ends[number]].tobytes())

    @staticmethod
    def write(folder: Path, part: str, names: Sequence[str]) -> None:
        """Write what `Names(folder, part)` reads."""
        import numpy as np

        coded = [os.fsencode(name) for name in names]
        (folder / f"{part}_names.bin").write_bytes(b"".join(coded))
        np.cumsum([len(name) for name in coded]).astype(np.int64).tofile(folder / f"{part}_ends.bin")


def decode(file: "str | IO[bytes]", name: str, channels: int, error: type[DtrainError] = InputError) -> "Image":
    """The picture in a file, in 1 or 3 channels. Raises `error`, with its `name`, when it cannot be decoded."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            if picture.mode.startswith(("I", "F")):
                raise error(f"data.source: {name} has more than 8 bits a channel; convert it to 8, or take it out")
            return in_channels(picture, channels)
    except DtrainError:
        raise
    except Exception as reason:  # PIL's decoders raise many kinds
        raise error(
            f"data.source: the picture {name} cannot be decoded ({reason}); replace it or take it out"
        ) from reason


def in_channels(picture: "Image", channels: int) -> "Image":
    """In grey (1 channel) or RGB (3)."""
    return picture.convert("L" if channels == 1 else "RGB")


def center(picture: "Image", share: float) -> tuple[float, float, float, float]:
    """The square in the middle that has `share` of the shorter side: (left, top, right, bottom)."""
    width, height = picture.size
    side = min(width, height) * share
    return ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)


def fit(picture: "Image", size: int, box: tuple[float, float, float, float]) -> "np.ndarray":
    """The part `box` of a picture at the size asked for: uint8 [size, size, c]."""
    import numpy as np
    from PIL import Image

    if picture.size != (size, size) or list(box) != [0, 0, size, size]:
        picture = picture.resize((size, size), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def fit_all(pictures: "Iterable[Image]", size: int, center_crop: float) -> "np.ndarray":
    """The middles of pictures at the size asked for: uint8 [b, size, size, c]."""
    import numpy as np

    return np.stack([fit(picture, size, center(picture, center_crop)) for picture in pictures])
