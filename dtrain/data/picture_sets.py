"""Sets of pictures with labels as they are found: scikit-learn's digits, IDX and CIFAR files, folders of classes."""

import gzip
import importlib.util
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.data.kept import unreadable
from dtrain.data.pictures import Found, Pixels
from dtrain.errors import InputError

if TYPE_CHECKING:
    import numpy as np

TRAIN, HELD_OUT = "train", ("val", "valid", "validation", "test")
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_IDX = {
    TRAIN: ("train-images", "train-labels"),
    "held_out": ("t10k-images", "t10k-labels"),
}
_CIFAR = {
    "cifar10": {TRAIN: [f"data_batch_{n}.bin" for n in range(1, 6)], "held_out": ["test_batch.bin"]},
    "cifar100": {TRAIN: ["train.bin"], "held_out": ["test.bin"]},
}
_CIFAR_CLASSES = {"cifar10": "batches.meta.txt", "cifar100": "fine_label_names.txt"}


def digits_file() -> str:
    """Where scikit-learn keeps its digits. Raises `InputError` when it is not installed."""
    found = importlib.util.find_spec("sklearn")
    for folder in list(found.submodule_search_locations or []) if found else []:
        path = os.path.join(folder, "datasets", "data", "digits.csv.gz")
        if os.path.isfile(path):
            return path
    raise InputError(
        "data.source: digits are the pictures that come with scikit-learn, which is not installed here;"
        " install dtrain[train], or name pictures of your own"
    )


def digits(path: str) -> Found:
    """1,797 real handwritten digits of 8x8 pixels (the test part of E. Alpaydin and C. Kaynak's, UCI 1998)."""
    import numpy as np

    with gzip.open(path, "rt") as stream:
        table = np.loadtxt(stream, delimiter=",")
    pixels = np.round(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return Found(tuple("0123456789"), Pixels(pixels, table[:, -1].astype(np.int64)))


def idx_files(source: str) -> dict[str, list[str]]:
    """The files of images and labels, {part: [images, labels]}. Raises `InputError` when one is missing."""
    return {
        part: [_one(source, images, f"{images}-idx3-ubyte"), _one(source, labels, f"{labels}-idx1-ubyte")]
        for part, (images, labels) in _IDX.items()
    }


def idx(files: dict[str, list[str]], classes: tuple[str, ...]) -> Found:
    """What MNIST's IDX files hold, packed with gzip or not. Raises `InputError` for what is no such file."""
    import numpy as np

    parts = []
    for images, labels in files.values():
        pixels = _idx(images, 3)[..., None]
        found = _idx(labels, 1).astype(np.int64)
        if len(pixels) != len(found):
            raise InputError(
                f"data.source: {images} has {len(pixels)} pictures and {labels} {len(found)} labels;"
                " they are not of the same set"
            )
        parts.append(Pixels(pixels, _checked(found, len(classes), labels)))
    return Found(classes, *parts)


def cifar_files(source: str, kind: str) -> dict[str, list[str]]:
    """The files of each part. Raises `InputError` when one is missing."""
    return {part: [_one(source, name, name) for name in names] for part, names in _CIFAR[kind].items()}


def cifar(files: dict[str, list[str]], kind: str, num_classes: int) -> Found:
    """What the binary files of CIFAR-10 or CIFAR-100 hold. Raises `InputError` for what is no such file."""
    import numpy as np

    before = 1 if kind == "cifar10" else 2  # CIFAR-100 has the coarse label first
    record = before + 3 * 32 * 32
    parts = []
    for paths in files.values():
        pixels, labels = [], []
        for path in paths:
            data = _bytes(path)
            if not len(data) or len(data) % record:
                raise InputError(
                    f"data.source: {path} has {len(data)} bytes, which is no multiple of {record}, a picture of the"
                    f" binary version of {kind}; fetch that version again"
                )
            rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, record)
            labels.append(_checked(rows[:, before - 1].astype(np.int64), num_classes, path))
            pixels.append(rows[:, before:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        parts.append(Pixels(np.ascontiguousarray(np.concatenate(pixels)), np.concatenate(labels)))
    names = Path(files[TRAIN][0]).with_name(_CIFAR_CLASSES[kind])
    classes = tuple(names.read_text().split()) if names.is_file() else ()
    return Found(classes if len(classes) == num_classes else tuple(map(str, range(num_classes))), *parts)


@dataclass(frozen=True)
class Tree:
    """Folders of pictures, one a class: `<train>/<class>/**`, and `<held_out>/<class>/**` where there is one."""

    train: str
    held_out: str | None
    classes: tuple[str, ...]

    @property
    def folders(self) -> list[str]:
        """Every folder whose entries say whether a picture came or went."""
        found: list[str] = []
        for root in filter(None, (self.train, self.held_out)):
            found += (folder for folder, _, _ in _walk(root))
        return found


def tree(source: str, num_classes: int) -> Tree:
    """The classes of a folder. Raises `InputError` when there are others than `num_classes` of them."""
    if not os.path.isdir(source):
        raise InputError(f"data.source: there is no folder {source}; write `digits`, or a folder of class folders")
    names = _subfolders(source)
    train = os.path.join(source, TRAIN)
    root = train if TRAIN in names and _subfolders(train) else source
    others = [name for name in HELD_OUT if root == train and name in names]
    if len(others) > 1 and "test" in others:
        others.remove("test")  # beside a part for validation the test is for the very end
    if len(others) > 1:
        raise InputError(f"data.source: {source} has {' and '.join(others)}; leave one of them to hold out")
    held_out = os.path.join(source, others[0]) if others else None
    classes = tuple(_subfolders(root))
    if len(classes) != num_classes:
        some = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        holds = f"{len(classes)} class folders: {some}" if classes else "no class folder"
        advice = f"write num_classes: {len(classes)}" if len(classes) > 1 else "name the folder that holds them"
        raise InputError(f"data.num_classes is {num_classes}, and {root} holds {holds}; {advice}")
    if held_out and (unknown := [name for name in _subfolders(held_out) if name not in classes]):
        raise InputError(
            f"data.source: {held_out} has a class {unknown[0]!r} that {root} does not have; take it out, or train on it"
        )
    return Tree(root, held_out, classes)


def listed(root: str, classes: Sequence[str]) -> tuple[list[str], "np.ndarray"]:
    """Names (relative to `root`, sorted) and labels (int64 [n]) of the pictures under it.

    Files that are named as no picture are told in a warning. Raises `InputError` for a class without a picture.
    """
    import numpy as np

    names: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    for label, name in enumerate(classes):
        before = len(names)
        for folder, _, files in _walk(os.path.join(root, name)):
            pictures = sorted(file for file in files if os.path.splitext(file)[1].lower() in SUFFIXES)
            others += (os.path.join(folder, file) for file in sorted(set(files).difference(pictures)))
            names += (os.path.relpath(os.path.join(folder, file), root) for file in pictures)
        labels += [label] * (len(names) - before)
        if len(names) == before and os.path.isdir(os.path.join(root, name)):
            raise InputError(
                f"data.source: the class folder {os.path.join(root, name)} holds no picture;"
                f" put some in ({', '.join(sorted(SUFFIXES))}), or take it out"
            )
    if others:
        logging.getLogger(__name__).warning(
            "%d files that are no pictures are left out, e.g. %s", len(others), others[0]
        )
    return names, np.array(labels, dtype=np.int64)


def _walk(root: str) -> list[tuple[str, list[str], list[str]]]:
    found = []
    for folder, folders, files in os.walk(root, onerror=_raise, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found.append((folder, folders, [name for name in files if not name.startswith(".")]))
    return found


def _raise(error: OSError) -> None:
    raise unreadable(str(error.filename), error) from error


def _subfolders(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise unreadable(folder, error) from error


def _one(source: str, start: str, name: str) -> str:
    """The file in `source`, or in a folder in it, whose name begins so."""
    if not os.path.isdir(source):
        raise InputError(f"data.source: there is no folder {source}; name the one that holds {name}")
    for folder in (source, *(os.path.join(source, name) for name in _subfolders(source))):
        found = sorted(file for file in os.listdir(folder) if file.startswith(start))
        if found:
            return os.path.join(folder, found[0])
    raise InputError(f"data.source: there is no {name} in {source} or a folder in it; put it there")


def _bytes(path: str) -> bytes:
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as stream:
            return stream.read()
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"data.source: cannot read {path}: {reason}; fetch it again") from error


def _idx(path: str, dimensions: int) -> "np.ndarray":
    import numpy as np

    data = _bytes(path)
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes([0, 0, 8, dimensions]):
        raise InputError(
            f"data.source: {path} is no IDX file of bytes in {dimensions} dimension{'s' if dimensions > 1 else ''};"
            " fetch it again"
        )
    shape = [int(size) for size in np.frombuffer(data, dtype=">u4", count=dimensions, offset=4)]
    if len(data) - start != np.prod(shape):
        raise InputError(
            f"data.source: {path} has {len(data) - start} bytes after its head, not the"
            f" {' x '.join(map(str, shape))} that it says; fetch it again"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)


def _checked(labels: "np.ndarray", num_classes: int, path: str) -> "np.ndarray":
    if len(labels) and labels.max() >= num_classes:
        raise InputError(
            f"data.num_classes is {num_classes}, and {path} has the label {labels.max()};"
            f" write num_classes: {labels.max() + 1}"
        )
    return labels
