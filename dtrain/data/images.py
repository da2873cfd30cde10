"""Pictures with labels: decoded once into memory-mapped pixels, or on every reading where they are large."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from dtrain import component
from dtrain.data import DataShape, pictures
from dtrain.data.augmentation import Augmentation, flip_and_crop, parts
from dtrain.data.holding import absent_from, hold_out, shuffled
from dtrain.data.kept import find, keep, sha256
from dtrain.data.prepared import read_meta
from dtrain.errors import InputError, TrainingError

if TYPE_CHECKING:
    import numpy as np

    from dtrain.data.pictures import Found, Pictures

FORMAT = 1
"""Raise when the same pictures would be prepared differently."""
DIGITS = "digits"
_LARGE = 128
_CHEAP_PIXELS = 32 * 32 * 3
_HELD_OUT = 0.2
_BLOCK = 1024
_NEIGHBOUR_WORK = 10**9
Format = Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "folders"]


@dataclass(frozen=True)
class _Known:
    num_classes: int
    size: int
    channels: Literal[1, 3]
    names: tuple[str, ...] = ()


_KNOWN = {
    "digits": _Known(10, 8, 1),
    "mnist": _Known(10, 28, 1, tuple("0123456789")),
    "fashion_mnist": _Known(
        10,
        28,
        1,
        ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    "cifar10": _Known(10, 32, 3),
    "cifar100": _Known(100, 32, 3),
}


class Options(component.Options):
    """Pictures with labels: real handwritten digits, MNIST and CIFAR files, or folders of classes."""

    source: str = DIGITS
    """`digits`, which scikit-learn brings along, or your own: a folder with a folder of pictures for each class
    (or with such folders in `train` and `val`), or with the files of MNIST or CIFAR."""
    format: Format | None = None
    """What `source` holds: by default `digits` for digits, else `folders`; `mnist` is its IDX files, packed or not,
    `cifar10` and `cifar100` their binary versions."""
    num_classes: Annotated[int, Field(ge=2, le=2**20)] | None = None
    """Number of labels; known for all but folders."""
    size: Annotated[int, Field(ge=4, le=2048)] | None = None
    """Height and width of a picture in pixels, to which others are scaled; known for all but folders."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colours; by default as the set is, 3 for folders."""
    center_crop: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the shorter side that is kept, in the middle; 0.875 is usual for ImageNet."""
    augment: Augmentation = Augmentation()
    """What is done to training pictures by chance."""
    mean: tuple[float, ...] | None = None
    """Subtracted from each channel (black is 0, white 1); by default its mean over the training pictures."""
    std: Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], Field(min_length=1)] | None = None
    """What each channel is divided by then; by default its standard deviation. With mean and std [0.5], pixels run
    from -1 to 1."""
    decode: Literal["once", "on_read"] | None = None
    """Keep decoded pixels in the cache, or decode files whenever they are read; by default once, but on_read for
    folders from size 128 on."""
    held_out: Annotated[float, Field(gt=0.0, le=0.5)] | None = None
    """Share of each class that is never trained on; 0.2 by default. Only where the set does not say itself."""


def describe(options: Options) -> DataShape:
    """Classes, channels and size, without reading a picture. Raises `InputError` where an option is needed for it."""
    options = _complete(options)
    assert options.size and options.channels and options.num_classes
    return DataShape(
        "images",
        num_classes=options.num_classes,
        channels=options.channels,
        height=options.size,
        width=options.size,
        is_cheap=options.decode == "once"
        and options.augment.resized_crop == 1.0
        and options.size**2 * options.channels <= _CHEAP_PIXELS,
    )


def resolve(options: Options, folder: Path) -> Options:
    """All options given, `source` taken from `folder`. Raises `InputError` for what does not go together."""
    options = _complete(options)
    if options.format == DIGITS:
        return options
    return options.model_copy(update={"source": os.path.abspath(folder / Path(options.source).expanduser())})


def prepare(options: Options, cache: Path) -> None:
    """Decode the pictures into `cache`, or list them there when they are decoded on reading, unless it was done before.

    Raises `InputError` for a picture that cannot be decoded and for anything else that is not as the options say,
    `StorageError` when the cache cannot be written.
    """
    _prepare(_complete(options), cache)


def open(options: Options, cache: Path) -> "ImageSource":  # noqa: A001
    """The prepared pictures, prepared now when they were not yet. Raises what `prepare` raises."""
    options = _complete(options)
    folder = find(cache, "images", _settings(options), _Set(options).watched)
    return ImageSource(options, folder or _prepare(options, cache))


class ImageSource:
    """Samples are pictures with their labels."""

    def __init__(self, options: Options, folder: Path) -> None:
        import numpy as np

        assert options.size and options.channels
        meta = read_meta(folder)
        self.fingerprint: str = folder.name
        """Changes with the pictures, how they are scaled and which are held out."""
        self.classes: tuple[str, ...] = tuple(meta["classes"])
        """What the labels stand for."""
        self._yardsticks: dict[str, float] = meta["accuracy"]
        given = [(options.mean, meta["mean"]), (options.std, meta["std"])]
        mean, std = (_per_channel(chosen or measured, options.channels) for chosen, measured in given)
        self._scale, self._shift = 1 / (255 * std), -mean / std
        both: list[Kept | Decoded] = []
        for part, augment in (("train", options.augment), ("held_out", Augmentation())):
            labels = np.fromfile(folder / f"{part}_labels.bin", dtype=np.int64)
            if options.decode == "once":
                shape = (len(labels), options.size, options.size, options.channels)
                pixels = np.asarray(np.memmap(folder / f"{part}.bin", dtype=np.uint8, mode="r", shape=shape))
                both.append(Kept(pixels, labels, augment, self._normalised))
            else:
                names = _Names(folder, part)
                root = os.path.join(options.source, meta["roots"][part])
                files = pictures.Files(root, names, labels, TrainingError)
                both.append(Decoded(files, options, augment, self._normalised))
        self.train, self.held_out = both

    def yardsticks(self) -> dict[str, dict[str, float]]:
        """Accuracy of always naming the most frequent class, and of the nearest neighbour where that is computed."""
        return {"accuracy": dict(self._yardsticks)}

    def to_pixels(self, images: "np.ndarray") -> "np.ndarray":
        """Pictures to look at, uint8 [n, h, w, c], for images as in a batch, float32 [n, c, h, w]."""
        import numpy as np

        scale, shift = self._scale[:, None, None], self._shift[:, None, None]
        return np.clip(np.rint((images - shift) / scale), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)

    def _normalised(self, pixels: "np.ndarray") -> "np.ndarray":
        """uint8 [b, h, w, c] to float32 [b, c, h, w]."""
        import numpy as np

        # Moving the channels is quickest while they are bytes.
        first = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        images = np.multiply(first, self._scale[:, None, None], dtype=np.float32)
        images += self._shift[:, None, None]
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
            pixels = np.stack([pictures.fit(one, size, tuple(box)) for one, box in zip(cut, boxes, strict=True)])
        pixels = flip_and_crop(pixels, self._augment, draws)
        return {"images": self._normalised(pixels), "labels": self._labels[indices]}


class Decoded:
    """Pictures that are decoded from their files whenever they are read."""

    def __init__(self, files: pictures.Files, options: Options, augment: Augmentation, normalised: Any) -> None:
        assert options.size and options.channels
        self.num_samples = len(files.labels)
        self._files, self._size, self._channels = files, options.size, options.channels
        self._center_crop, self._augment, self._normalised = options.center_crop, augment, normalised

    def batch(self, indices: "np.ndarray", draws: "np.ndarray") -> "dict[str, np.ndarray]":
        """images, float32 [b, c, h, w], and labels, int64 [b]. Raises `TrainingError` for a picture that is broken."""
        import numpy as np

        if self._augment.resized_crop < 1.0:
            cut = []
            for index, draw in zip(indices, draws[:, None], strict=True):
                picture = self._files.decoded(index, self._channels)
                box = parts(self._augment.resized_crop, np.array([picture.size]), draw)[0]
                cut.append(pictures.fit(picture, self._size, tuple(box)))
            pixels = np.stack(cut)
        else:
            pixels = self._files.fitted(indices, self._size, self._channels, self._center_crop)
        pixels = flip_and_crop(pixels, self._augment, draws)
        return {"images": self._normalised(pixels), "labels": self._files.labels[indices]}


class _Names(Sequence[str]):
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
        import numpy as np

        coded = [os.fsencode(name) for name in names]
        (folder / f"{part}_names.bin").write_bytes(b"".join(coded))
        np.cumsum([len(name) for name in coded]).astype(np.int64).tofile(folder / f"{part}_ends.bin")


class _Set:
    """The files behind complete options: which there are, and what is in them."""

    def __init__(self, options: Options) -> None:
        assert options.num_classes
        self._options, self._num_classes = options, options.num_classes
        self._tree: pictures.Tree | None = None
        if options.format == "digits":
            self._files = {"all": [pictures.digits_file()]}
        elif options.format == "folders":
            self._tree = pictures.tree(options.source, options.num_classes)
            self._files = {}
        elif options.format in ("cifar10", "cifar100"):
            self._files = pictures.cifar_files(options.source, options.format)
        else:
            self._files = pictures.idx_files(options.source)

    @property
    def watched(self) -> list[str]:
        """Files or folders that change when pictures come or go."""
        return self._tree.folders if self._tree else [path for paths in self._files.values() for path in paths]

    def paths(self) -> list[str]:
        """The files that the pictures are in."""
        if self._tree is None:
            return self.watched
        return [os.path.join(part.root, name) for part in self._parts() for name in part.names]

    def read(self) -> "Found":
        """The pictures; those in folders are not decoded yet."""
        kind, count = self._options.format, self._num_classes
        if kind == "digits":
            return pictures.digits(self._files["all"][0])
        if kind == "folders":
            assert self._tree
            return pictures.Found(self._tree.classes, *self._parts())
        if kind in ("cifar10", "cifar100"):
            return pictures.cifar(self._files, kind, count)
        names = _KNOWN[kind or ""].names
        return pictures.idx(self._files, names if len(names) == count else tuple(map(str, range(count))))

    def _parts(self) -> list[pictures.Files]:
        assert self._tree
        return [
            pictures.Files(root, *pictures.listed(root, self._tree.classes))
            for root in (self._tree.train, self._tree.held_out)
            if root is not None
        ]


def _complete(options: Options) -> Options:
    """The options with nothing left open. Raises `InputError` for what does not go together."""
    kind = options.format or (DIGITS if options.source == DIGITS else "folders")
    if (kind == DIGITS) != (options.source == DIGITS):
        raise InputError(
            f"data.format {kind} and data.source {options.source!r} do not go together:"
            " digits come from no folder; leave data.format out, or name a folder in data.source"
        )
    known = _KNOWN.get(kind)
    if known is None:
        for name, example in (("num_classes", "num_classes: 1000"), ("size", "size: 224")):
            if getattr(options, name) is None:
                raise InputError(
                    f"data.{name} must be given for folders of pictures, so that a job can be planned where the"
                    f" pictures are not; write it under data, e.g. `{example}`"
                )
    elif options.num_classes not in (None, known.num_classes) and kind not in ("mnist", "fashion_mnist"):
        raise InputError(f"data.num_classes is {options.num_classes}, and {kind} has {known.num_classes}; leave it out")
    if options.decode == "on_read" and kind != "folders":
        raise InputError(f"data.decode: on_read is for folders of pictures, and not for {kind}; leave it out")
    if options.held_out is not None and kind not in ("folders", DIGITS):
        raise InputError(f"data.held_out: {kind} says itself which pictures are held out; leave it out")
    size = options.size or (known.size if known else 0)
    channels = options.channels or (known.channels if known else 3)
    for name in ("mean", "std"):
        given = getattr(options, name)
        if given is not None and len(given) not in (1, channels):
            raise InputError(f"data.{name} has {len(given)} numbers; write one, or one for each of {channels} channels")
    if options.augment.crop_padding > size:
        raise InputError(
            f"data.augment.crop_padding {options.augment.crop_padding} is more than the size of a picture, {size};"
            " write a smaller one"
        )
    return options.model_copy(
        update={
            "format": kind,
            "num_classes": options.num_classes or (known.num_classes if known else None),
            "size": size,
            "channels": channels,
            "decode": options.decode or ("on_read" if kind == "folders" and size >= _LARGE else "once"),
        }
    )


def _settings(options: Options) -> list[Any]:
    chosen = {"format", "num_classes", "size", "channels", "center_crop", "decode", "held_out"}
    return [FORMAT, options.model_dump(include=chosen)]


def _prepare(options: Options, cache: Path) -> Path:
    found = _Set(options)
    paths = found.paths()
    names = [os.path.relpath(path, options.source) for path in paths] if options.format == "folders" else None

    def contents() -> Any:
        if options.decode == "once":
            return [names, [sha256(path) for path in paths]]
        return [names, [os.path.getsize(path) for path in paths]]

    convert = partial(_convert, options, found)
    return keep(cache, "images", _settings(options), paths, contents, convert, found.watched)


def _convert(options: Options, found_set: _Set, folder: Path) -> dict[str, Any]:
    import numpy as np

    assert options.size and options.channels
    found = found_set.read()
    sides = _sides(options, found)
    fitted = partial(_fitted, options)
    counts = np.zeros((options.channels, 256), dtype=np.int64)
    for part, (chosen, numbers) in sides.items():
        chosen.labels[numbers].tofile(folder / f"{part}_labels.bin")
        if isinstance(chosen, pictures.Files) and options.decode == "on_read":
            _Names.write(folder, part, [chosen.names[number] for number in numbers])
            sampled = numbers[shuffled(len(numbers))[:_BLOCK]] if part == "train" else []
            blocks = fitted(chosen, sampled)
        else:
            blocks = fitted(chosen, numbers)
        with (folder / f"{part}.bin").open("wb") as out:
            for block in blocks:
                if options.decode == "once":
                    out.write(block.tobytes())
                if part == "train":
                    for channel in range(options.channels):
                        counts[channel] += np.bincount(block[..., channel].ravel(), minlength=256)
        if options.decode == "on_read":
            (folder / f"{part}.bin").unlink()
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum(axis=1)
    variance = counts @ values**2 / counts.sum(axis=1) - mean**2
    roots = {
        part: os.path.relpath(chosen.root, options.source)
        for part, (chosen, _) in sides.items()
        if isinstance(chosen, pictures.Files)
    }
    return {
        "format": FORMAT,
        "classes": found.classes,
        "roots": roots,
        "mean": [round(float(value), 6) for value in mean],
        "std": [round(max(float(value), 255**-2) ** 0.5, 6) for value in variance],
        "accuracy": _yardsticks(options, folder),
    }


def _sides(options: Options, found: "Found") -> "dict[str, tuple[Pictures, np.ndarray]]":
    """What is trained on and what is held out: pictures, and which of them in which order."""
    import numpy as np

    train, held_out = found.train, found.held_out
    if held_out is None:
        held = hold_out(train.labels, _contents(options, train), options.held_out or _HELD_OUT)
        return {
            "train": (train, np.flatnonzero(~held)),
            "held_out": (train, np.flatnonzero(held)[shuffled(int(held.sum()))]),
        }
    if options.held_out is not None:
        raise InputError("data.held_out: the folder says itself which pictures are held out; leave it out")
    chosen = np.arange(len(train.labels))
    if options.decode == "once":
        chosen = np.flatnonzero(absent_from(train.contents(), held_out.contents()))
        if num_equal := len(train.labels) - len(chosen):
            logging.getLogger(__name__).warning(
                "%d pictures of %s are also held out, and are not trained on", num_equal, options.source
            )
    for part, labels in (("train on", train.labels[chosen]), ("hold out", held_out.labels)):
        if not len(labels):
            raise InputError(f"data.source: {options.source} has no picture to {part}; put some there")
    return {"train": (train, chosen), "held_out": (held_out, shuffled(len(held_out.labels)))}


def _contents(options: Options, chosen: "Pictures") -> list[str]:
    """Equal for equal pictures. Of large ones only those of equal size are read."""
    if options.decode == "once" or not isinstance(chosen, pictures.Files):
        return chosen.contents()
    paths = [os.path.join(chosen.root, name) for name in chosen.names]
    sizes = [os.path.getsize(path) for path in paths]
    count = Counter(sizes)
    return [
        sha256(path) if count[size] > 1 else hashlib.sha256(os.fsencode(name)).hexdigest()
        for path, name, size in zip(paths, chosen.names, sizes, strict=True)
    ]


def _fitted(options: Options, chosen: "Pictures", numbers: "Sequence[int] | np.ndarray") -> "Iterator[np.ndarray]":
    """The chosen pictures at their size, in blocks; files are decoded by as many threads as there are cores."""
    import numpy as np

    assert options.size and options.channels
    one = partial(chosen.fitted, size=options.size, channels=options.channels, center_crop=options.center_crop)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in range(0, len(numbers), _BLOCK):
            block = numbers[start : start + _BLOCK]
            if isinstance(chosen, pictures.Files):
                yield np.concatenate(list(threads.map(one, ([number] for number in block))))
            else:
                yield one(block)


def _yardsticks(options: Options, folder: Path) -> dict[str, float]:
    import numpy as np

    labels, held = (np.fromfile(folder / f"{part}_labels.bin", dtype=np.int64) for part in ("train", "held_out"))
    known = {"always the most frequent class": float((held == np.bincount(labels).argmax()).mean())}
    if options.decode == "once":
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
