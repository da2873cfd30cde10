"""Tables: rows of numbers and categories, from which a class or a number is predicted."""

import hashlib
import importlib.util
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta
from msgspec.structs import replace

from dtrain import component
from dtrain.data import DataShape, columns
from dtrain.data.holding import hold_out, shuffled
from dtrain.data.kept import find, keep, sha256
from dtrain.data.prepared import read_meta
from dtrain.errors import InputError
from dtrain.settings import PositiveInt, Settings, all_but

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
"""Raise when the same rows would be prepared differently."""
_LEAST_SQUARES_WORK = 10**10
_CELLS = "radius,texture,perimeter,area,smoothness,compactness,concavity,concave points,symmetry,fractal dimension"


@dataclass(frozen=True)
class _Known:
    """A table that scikit-learn brings along."""

    files: tuple[str, ...]
    target: str
    num_classes: int | None
    features: tuple[str, ...]


_KNOWN = {
    "breast_cancer": _Known(
        ("breast_cancer.csv",),
        "diagnosis",
        2,
        (
            *(f"mean {n}" for n in _CELLS.split(",")),
            *(f"{n} error" for n in _CELLS.split(",")),
            *(f"worst {n}" for n in _CELLS.split(",")),
        ),
    ),
    "diabetes": _Known(
        ("diabetes_data_raw.csv.gz", "diabetes_target.csv.gz"),
        "progression",
        None,
        ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"),
    ),
    "iris": _Known(("iris.csv",), "species", 3, ("sepal length", "sepal width", "petal length", "petal width")),
    "wine": _Known(
        ("wine_data.csv",),
        "cultivar",
        3,
        (
            *("alcohol", "malic acid", "ash", "alkalinity of ash", "magnesium", "total phenols", "flavanoids"),
            *("nonflavanoid phenols", "proanthocyanins", "colour intensity", "hue", "od280/od315", "proline"),
        ),
    ),
}


class Options(Settings):
    """Rows of a CSV or Parquet file: numbers and categories, from which a class or a number is predicted."""

    source: str | Annotated[tuple[str, ...], Meta(min_length=1)] = "breast_cancer"
    """`breast_cancer`, `iris`, `wine` (classes) or `diabetes` (a number), real tables that scikit-learn brings along,
    or your own: a CSV or Parquet file, a folder, a glob, or a list of them."""
    target: str | None = None
    """Column to predict; known for the tables that come along."""
    num_classes: Annotated[int, Meta(ge=2, le=2**20)] | None = None
    """Number of different values of the target, to predict a class; without it, a number is predicted."""
    features: tuple[str, ...] | None = None
    """Columns with numbers to predict from; by default all others. Where the file is not at hand when a job is
    planned, they must be listed."""
    categories: dict[str, PositiveInt] = {}
    """Columns with words to predict from, each with how many of its most frequent words count: a feature is made of
    each, 1 where the row has that word."""
    missing: Literal["refuse", "mean"] = "refuse"
    """What is done where a number is missing: stop, or take the mean of the training rows."""
    held_out: Annotated[float, Meta(gt=0.0, le=0.5)] = 0.2
    """Share of the rows, of each class, that is never trained on."""


def describe(options: Options) -> DataShape:
    """Features and classes, without reading the table. Raises `InputError` where an option is needed for it."""
    options = _complete(options)
    if options.features is None:
        raise InputError(
            f"data.features must be listed where {_shown(options.source)} is not at hand, so that a job can be planned"
            " without it; write under data, e.g. `features: [age, height]`"
        )
    return DataShape(
        "table",
        num_classes=options.num_classes or 0,
        num_features=len(options.features) + sum(options.categories.values()),
    )


def resolve(options: Options, folder: Path) -> Options:
    """All options given, with paths taken from `folder`; features that are not listed are read from the file's header.

    Raises `InputError` for what does not go together.
    """
    options = _complete(options)
    if options.source in _KNOWN:
        return options
    options = replace(options, source=columns.resolved(options.source, folder))
    return _with_features(options) if options.features is None else options


def prepare(options: Options, cache: Path) -> None:
    """Convert the table into `cache`, unless the same one was before.

    Raises `InputError` for a column or cell that is not as the options say, `StorageError` when the cache cannot be
    written.
    """
    _prepare(_with_features(_complete(options)), cache)


def open(options: Options, cache: Path) -> "TableSource":  # noqa: A001
    """The prepared table, prepared now when it was not yet. Raises what `prepare` raises."""
    options = _with_features(_complete(options))
    return TableSource(find(cache, "table", _settings(options), _paths(options)) or _prepare(options, cache))


class TableSource:
    """Samples are rows. Numbers have zero mean and unit variance over the training rows, the target too."""

    def __init__(self, folder: Path) -> None:
        meta = read_meta(folder)
        self.fingerprint: str = folder.name
        """Changes with the rows, the columns chosen and what is held out."""
        self.features: tuple[str, ...] = tuple(meta["features"])
        """What each feature is: a column, or `column=word`."""
        self.classes: tuple[str, ...] = tuple(meta["classes"])
        """What the targets stand for; empty where a number is predicted."""
        self._target: dict[str, float] = meta["target"]
        self._yardsticks: dict[str, dict[str, float]] = meta["yardsticks"]
        width = len(self.features)
        self.train, self.held_out = (Rows(folder, part, width, bool(self.classes)) for part in ("train", "held_out"))

    def yardsticks(self) -> dict[str, dict[str, float]]:
        """Accuracy of always naming the most frequent class, or losses of the mean and of linear regression."""
        return self._yardsticks

    def to_target(self, values: "np.ndarray") -> "np.ndarray":
        """Predicted numbers in the units of the target's column."""
        return values * self._target["std"] + self._target["mean"]


class Rows:
    """Rows in a memory map."""

    def __init__(self, folder: Path, part: str, width: int, has_classes: bool) -> None:
        import numpy as np

        self._targets = np.fromfile(folder / f"{part}_targets.bin", dtype=np.int64 if has_classes else np.float32)
        self.num_samples = len(self._targets)
        shape = (self.num_samples, width)
        self._features = np.asarray(np.memmap(folder / f"{part}.bin", dtype=np.float32, mode="r", shape=shape))

    def batch(self, indices: "np.ndarray", draws: "np.ndarray") -> "dict[str, np.ndarray]":
        """features, float32 [b, f], and targets, int64 [b] for classes, float32 [b] for a number."""
        return {"features": self._features[indices], "targets": self._targets[indices]}


def _complete(options: Options) -> Options:
    """The options with what is known of the tables that come along. Raises `InputError` for what does not fit."""
    known = _KNOWN.get(options.source) if isinstance(options.source, str) else None
    if known is not None:
        if options.num_classes not in (None, known.num_classes) or options.target not in (None, known.target):
            what = f"{known.num_classes} classes" if known.num_classes else "a number"
            raise InputError(
                f"data.source {options.source} has {what} in {known.target!r} to predict; leave data.target and"
                " data.num_classes out"
            )
        if options.categories:
            raise InputError(f"data.categories: {options.source} has numbers only; leave it out")
        features = options.features or known.features
        for name in features:
            if name not in known.features:
                raise InputError(
                    f"data.features: {options.source} has no column"
                    f" {name!r}{component.suggestion(name, known.features)}"
                )
        options = replace(options, target=known.target, num_classes=known.num_classes, features=features)
    elif options.target is None:
        raise InputError(
            f"data.target must be given for {_shown(options.source)}: the column to predict; write under data, e.g."
            " `target: price`"
        )
    named = [*(options.features or ()), *options.categories, options.target]
    repeated = [name for name, count in Counter(named).items() if count > 1]
    if repeated:
        raise InputError(
            f"data: column {repeated[0]!r} is named twice in features, categories and target; name it once"
        )
    if options.features is not None and not options.features and not options.categories:
        raise InputError("data.features is empty; list the columns to predict from, or leave it out for all")
    return options


def _with_features(options: Options) -> Options:
    """Features from the first file's header where they are not listed."""
    if options.features is not None:
        return options
    try:
        path = columns.find(options.source)[0]
    except InputError as error:
        raise InputError(f"{error.message}; to plan without it, list data.features") from error
    names = columns.header(path)
    features = tuple(name for name in names if name != options.target and name not in options.categories)
    if options.target not in names:
        raise InputError(
            f"data.target: {path} has no column {options.target!r}{component.suggestion(str(options.target), names)}"
        )
    return _complete(replace(options, features=features))


def _shown(source: str | Sequence[str]) -> str:
    return source if isinstance(source, str) else ", ".join(source)


def _paths(options: Options) -> list[str]:
    known = _KNOWN.get(options.source) if isinstance(options.source, str) else None
    if known is None:
        return columns.find(options.source)
    package = importlib.util.find_spec("sklearn")
    for folder in list(package.submodule_search_locations or []) if package else []:
        return [os.path.join(folder, "datasets", "data", name) for name in known.files]
    raise InputError(
        f"data.source: {options.source} comes with scikit-learn, which is not installed here; install dtrain[train],"
        " or name a table of your own"
    )


def _settings(options: Options) -> list[Any]:
    known = options.source if options.source in _KNOWN else None
    return [FORMAT, known, all_but("source", options)]


def _prepare(options: Options, cache: Path) -> Path:
    paths = _paths(options)

    def make(folder: Path) -> dict[str, Any]:
        return convert(options, _known(options, paths) if options.source in _KNOWN else _read(options, paths), folder)

    return keep(cache, "table", _settings(options), paths, lambda: [sha256(path) for path in paths], make)


@dataclass
class Raw:
    """Columns as they were read."""

    numbers: "np.ndarray"
    """float64 [n, features], NaN where one is missing."""
    words: dict[str, list[str]] = field(default_factory=dict)
    target: "list[str] | np.ndarray" = field(default_factory=list)
    """Words for classes, float64 [n] for a number."""
    num_train: int | None = None
    """Rows before the held-out ones, where the data says which those are."""


def convert(options: Options, raw: Raw, folder: Path) -> dict[str, Any]:
    """Fill `folder` with rows, as `prepared` asks for. Raises `InputError` where too few are left for either part."""
    import numpy as np

    number = len(raw.numbers)
    classes, targets = _targets(options, raw)
    words = ["\0".join(row) for row in zip(*raw.words.values(), strict=True)] if raw.words else [""] * number
    rows = [
        hashlib.blake2b(row.tobytes() + word.encode(), digest_size=16).hexdigest()
        for row, word in zip(raw.numbers, words, strict=True)
    ]
    if raw.num_train is None:
        held = hold_out(targets if classes else np.zeros(number, dtype=np.int64), rows, options.held_out)
    else:
        held = np.arange(number) >= raw.num_train  # as it is: of few values, different things may have equal rows
    mean, std = _moments(raw.numbers[~held])
    parts = [np.where(np.isnan(raw.numbers), 0.0, (raw.numbers - mean) / std)]
    features = list(options.features or ())
    for name, size in options.categories.items():
        count = Counter(word for word, is_held in zip(raw.words[name], held, strict=True) if not is_held and word)
        vocabulary = sorted(count, key=lambda word: (-count[word], word))[:size]
        places = {word: place for place, word in enumerate(vocabulary)}
        codes = np.array([places.get(word, size) for word in raw.words[name]])
        parts.append(np.eye(size + 1)[codes][:, :size])
        features += [f"{name}={word}" for word in vocabulary] + [f"{name}=?"] * (size - len(vocabulary))
    table = np.concatenate(parts, axis=1).astype(np.float32)
    center, scale = (0.0, 1.0) if classes else (float(v[0]) for v in _moments(targets[~held][:, None]))
    if not classes:
        targets = ((targets - center) / scale).astype(np.float32)
    train, out = np.flatnonzero(~held), np.flatnonzero(held)[shuffled(int(held.sum()))]
    for part, numbers in (("train", train), ("held_out", out)):
        table[numbers].tofile(folder / f"{part}.bin")
        targets[numbers].tofile(folder / f"{part}_targets.bin")
    return {
        "format": FORMAT,
        "features": features,
        "classes": classes,
        "mean": mean.tolist(),
        "std": std.tolist(),
        "target": {"mean": center, "std": scale},
        "yardsticks": _yardsticks(table, targets, train, out),
    }


def _read(options: Options, paths: Sequence[str]) -> Raw:
    assert options.target is not None and options.features is not None
    names = [*options.features, *options.categories, options.target]
    return joined(options, [columns.read(path, names) for path in paths])


def joined(options: Options, tables: Sequence[columns.Table]) -> Raw:
    """The rows of several tables. Raises `InputError` for a cell that is not as the options say."""
    import numpy as np

    assert options.target is not None and options.features is not None
    numbers: list[np.ndarray] = []
    words: dict[str, list[str]] = {name: [] for name in options.categories}
    targets: list[Any] = []
    for table in tables:
        found = [table.numbers(name, may_miss=options.missing == "mean") for name in options.features]
        numbers.append(np.stack(found, axis=1) if found else np.empty((table.num_rows, 0)))
        for name in options.categories:
            words[name] += table.words(name)
        targets += (
            table.words(options.target, may_miss=False) if options.num_classes else [table.numbers(options.target)]
        )
    return Raw(np.concatenate(numbers), words, targets if options.num_classes else np.concatenate(targets))


def _known(options: Options, paths: Sequence[str]) -> Raw:
    import numpy as np

    assert isinstance(options.source, str)
    known = _KNOWN[options.source]
    chosen = [known.features.index(name) for name in options.features or ()]
    if known.num_classes is None:
        data, target = (np.loadtxt(path) for path in paths)
        return Raw(data[:, chosen], target=target)
    with Path(paths[0]).open() as stream:
        names = stream.readline().strip().split(",")[2:]
        data = np.loadtxt(stream, delimiter=",")
    return Raw(data[:, chosen], target=[names[int(label)] for label in data[:, -1]])


def _targets(options: Options, raw: Raw) -> "tuple[list[str], np.ndarray]":
    """The classes, in order, and what to predict: int64 [n], or float64 [n] with no classes."""
    import numpy as np

    if options.num_classes is None:
        return [], np.asarray(raw.target)
    classes = sorted(set(raw.target), key=_rank)
    if len(classes) != options.num_classes:
        some = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
        advice = f"write num_classes: {len(classes)}" if len(classes) > 1 else "there is nothing to tell apart"
        raise InputError(
            f"data.num_classes is {options.num_classes}, and column {options.target!r} of {_shown(options.source)} has"
            f" {len(classes)} values: {some}; {advice}"
        )
    places = {name: place for place, name in enumerate(classes)}
    return classes, np.array([places[name] for name in raw.target], dtype=np.int64)


def _rank(word: str) -> tuple[int, float, str]:
    """Numbers by their size, before words."""
    try:
        return 0, float(word), word
    except ValueError:
        return 1, 0.0, word


def _moments(values: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Mean and standard deviation of each column, without what is missing; 1 for a column that never changes."""
    import numpy as np

    known = ~np.isnan(values)
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, values, 0.0).sum(axis=0) / count
    std = np.sqrt((np.where(known, values - mean, 0.0) ** 2).sum(axis=0) / count)
    return mean, np.where(std > 1e-12 * np.maximum(np.abs(mean), 1e-12), std, 1.0)


def _yardsticks(
    table: "np.ndarray", targets: "np.ndarray", train: "np.ndarray", out: "np.ndarray"
) -> dict[str, dict[str, float]]:
    import numpy as np

    if targets.dtype == np.int64:
        most = np.bincount(targets[train]).argmax()
        return {"accuracy": {"always the most frequent class": float((targets[out] == most).mean())}}
    losses = {"always the mean": float((targets[out].astype(np.float64) ** 2).mean())}
    with_one = np.concatenate([table, np.ones((len(table), 1))], axis=1, dtype=np.float64)
    if len(train) * with_one.shape[1] ** 2 <= _LEAST_SQUARES_WORK:
        weights = np.linalg.lstsq(with_one[train], targets[train].astype(np.float64), rcond=None)[0]
        losses["linear regression"] = float(((with_one[out] @ weights - targets[out]) ** 2).mean())
    return {"loss": losses}
