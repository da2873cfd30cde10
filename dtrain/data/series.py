"""Time series: windows of the past, from which the next values of one column are predicted.

`seattle_weather.csv`, the default, is the weather at Seattle measured on each day of 2012 to 2015 (precipitation in mm,
highest and lowest temperature in degrees Celsius, wind): of NOAA's National Climatic Data Center, in the public domain
as a work of the government of the United States, in the selection of the project vega-datasets.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt

from dtrain import component
from dtrain.data import DataShape, columns
from dtrain.data.holding import shuffled
from dtrain.data.kept import find, keep, sha256
from dtrain.data.prepared import read_meta
from dtrain.errors import InputError

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
"""Raise when the same series would be prepared differently."""
SEATTLE_WEATHER = "seattle_weather"
_SEATTLE = {
    "source": str(Path(__file__).with_name("seattle_weather.csv")),
    "target": "temp_max",
    "time": "date",
    "features": ("precipitation", "temp_max", "temp_min", "wind"),
}


class Options(component.Options):
    """A time series from a CSV or Parquet file: from the last steps, the next values of a column are predicted."""

    source: str = SEATTLE_WEATHER
    """`seattle_weather`, daily measurements of four years that dtrain brings along, or your own CSV or Parquet file,
    one row a time step, in the order of time."""
    target: str | None = None
    """Column whose next values are predicted; `temp_max` of seattle_weather."""
    time: str | None = None
    """Column with the time, checked to rise from row to row; it is not predicted from."""
    features: tuple[str, ...] | None = None
    """Columns with numbers to predict from; by default all but the time, with the target among them. Where the file is
    not at hand when a job is planned, they must be listed."""
    sequence_length: PositiveInt = Field(default=28, le=2**16)
    """Time steps that a prediction is made from."""
    horizon: PositiveInt = Field(default=7, le=2**16)
    """Time steps that are predicted, the next ones."""
    missing: Literal["refuse", "previous"] = "refuse"
    """What is done where a number is missing: stop, or take the one before it."""
    held_out: Annotated[float, Field(gt=0.0, le=0.5)] = 0.2
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
    if options.source == SEATTLE_WEATHER:
        return options
    options = options.model_copy(update={"source": columns.resolved(options.source, folder)[0]})
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
        """Changes with the series, the columns chosen and the windows."""
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
        """Mean squared errors, in the units of the targets, of saying the last value again and of the training mean."""
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
    if options.source == SEATTLE_WEATHER:
        known: Sequence[str] = _SEATTLE["features"]
        for key, names in (("target", [options.target]), ("features", options.features or ())):
            for name in names:
                if name is not None and name not in known:
                    raise InputError(
                        f"data.{key}: {SEATTLE_WEATHER} has no column {name!r}{component.suggestion(name, known)}"
                    )
        if options.time not in (None, _SEATTLE["time"]):
            raise InputError(
                f"data.time: the time of {SEATTLE_WEATHER} is in {_SEATTLE['time']!r}; leave data.time out"
            )
        return options.model_copy(
            update={
                "target": options.target or _SEATTLE["target"],
                "time": _SEATTLE["time"],
                "features": options.features or _SEATTLE["features"],
            }
        )
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
    return options.model_copy(update={"features": tuple(name for name in names if name != options.time)})


def _path(options: Options) -> str:
    if options.source == SEATTLE_WEATHER:
        return str(_SEATTLE["source"])
    found = columns.find(options.source)
    if len(found) > 1:
        raise InputError(f"data.source: {options.source} leads to {len(found)} files; a series is in one: name that")
    return found[0]


def _settings(options: Options) -> list[Any]:
    return [FORMAT, options.model_dump(exclude={"source"})]


def _prepare(options: Options, cache: Path) -> Path:
    path = _path(options)
    return keep(cache, "series", _settings(options), [path], lambda: sha256(path), partial(_convert, options, path))


def _convert(options: Options, path: str, folder: Path) -> dict[str, Any]:
    import numpy as np

    assert options.target is not None and options.features is not None
    names = list(dict.fromkeys([*options.features, options.target]))
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
    target = scaled[cut:, place].astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(target[length - 1 :], options.horizon + 1)
    return {
        "format": FORMAT,
        "num_train": cut,
        "target": {"mean": float(mean[place]), "std": float(std[place])},
        "loss": {
            "the last value again": float(((windows[:, 1:] - windows[:, :1]) ** 2).mean()),
            "always the mean": float((windows[:, 1:] ** 2).mean()),
        },
    }


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
