"""Pictures with labels: decoded once into memory-mapped pixels, or on every reading where they are large."""

import os
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta
from msgspec.structs import replace

from dtrain.data import DataShape, picture_sets, pictures
from dtrain.data.augmentation import Augmentation
from dtrain.data.kept import find, keep, sha256
from dtrain.data.pixels import LARGE, ImageSource, Look, convert
from dtrain.errors import InputError, TrainingError
from dtrain.settings import Float, PositiveFloat, Settings

if TYPE_CHECKING:
    import numpy as np

    from dtrain.data.pictures import Found

FORMAT = 1
"""Raise when the same pictures would be prepared differently."""
DIGITS = "digits"
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


class Options(Settings):
    """Pictures with labels: real handwritten digits, MNIST and CIFAR files, or folders of classes."""

    source: str = DIGITS
    """`digits`, which scikit-learn brings along, or your own: a folder with a folder of pictures for each class
    (or with such folders in `train` and `val`), or with the files of MNIST or CIFAR."""
    format: Format | None = None
    """What `source` holds: by default `digits` for digits, else `folders`; `mnist` is its IDX files, packed or not,
    `cifar10` and `cifar100` their binary versions."""
    num_classes: Annotated[int, Meta(ge=2, le=2**20)] | None = None
    """Number of labels; known for all but folders."""
    size: Annotated[int, Meta(ge=4, le=2048)] | None = None
    """Height and width of a picture in pixels, to which others are scaled; known for all but folders."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colours; by default as the set is, 3 for folders."""
    center_crop: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    """Share of the shorter side that is kept, in the middle; 0.875 is usual for ImageNet."""
    augment: Augmentation = Augmentation()
    """What is done to training pictures by chance."""
    mean: tuple[Float, ...] | None = None
    """Subtracted from each channel (black is 0, white 1); by default its mean over the training pictures."""
    std: Annotated[tuple[PositiveFloat, ...], Meta(min_length=1)] | None = None
    """What each channel is divided by then; by default its standard deviation. With mean and std [0.5], pixels run
    from -1 to 1."""
    decode: Literal["once", "on_read"] | None = None
    """Keep decoded pixels in the cache, or decode files whenever they are read; by default once, but on_read for
    folders from size 128 on."""
    held_out: Annotated[float, Meta(gt=0.0, le=0.5)] | None = None
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
        is_cheap=_look(options).is_cheap,
    )


def resolve(options: Options, folder: Path) -> Options:
    """All options given, `source` taken from `folder`. Raises `InputError` for what does not go together."""
    options = _complete(options)
    if options.format == DIGITS:
        return options
    return replace(options, source=os.path.abspath(folder / Path(options.source).expanduser()))


def prepare(options: Options, cache: Path) -> None:
    """Decode the pictures into `cache`, or list them there when they are decoded on reading, unless it was done before.

    Raises `InputError` for a picture that cannot be decoded and for anything else that is not as the options say,
    `StorageError` when the cache cannot be written.
    """
    _prepare(_complete(options), cache)


def open(options: Options, cache: Path) -> "ImageSource":  # noqa: A001
    """The prepared pictures, prepared now when they were not yet. Raises what `prepare` raises."""
    options = _complete(options)
    found = _Set(options)
    folder = find(cache, "images", _settings(options), found.watched) or _prepare(options, cache)
    return ImageSource(_look(options), folder, partial(found.reopen, folder))


class _Set:
    """The files behind complete options: which there are, and what is in them."""

    def __init__(self, options: Options) -> None:
        assert options.num_classes
        self._options, self._num_classes = options, options.num_classes
        self._tree: picture_sets.Tree | None = None
        if options.format == "digits":
            self._files = {"all": [picture_sets.digits_file()]}
        elif options.format == "folders":
            self._tree = picture_sets.tree(options.source, options.num_classes)
            self._files = {}
        elif options.format in ("cifar10", "cifar100"):
            self._files = picture_sets.cifar_files(options.source, options.format)
        else:
            self._files = picture_sets.idx_files(options.source)

    @property
    def watched(self) -> list[str]:
        """Files or folders that change when pictures come or go."""
        return self._tree.folders if self._tree else [path for paths in self._files.values() for path in paths]

    def paths(self) -> list[str]:
        """The files that the pictures are in."""
        if self._tree is None:
            return self.watched
        return [os.path.join(part.root, name) for part in self._parts for name in part.names]

    def read(self) -> "Found":
        """The pictures; those in folders are not decoded yet."""
        kind, count = self._options.format, self._num_classes
        if kind == "digits":
            return picture_sets.digits(self._files["all"][0])
        if kind == "folders":
            assert self._tree
            return pictures.Found(self._tree.classes, *self._parts)
        if kind in ("cifar10", "cifar100"):
            return picture_sets.cifar(self._files, kind, count)
        names = _KNOWN[kind or ""].names
        return picture_sets.idx(self._files, names if len(names) == count else tuple(map(str, range(count))))

    def reopen(self, folder: Path, part: str, labels: "np.ndarray") -> pictures.Files:
        """The pictures of a part that `Files.note` noted in `folder`."""
        assert self._tree
        root = self._tree.held_out if part == "held_out" and self._tree.held_out else self._tree.train
        return pictures.Files(root, pictures.Names(folder, part), labels, TrainingError)

    @cached_property
    def _parts(self) -> list[pictures.Files]:
        assert self._tree
        return [
            pictures.Files(root, *picture_sets.listed(root, self._tree.classes))
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
    options = replace(
        options,
        format=kind,
        num_classes=options.num_classes or (known.num_classes if known else None),
        size=size,
        channels=options.channels or (known.channels if known else 3),
        decode=options.decode or ("on_read" if kind == "folders" and size >= LARGE else "once"),
    )
    _look(options).check()
    return options


def _look(options: Options) -> Look:
    """Of complete options."""
    assert options.size and options.channels and options.decode
    return Look(
        options.size,
        options.channels,
        options.center_crop,
        options.decode,
        options.held_out,
        options.augment,
        options.mean,
        options.std,
    )


def _settings(options: Options) -> list[Any]:
    return [FORMAT, options.format, options.num_classes, _look(options).settings()]


def _prepare(options: Options, cache: Path) -> Path:
    found = _Set(options)
    paths = found.paths()
    names = [os.path.relpath(path, options.source) for path in paths] if options.format == "folders" else None

    def contents() -> Any:
        if options.decode == "once":
            return [names, [sha256(path) for path in paths]]
        return [names, [os.path.getsize(path) for path in paths]]

    def make(folder: Path) -> dict[str, Any]:
        return convert(_look(options), found.read(), options.source, folder)

    return keep(cache, "images", _settings(options), paths, contents, make, found.watched)
