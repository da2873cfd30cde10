"""Data of the user's own: a function that opens it. Planning reads the function's file and never runs it."""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta
from msgspec.structs import replace

from dtrain import code
from dtrain.data import Dataset, DataShape
from dtrain.errors import InputError, TrainingError
from dtrain.settings import NonNegativeInt, Says, Settings, to_builtins

if TYPE_CHECKING:
    import numpy as np

FIELDS = ("inputs", "targets")
"""What the two halves of a sample are called that is a pair."""
EXPECTED = (
    "it must give (train, held_out), each a mapping from names to arrays of one length, or a dataset with len() and"
    " [index]; or an object with both as attributes"
)


class Shape(Settings):
    """What models must know of the data before it is opened."""

    kind: Literal["tokens", "masked", "pairs", "images", "table", "series", "custom"] = "custom"
    """What a batch holds, in the words of `dtrain/data/__init__.py`; `custom` is for a task of your own."""
    vocabulary_size: NonNegativeInt = 0
    """Number of distinct tokens."""
    sequence_length: NonNegativeInt = 0
    """Tokens or time steps a sample has."""
    num_classes: NonNegativeInt = 0
    """Labels are below this; 0 where a number is predicted, or nothing."""
    channels: NonNegativeInt = 0
    """Channels of a picture."""
    height: NonNegativeInt = 0
    """Rows of a picture."""
    width: NonNegativeInt = 0
    """Columns of a picture."""
    num_features: NonNegativeInt = 0
    """Columns of a table, or of a series."""
    horizon: NonNegativeInt = 0
    """Time steps to predict."""
    num_targets: NonNegativeInt = 0
    """Tokens of a sample that are predicted, where those are not all."""
    is_cheap: bool = True
    """Whether a batch takes less than a millisecond to read, so that nothing is gained by reading ahead."""


class Options(Settings):
    """Data of your own; `data: ./task.py:open_data` is short for it."""

    open: Annotated[str, Meta(min_length=3, max_length=1024), Says(code.EXPECTED)]
    """Function that opens it, called with (**options) on every worker; a relative path starts at the job file's
    folder."""
    options: dict[str, Any] = {}
    """What the function is given by name."""
    path: Annotated[str, Meta(max_length=1024)] = ""
    """Folder that is put first on the import path; the job file's own when left out."""
    shape: Shape = Shape()
    """What it holds: needed by dtrain's own models; given to a task of your own as `data`."""


def describe(options: Options) -> DataShape:
    """What the job says of it."""
    return DataShape(**to_builtins(options.shape))


def resolve(options: Options, folder: Path) -> Options:
    """The same with absolute paths. Raises `InputError` when file or function are not there, or not what is called."""
    try:
        path = code.absolute(options.path, folder) if options.path else folder.absolute().resolve()
        reference = code.resolve(options.open, folder)
        file = code.source_file(reference, path)
        if file is not None:
            code.check_call(reference, file, (), options.options)
    except InputError as error:
        raise InputError(f"data.open: {error.message}") from None
    return replace(options, open=reference, path=str(path))


def own_code(options: Options) -> list[Path]:
    """The files of the user's own that resolved options name."""
    file = code.source_file(options.open, Path(options.path))
    return [file] if file is not None else []


def prepare(options: Options, cache: Path) -> None:
    """Nothing: the function opens what is there."""


def open(options: Options, cache: Path) -> "CustomSource":  # noqa: A001, ARG001
    """What the user's function opens. Raises `TrainingError` when it is not a source of samples."""
    made = code.load(options.open, options.path)(**options.options)
    if isinstance(made, tuple) and len(made) == 2:
        train, held_out = made
    elif hasattr(made, "train") and hasattr(made, "held_out"):
        train, held_out = made.train, made.held_out
    else:
        raise TrainingError(f"{options.open} gave a {type(made).__name__}; {EXPECTED}")
    return CustomSource(
        made,
        _dataset(f"{options.open}: its training data", train),
        _dataset(f"{options.open}: its held-out data", held_out),
    )


class CustomSource:
    """What the user gave, as the loop reads it."""

    def __init__(self, made: Any, train: Dataset, held_out: Dataset) -> None:
        self._made = made
        self.train, self.held_out = train, held_out
        said = getattr(made, "fingerprint", None)
        self.fingerprint = str(said) if said else f"custom-{_digest(train)}-{_digest(held_out)}"
        """The user's own word; else of arrays their contents, of other datasets only how many samples they have."""

    def yardsticks(self) -> dict[str, dict[str, float]]:
        """The user's own, if there are any."""
        own: Callable[[], dict[str, dict[str, float]]] | None = getattr(self._made, "yardsticks", None)
        return own() if own is not None else {}

    def __getattr__(self, name: str) -> Any:
        # A task's own `sample` may want what the user's object offers besides: decode, class names.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._made, name)


def _dataset(what: str, given: Any) -> Dataset:
    if isinstance(given, Mapping):
        return Arrays(what, given)
    if hasattr(given, "batch") and hasattr(given, "num_samples"):
        dataset: Dataset = given
        return dataset
    if hasattr(given, "__len__") and hasattr(given, "__getitem__"):
        return Items(what, given)
    raise TrainingError(f"{what}: a {type(given).__name__} cannot be read by index; {EXPECTED}")


class Arrays:
    """Named arrays (numpy, torch, or lists of numbers) with a first dimension in common: the samples."""

    def __init__(self, what: str, given: Mapping[str, Any]) -> None:
        self._arrays = {str(name): _array(values) for name, values in given.items()}
        sizes = {name: len(array) if array.ndim else 0 for name, array in self._arrays.items()}
        if not sizes or len(set(sizes.values())) > 1 or not min(sizes.values()):
            found = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "no arrays"
            raise TrainingError(f"{what}: all arrays must have the same number of samples, at least one; found {found}")
        self.num_samples = min(sizes.values())

    def batch(self, indices: "np.ndarray", draws: "np.ndarray") -> "dict[str, np.ndarray]":
        """The rows at `indices`."""
        return {name: array[indices] for name, array in self._arrays.items()}

    def digest(self) -> str:
        """Changes with any number of any array."""
        digest = hashlib.sha256()
        for name, array in sorted(self._arrays.items()):
            digest.update(f"{name}{array.dtype}{array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]


class Items:
    """A dataset that is read one sample at a time, such as torch's; a sample is a mapping, a pair, or one array.

    The generators of Python, numpy and torch are seeded from the sample's own draw before it is read: what it does by
    chance is then the same for any number of workers, and another in every epoch.
    """

    def __init__(self, what: str, given: Any) -> None:
        self._what, self._given = what, given
        self.num_samples = len(given)
        if not self.num_samples:
            raise TrainingError(f"{what} has no samples")

    def batch(self, indices: "np.ndarray", draws: "np.ndarray") -> "dict[str, np.ndarray]":
        """The samples at `indices`, stacked."""
        import numpy as np

        samples = [self._sample(int(i), int(d)) for i, d in zip(indices, draws, strict=True)]
        try:
            return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
        except (ValueError, KeyError) as error:
            shapes = [{name: array.shape for name, array in sample.items()} for sample in samples]
            raise TrainingError(
                f"{self._what}: samples {', '.join(map(str, indices))} do not stack ({error}): {shapes};"
                " every sample must have the same names and shapes"
            ) from None

    def _sample(self, index: int, draw: int) -> "dict[str, np.ndarray]":
        import numpy as np
        import torch

        random.seed(draw)
        np.random.seed(draw & 0xFFFFFFFF)
        torch.default_generator.manual_seed(draw >> 1)
        sample = self._given[index]
        if isinstance(sample, Mapping):
            return {str(name): _array(value) for name, value in sample.items()}
        if isinstance(sample, tuple | list) and len(sample) == len(FIELDS):
            return {name: _array(value) for name, value in zip(FIELDS, sample, strict=True)}
        if isinstance(sample, Sequence):
            raise TrainingError(
                f"{self._what}: sample {index} is a {type(sample).__name__} of {len(sample)}; it must be a mapping"
                " from names to arrays, a pair (inputs, targets), or one array"
            )
        return {FIELDS[0]: _array(sample)}


def _array(value: Any) -> "np.ndarray":
    """Numbers as an array; Python's own floats in torch's default precision."""
    import numpy as np

    array = value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
    if array.dtype == object or array.dtype.kind in "US":
        raise TrainingError(f"a {type(value).__name__} in a sample is not numbers; give arrays, tensors or numbers")
    if array.dtype == np.float64 and not hasattr(value, "dtype"):
        array = array.astype(np.float32)
    return array


def _digest(dataset: Dataset) -> str:
    return dataset.digest() if isinstance(dataset, Arrays) else str(dataset.num_samples)
