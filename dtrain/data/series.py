"""Time series: windows of the past, from which the next values of one column are predicted.

`elnino`, the default, comes with statsmodels: the mean temperature of the sea's surface off Peru and Ecuador (0 to 10
degrees south, 80 to 90 degrees west) in each month of 1950 to 2010, in degrees Celsius; of NOAA's National Weather
Service (ERSST.V3B, Nino 1+2), in the public domain.
"""

import importlib.util
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta
from msgspec.structs import replace

from dtrain import component
from dtrain.data import DataShape, columns
from dtrain.data.holding import shuffled
from dtrain.data.kept import find, keep, sha256
from dtrain.data.prepared import read_meta
from dtrain.errors import InputError
from dtrain.settings import PositiveInt, Settings, all_but

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
"""Raise when the same series would be prepared differently."""
ELNINO = "elnino"
_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_TARGET, _TIME = "temperature", "month"


class Options(Settings):
    """A time series from a CSV or Parquet file: from the last steps, the next values of a column are predicted."""

    source: str = ELNINO
    """`elnino`, 61 years of the sea's monthly temperature in the Pacific that statsmodels brings along, or your own CSV
    or Parquet file, one row a time step, in the order of time."""
    target: str | None = None
    """Column whose next values are predicted; `temperature` of elnino."""
    time: str | None = None
    """Column with the time, checked to rise from row to row; it is not predicted from."""
    features: tuple[str, ...] | None = None
    """Columns with numbers to predict from; by default all but the time, with the target among them. Where the file is
    not at hand when a job is planned, they must be listed."""
    sequence_length: Annotated[PositiveInt, Meta(le=2**16)] = 24
    """Time steps that a prediction is made from."""
    horizon: Annotated[PositiveInt, Meta(le=2**16)] = 6
    """Time steps that are predicted, the next ones."""
    season: PositiveInt | None = None
    """Time steps after which the series is likely to repeat, 12 for months of a year (known of elnino): forecasts by
    the season are then among the yardsticks."""
    missing: Literal["refuse", "previous"] = "refuse"
    """What is done where a number is missing: stop, or take the one before it."""
    held_out: Annotated[float, Meta(gt=0.0, le=0.5)] = 0.2
    """Share of the time steps that is never trained on: the last ones."""


def describe(options: Options) -> DataShape:
    """Columns and lengths, without reading the series. Raises `InputError` where an option is needed for it."""
    options = _complete(options)
    if options.features is None:
        raise InputError(
            f"data.features must be listed where {options.source} is not at hand, so that a job can be planned without"
            " it; write under data, e.g. `features: [price, volume]`"
        )
    return DataShape(
        "series",
        sequence_length=options.sequence_length,
        num_features=len(options.features),
        horizon=options.horizon,
    )


def resolve(options: Options, folder: Path) -> Options:
    """All options given, with `source` taken from `folder`; features that are not listed are read from its header.

    Raises `InputError` for what does not go together.
    """
    options = _complete(options)
    if options.source == ELNINO:
        return options
    options = replace(options, source=columns.resolved(options.source, folder)[0])
    return _with_features(options)


def prepare(options: Options, cache: Path) -> None:
    """Convert the series into `cache`, unless the same one was before.

    Raises `InputError` for a column or cell that is not as the options say and for a series that is too short,
    `StorageError` when the cache cannot be written.
    """
    _prepare(_with_features(_complete(options)), cache)


def open(options: Options, cache: Path) -> "SeriesSource":  # noqa: A001
    """The prepared series, prepared now when it was not yet. Raises what `prepare` raises."""
    options = _with_features(_complete(options))
    folder = find(cache, "series", _settings(options), [_path(options)])
    return SeriesSource(options, folder or _prepare(options, cache))


class SeriesSource:
    """Samples are windows of time steps: `sequence_length` to predict from, then `horizon` to predict.

    Every column has zero mean and unit variance over the time steps that are trained on. No time step of a held-out
    window is in a window that is trained on.
    """

    def __init__(self, options: Options, folder: Path) -> None:
        import numpy as np

        meta = read_meta(folder)
        self.fingerprint: str = folder.name
        """Changes with the series and the options."""
        self.features: tuple[str, ...] = tuple(options.features or ())
        """The columns to predict from."""
        self._target: dict[str, float] = meta["target"]
        self._yardsticks: dict[str, float] = meta["loss"]
        inputs = np.asarray(np.memmap(folder / "inputs.bin", dtype=np.float32, mode="r")).reshape(
            -1, len(self.features)
        )
        target = np.asarray(np.memmap(folder / "target.bin", dtype=np.float32, mode="r"))
        cut, lengths = meta["num_train"], (options.sequence_length, options.horizon)
        self.train = Windows(inputs[:cut], target[:cut], *lengths)
        self.held_out = Windows(inputs[cut:], target[cut:], *lengths, shuffled(len(target) - cut - sum(lengths) + 1))

    def yardsticks(self) -> dict[str, dict[str, float]]:
        """Mean squared errors, in the units of the targets, of forecasts that need no training: the last value again,
        the training mean, and, of a series with seasons, the last season again and the mean of this time in all."""
        return {"loss": dict(self._yardsticks)}

    def to_target(self, values: "np.ndarray") -> "np.ndarray":
        """Predicted values in the units of the target's column."""
        return values * self._target["std"] + self._target["mean"]


class Windows:
    """Every window of a stretch of time: number i begins at time step i, or at `starts[i]`."""

    def __init__(
        self,
        inputs: "np.ndarray",
        target: "np.ndarray",
        sequence_length: int,
        horizon: int,
        starts: "np.ndarray | None" = None,
    ) -> None:
        import numpy as np

        self._inputs, self._target, self._starts = inputs, target, starts
        self._past = np.arange(sequence_length)
        self._future = sequence_length + np.arange(horizon)
        self.num_samples = len(target) - sequence_length - horizon + 1

    def batch(self, indices: "np.ndarray", draws: "np.ndarray") -> "dict[str, np.ndarray]":
        """inputs, float32 [b, t, f]; last, float32 [b], the target at their end; targets, float32 [b, horizon]."""
        starts = (indices if self._starts is None else self._starts[indices])[:, None]
        past, future = starts + self._past, starts + self._future
        return {"inputs": self._inputs[past], "last": self._target[past[:, -1]], "targets": self._target[future]}


def _complete(options: Options) -> Options:
    """The options with what is known of the series that comes along. Raises `InputError` for what does not fit."""
    if options.source == ELNINO:
        for key, names in (("target", [options.target]), ("features", options.features or ())):
            for name in names:
                if name not in (None, _TARGET):
                    raise InputError(
                        f"data.{key}: {ELNINO} has no column {name!r}{component.suggestion(str(name), [_TARGET])}"
                    )
        if options.time not in (None, _TIME):
            raise InputError(f"data.time: the time of {ELNINO} is in {_TIME!r}; leave data.time out")
        return replace(options, target=_TARGET, time=_TIME, features=(_TARGET,), season=options.season or len(_MONTHS))
    if options.target is None:
        raise InputError(
            f"data.target must be given for {options.source}: the column to predict; write under data, e.g."
            " `target: price`"
        )
    features = options.features
    if features is not None and (not features or options.time in features or len(set(features)) < len(features)):
        raise InputError(
            "data.features must list at least one column, each once, and not data.time; leave it out for all columns"
        )
    return options


def _with_features(options: Options) -> Options:
    if options.features is not None:
        return options
    try:
        names = columns.header(columns.find(options.source)[0])
    except InputError as error:
        raise InputError(f"{error.message}; to plan without it, list data.features") from error
    for key, name in (("target", options.target), ("time", options.time)):
        if name is not None and name not in names:
            raise InputError(f"data.{key}: {options.source} has no column {name!r}{component.suggestion(name, names)}")
    return replace(options, features=tuple(name for name in names if name != options.time))


def _path(options: Options) -> str:
    if options.source == ELNINO:
        return _elnino_file()
    found = columns.find(options.source)
    if len(found) > 1:
        raise InputError(f"data.source: {options.source} leads to {len(found)} files; a series is in one: name that")
    return found[0]


def _elnino_file() -> str:
    """Where statsmodels keeps the series. Raises `InputError` when it is not installed."""
    package = importlib.util.find_spec("statsmodels")  # which does not import it
    for folder in list(package.submodule_search_locations or []) if package else []:
        path = os.path.join(folder, "datasets", "elnino", "elnino.csv")
        if os.path.isfile(path):
            return path
    raise InputError(
        f"data.source: {ELNINO} comes with statsmodels, which is not installed here; run: pip install 'dtrain[train]',"
        " or name a series of your own"
    )


def _elnino(path: str) -> columns.Table:
    """One row a month, of a file with one row a year."""
    import numpy as np
    import pyarrow as pa

    years = columns.read(path, ["YEAR", *_MONTHS])
    months = [f"{year}-{month:02}" for year in years.words("YEAR") for month in range(1, len(_MONTHS) + 1)]
    values = np.stack([years.numbers(month) for month in _MONTHS], axis=1).ravel()
    return columns.Table(path, pa.table({_TIME: months, _TARGET: values}), 1)


def _settings(options: Options) -> list[Any]:
    return [FORMAT, options.source == ELNINO, all_but("source", options)]


def _prepare(options: Options, cache: Path) -> Path:
    path = _path(options)
    return keep(cache, "series", _settings(options), [path], lambda: sha256(path), partial(_convert, options, path))


def _convert(options: Options, path: str, folder: Path) -> dict[str, Any]:
    import numpy as np

    assert options.target is not None and options.features is not None
    names = list(dict.fromkeys([*options.features, options.target]))
    if options.source == ELNINO:
        table = _elnino(path)
    else:
        table = columns.read(path, [*names, *([options.time] if options.time else [])])
    if options.time:
        table.check_order(options.time)
    values = np.stack([table.numbers(name, may_miss=options.missing == "previous") for name in names], axis=1)
    if options.missing == "previous":
        values = _filled(values, names, path)
    cut = len(values) - round(len(values) * options.held_out)
    length, needed = options.sequence_length, options.sequence_length + options.horizon
    for rows, what in ((cut, "train on"), (len(values) - cut, "hold out")):
        if rows < needed:
            raise InputError(
                f"data.source: {path} has {len(values)} rows, of which {rows} are to {what}, and a window is {needed}"
                f" (sequence_length {length} + horizon {options.horizon}); give more rows, another held_out or shorter"
                " windows"
            )
    mean, std = values[:cut].mean(axis=0), values[:cut].std(axis=0)
    std = np.where(std > 1e-12 * np.maximum(np.abs(mean), 1e-12), std, 1.0)
    scaled = ((values - mean) / std).astype(np.float32)
    place = names.index(options.target)
    scaled[:, : len(options.features)].tofile(folder / "inputs.bin")
    scaled[:, place].tofile(folder / "target.bin")
    return {
        "format": FORMAT,
        "num_train": cut,
        "target": {"mean": float(mean[place]), "std": float(std[place])},
        "loss": _yardsticks(options, scaled[:, place].astype(np.float64), cut),
    }


def _yardsticks(options: Options, target: "np.ndarray", cut: int) -> dict[str, float]:
    """Mean squared errors of simple forecasts over all held-out windows; `target` [time steps] is held out from `cut`.

    Raises `InputError` for a season that is longer than what comes before.
    """
    import numpy as np

    steps = np.arange(options.horizon)
    # The first time step that is predicted, of each window.
    begins = np.arange(cut + options.sequence_length, len(target) - options.horizon + 1)[:, None]
    came = target[begins + steps]
    forecasts = {"the last value again": target[begins - 1], "always the mean": 0.0}
    if options.season is not None:
        if options.season > cut:
            raise InputError(
                f"data.season is {options.season} time steps, and there are {cut} to train on; give a shorter one, or"
                " leave it out"
            )
        means = np.array([target[place : cut : options.season].mean() for place in range(options.season)])
        forecasts["the last season again"] = target[begins - options.season + steps % options.season]
        forecasts["the mean of this time in all seasons"] = means[(begins + steps) % options.season]
    return {name: float(((forecast - came) ** 2).mean()) for name, forecast in forecasts.items()}


def _filled(values: "np.ndarray", names: Sequence[str], path: str) -> "np.ndarray":
    """With the value before it where one is missing."""
    import numpy as np

    missing = np.isnan(values)
    if missing[0].any():
        raise InputError(
            f"data: {path} begins with an empty cell in column {names[int(missing[0].argmax())]!r}, which has none"
            " before it; leave out its first rows"
        )
    rows = np.where(missing, 0, np.arange(len(values))[:, None])
    return np.take_along_axis(values, np.maximum.accumulate(rows, axis=0), axis=0)
