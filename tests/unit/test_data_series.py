"""Time series: windows in the order of time, what is held out, yardsticks, and how mistakes are told."""

import csv
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from dtrain.data import DataShape, series
from dtrain.data.order import draws
from dtrain.data.series import Options, SeriesSource
from dtrain.errors import InputError


def opened(cache: Path, **words: object) -> SeriesSource:
    options = series.resolve(Options(**words), Path("/"))
    series.prepare(options, cache)
    return series.open(options, cache)


def everything(windows: series.Windows) -> dict[str, np.ndarray]:
    number = windows.num_samples
    return windows.batch(np.arange(number), draws(0, np.arange(number, dtype=np.uint64)))


@pytest.fixture
def ramp(tmp_path: Path) -> Path:
    """100 hours: a column that counts them, one of its negatives, an empty cell in each at hour 50."""
    lines = ["when,up,down"]
    for hour in range(100):
        cells = f"{hour},{-hour}" if hour != 50 else ","
        lines.append(f"2024-01-{1 + hour // 24:02d} {hour % 24:02d}:00:00,{cells}")
    (tmp_path / "ramp.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "ramp.csv"


WORDS = {"target": "up", "time": "when", "missing": "previous", "sequence_length": 6, "horizon": 3}


def test_the_default_is_measured_weather_and_needs_nothing(tmp_path: Path) -> None:
    assert series.describe(Options()) == DataShape("series", sequence_length=28, num_features=4, horizon=7)
    source = opened(tmp_path)
    with Path(series.__file__).with_name("seattle_weather.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert (rows[0]["date"], rows[-1]["date"], len(rows)) == ("2012-01-01", "2015-12-31", 4 * 365 + 1)
    train = source.train.batch(np.array([0, 500]), np.zeros(2, dtype=np.uint64))
    assert train["inputs"].shape == (2, 28, 4)
    assert train["targets"].shape == (2, 7)
    assert train["inputs"].dtype == train["targets"].dtype == np.float32
    expected = [float(row["temp_max"]) for row in rows[528:535]]
    assert np.allclose(source.to_target(train["targets"][1]), expected, atol=1e-4)
    assert np.allclose(
        source.to_target(train["inputs"][1, :, 1]), [float(r["temp_max"]) for r in rows[500:528]], atol=1e-4
    )
    losses = source.yardsticks()["loss"]
    assert 0.3 < losses["the last value again"] < 0.5 < losses["always the mean"]


def test_the_end_is_held_out_and_shares_no_time_step(tmp_path: Path, ramp: Path) -> None:
    source = opened(tmp_path / "cache", source=str(ramp), **WORDS)
    assert source.features == ("up", "down")
    assert source.train.num_samples == 80 - 9 + 1
    assert source.held_out.num_samples == 20 - 9 + 1
    hours = [
        {
            int(hour)
            for batch in [everything(part)]
            for hour in np.rint(source.to_target(np.r_[batch["inputs"][..., 0].ravel(), batch["targets"].ravel()]))
        }
        for part in (source.train, source.held_out)
    ]
    assert hours == [set(range(80)) - {50}, set(range(80, 100))]
    # Held-out windows are numbered without pattern, each once.
    starts = np.rint(source.to_target(everything(source.held_out)["inputs"][:, 0, 0])).astype(int).tolist()
    assert sorted(starts) == list(range(80, 92))
    assert starts != sorted(starts)


def test_windows_join_past_and_future(tmp_path: Path, ramp: Path) -> None:
    source = opened(tmp_path / "cache", source=str(ramp), **WORDS)
    batch = source.train.batch(np.array([3, 3, 60]), np.zeros(3, dtype=np.uint64))
    assert np.allclose(source.to_target(batch["inputs"][..., 0]), [[*range(3, 9)]] * 2 + [[*range(60, 66)]], atol=1e-4)
    assert np.allclose(source.to_target(batch["targets"]), [[9, 10, 11]] * 2 + [[66, 67, 68]], atol=1e-4)
    assert np.allclose(source.to_target(batch["last"]), [8, 8, 65], atol=1e-4)
    assert np.allclose(batch["inputs"][..., 0], -batch["inputs"][..., 1])


def test_a_missing_number_is_the_one_before_where_that_is_asked_for(tmp_path: Path, ramp: Path) -> None:
    source = opened(tmp_path / "cache", source=str(ramp), **WORDS)
    batch = source.train.batch(np.array([48]), np.zeros(1, dtype=np.uint64))
    assert np.allclose(source.to_target(batch["inputs"][0, :, 0]), [48, 49, 49, 51, 52, 53], atol=1e-4)
    with pytest.raises(InputError, match=r"ramp.csv, column 'up', row 52 has no number"):
        opened(tmp_path / "cache", source=str(ramp), **{**WORDS, "missing": "refuse"})


def test_yardsticks_are_the_losses_of_those_forecasts(tmp_path: Path) -> None:
    source = opened(tmp_path, sequence_length=10, horizon=4)
    batch = everything(source.held_out)
    last = batch["last"][:, None]
    assert (last == batch["inputs"][:, -1:, source.features.index("temp_max")]).all()
    losses = source.yardsticks()["loss"]
    assert losses["the last value again"] == pytest.approx(((batch["targets"] - last) ** 2).mean(), rel=1e-5)
    assert losses["always the mean"] == pytest.approx((batch["targets"] ** 2).mean(), rel=1e-5)


def test_statistics_are_of_the_training_steps_alone(tmp_path: Path) -> None:
    source = opened(tmp_path, sequence_length=1, horizon=1)
    seen = everything(source.train)["inputs"][:, 0]
    assert np.abs(seen.mean(axis=0)).max() < 0.01
    assert np.abs(seen.std(axis=0) - 1).max() < 0.01
    assert np.abs(everything(source.held_out)["inputs"].mean(axis=(0, 1))).max() > 0.01


def test_the_target_need_not_be_a_feature(tmp_path: Path) -> None:
    source = opened(tmp_path, features=["wind"])
    other = opened(tmp_path)
    draw = np.zeros(2, dtype=np.uint64)
    found, expected = (one.train.batch(np.array([0, 9]), draw) for one in (source, other))
    assert (found["targets"] == expected["targets"]).all()
    assert (found["inputs"][..., 0] == expected["inputs"][..., 3]).all()


def test_features_are_read_from_the_header_while_planning(tmp_path: Path, ramp: Path) -> None:
    options = series.resolve(Options(source=ramp.name, **WORDS), ramp.parent)
    assert options.features == ("up", "down")
    assert options.source == str(ramp)
    assert series.describe(options).num_features == 2
    words = {**WORDS, "source": str(tmp_path / "none.parquet")}
    assert series.describe(series.resolve(Options(features=["up"], **words), Path("/"))).num_features == 1
    with pytest.raises(InputError, match=r"leads to no file .*; to plan without it, list data.features"):
        series.resolve(Options(**words), Path("/"))


def test_parquet_with_timestamps_is_the_same(tmp_path: Path, ramp: Path) -> None:
    from pyarrow import csv as arrow_csv
    from pyarrow import parquet

    read = arrow_csv.read_csv(ramp)
    assert str(read.schema.field("when").type).startswith("timestamp")
    parquet.write_table(read, tmp_path / "ramp.parquet")
    one, other = (opened(tmp_path / "cache", source=str(path), **WORDS) for path in (ramp, tmp_path / "ramp.parquet"))
    for name, array in everything(one.train).items():
        assert (array == everything(other.train)[name]).all()


def test_draws_change_nothing(tmp_path: Path) -> None:
    source = opened(tmp_path)
    index = np.array([5, 6])
    first, second = (source.train.batch(index, np.full(2, n, dtype=np.uint64)) for n in (1, 2))
    assert (first["inputs"] == second["inputs"]).all()


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"target": "temp"}, r"data.target: seattle_weather has no column 'temp'; did you mean 'temp_m"),
        ({"features": ["winds"]}, r"data.features: seattle_weather has no column 'winds'; did you mean 'wind'"),
        ({"time": "day"}, r"data.time: the time of seattle_weather is in 'date'"),
        ({"source": "x.csv"}, r"data.target must be given for x.csv"),
        ({"source": "x.csv", "target": "y", "time": "t", "features": ["t"]}, r"each once, and not data.time"),
    ],
)
def test_options_that_do_not_go_together_are_told_while_planning(words: dict, message: str) -> None:
    for plan in (series.describe, lambda options: series.resolve(options, Path("/"))):
        with pytest.raises(InputError, match=message):
            plan(Options(**words))


@pytest.mark.parametrize("words", [{"horizon": 0}, {"sequence_length": 0}, {"held_out": 0.0}, {"missing": "skip"}])
def test_options_out_of_bounds_are_refused(words: dict) -> None:
    with pytest.raises(ValidationError):
        Options(**words)


@pytest.mark.parametrize(
    ("data", "words", "message"),
    [
        ("t,y\n1,5\n2,6\n2,7\n", {}, r"column 't', row 4 has 2 after 2; sort the file by time"),
        ("t,y\n2024-01-02,5\n2024-01-01,6\n", {}, r"column 't', row 3 has 2024-01-01 after 2024-01-02"),
        ("t,y\n9,5\n10,6\n1x,7\n", {}, r"column 't', row 4 has '1x', which is no number"),
        ("t,y\n1,5\n2,x\n", {}, r"column 'y', row 3 has 'x', which is no number"),
        ("t,z\n1,5\n", {}, r"data.target: .*s.csv has no column 'y'; there is: t, z"),
        ("y\n1\n", {}, r"data.time: .*s.csv has no column 't'"),
        ("t,y\n1,5\n2,6\n", {}, r"has 2 rows, of which 2 are to train on, and a window is 35 \(sequence_length 28 \+"),
        ("t,y\n" + "".join(f"{n},{n}\n" for n in range(60)), {}, r"has 60 rows, of which 12 are to hold out"),
        ("t,y\n1,\n2,6\n", {"missing": "previous"}, r"begins with an empty cell in column 'y'"),
        ("", {}, r"s.csv is empty"),
    ],
)
def test_files_that_are_wrong_are_told(tmp_path: Path, data: str, words: dict, message: str) -> None:
    (tmp_path / "s.csv").write_text(data)
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "cache", source=str(tmp_path / "s.csv"), target="y", time="t", **words)


def test_several_files_are_no_series(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("y\n1\n2\n")
    with pytest.raises(InputError, match=r"leads to 2 files; a series is in one"):
        opened(tmp_path / "cache", source=str(tmp_path), target="y")
