"""Time series: windows in the order of time, what is held out, yardsticks, and how mistakes are told."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from msgspec import ValidationError

from dtrain.data import DataShape, series
from dtrain.data.order import draws
from dtrain.data.series import Options, SeriesSource
from dtrain.errors import InputError


def opened(cache: Path, **words: object) -> SeriesSource:
    options = series.resolve(Options(**words), Path("/"))
    series.prepare(options, cache)
    return series.open(options, cache)


def elnino() -> Path:
    statsmodels = importlib.util.find_spec("statsmodels")
    assert statsmodels is not None and statsmodels.origin is not None
    return Path(statsmodels.origin).parent / "datasets" / "elnino" / "elnino.csv"


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


def test_the_default_is_a_measured_series(tmp_path: Path) -> None:
    assert series.describe(Options()) == DataShape("series", sequence_length=24, num_features=1, horizon=6)
    source = opened(tmp_path)
    assert source.train.num_samples == 586 - 30 + 1
    assert source.held_out.num_samples == 146 - 30 + 1
    batch = source.train.batch(np.array([0, 500]), np.zeros(2, dtype=np.uint64))
    assert batch["inputs"].shape == (2, 24, 1)
    assert batch["targets"].shape == (2, 6)
    assert batch["inputs"].dtype == batch["targets"].dtype == np.float32
    with elnino().open() as stream:
        years = list(csv.DictReader(stream))
    assert [int(year["YEAR"]) for year in years] == [*range(1950, 2011)]
    names = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]
    months = [float(year[name]) for year in years for name in names]
    for row, start in enumerate((0, 500)):
        assert np.allclose(source.to_target(batch["inputs"][row, :, 0]), months[start : start + 24], atol=1e-4)
        assert np.allclose(source.to_target(batch["targets"][row]), months[start + 24 : start + 30], atol=1e-4)
    losses = source.yardsticks()["loss"]
    assert sorted(losses, key=losses.__getitem__) == [
        "the mean of this time in all seasons",
        "the last season again",
        "always the mean",
        "the last value again",
    ]


def test_the_package_of_the_default_is_read_and_never_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dtrain.data import series\n"
        f"series.prepare(series.resolve(series.Options(), Path('/')), Path({str(tmp_path)!r}))\n"
        "print(*(name for name in ('statsmodels', 'scipy', 'torch') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    assert list(tmp_path.glob("series-*/meta.json"))


def test_the_default_needs_its_package_to_train_not_to_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options = series.resolve(Options(), Path("/"))
    assert series.describe(options).num_features == 1
    for read in (series.prepare, series.open):
        with pytest.raises(InputError, match=r"statsmodels, which is not installed here; run: pip install 'dtrain\["):
            read(options, tmp_path)


def test_the_same_file_as_your_own_is_read_as_it_is(tmp_path: Path) -> None:
    known = opened(tmp_path)
    assert known.features == ("temperature",)
    words = {"target": "temperature", "time": "month", "features": ["temperature"], "season": 12}
    with pytest.raises(InputError, match=r"elnino.csv has no column 'temperature'"):
        opened(tmp_path, source=str(elnino()), **words)


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
    assert (last == batch["inputs"][:, -1:, 0]).all()
    losses = source.yardsticks()["loss"]
    assert len(losses) == 4
    assert losses["the last value again"] == pytest.approx(((batch["targets"] - last) ** 2).mean(), rel=1e-5)
    assert losses["always the mean"] == pytest.approx((batch["targets"] ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize("horizon", [1, 5, 14, 25])
def test_the_last_season_is_the_one_before_the_forecast(tmp_path: Path, horizon: int) -> None:
    source = opened(tmp_path, sequence_length=12, horizon=horizon)
    batch = everything(source.held_out)
    # Twelve steps are one season: what is predicted goes round and round in them.
    forecast = np.tile(batch["inputs"][..., 0], 3)[:, :horizon]
    loss = source.yardsticks()["loss"]["the last season again"]
    assert loss == pytest.approx(((batch["targets"] - forecast) ** 2).mean(), rel=1e-5)


def test_the_mean_of_a_season_is_of_the_training_steps_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    values = [n % 4 + (100 if n >= 81 else 0) for n in range(101)]  # the last 20 are held out
    path.write_text("y\n" + "".join(f"{value}\n" for value in values))
    words = {"source": str(path), "target": "y", "sequence_length": 5, "horizon": 3, "season": 4}
    source = opened(tmp_path / "cache", **words)
    scale = source.to_target(np.ones(1)) - source.to_target(np.zeros(1))
    loss = source.yardsticks()["loss"]["the mean of this time in all seasons"]
    assert loss == pytest.approx((100 / scale[0]) ** 2, rel=1e-6)


def test_a_season_may_be_longer_than_a_window(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("y\n" + "".join(f"{(n % 30) ** 2}\n" for n in range(100)))
    words = {"source": str(path), "target": "y", "sequence_length": 5, "horizon": 3}
    assert opened(tmp_path / "cache", **words).yardsticks()["loss"].keys() == {
        "the last value again",
        "always the mean",
    }
    losses = [opened(tmp_path / "cache", season=n, **words).yardsticks()["loss"] for n in (29, 30)]
    assert losses[0]["the last season again"] > losses[1]["the last season again"] == 0.0
    with pytest.raises(InputError, match=r"data.season is 81 time steps, and there are 80 to train on"):
        opened(tmp_path / "cache", season=81, **words)


def test_statistics_are_of_the_training_steps_alone(tmp_path: Path) -> None:
    source = opened(tmp_path, sequence_length=1, horizon=1)
    seen = everything(source.train)["inputs"][:, 0]
    assert np.abs(seen.mean(axis=0)).max() < 0.01
    assert np.abs(seen.std(axis=0) - 1).max() < 0.01
    assert np.abs(everything(source.held_out)["inputs"].mean(axis=(0, 1))).max() > 0.01


def test_the_target_need_not_be_a_feature(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("x,y\n" + "".join(f"{n},{n * n % 7}\n" for n in range(100)))
    words = {"source": str(path), "target": "y", "sequence_length": 6, "horizon": 3}
    draw = np.zeros(2, dtype=np.uint64)
    found, expected = (
        opened(tmp_path / "cache", **words, **more).train.batch(np.array([0, 9]), draw)
        for more in ({"features": ["x"]}, {})
    )
    assert (found["targets"] == expected["targets"]).all()
    assert (found["inputs"] == expected["inputs"][..., :1]).all()
    assert found["inputs"].shape == (2, 6, 1)


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


def test_months_are_times(tmp_path: Path) -> None:
    months = [f"{1990 + n // 12}-{1 + n % 12:02d}" for n in range(60)]
    words = {"source": str(tmp_path / "s.csv"), "target": "y", "time": "month", "sequence_length": 4, "horizon": 2}
    (tmp_path / "s.csv").write_text("month,y\n" + "".join(f"{month},{n}\n" for n, month in enumerate(months)))
    assert opened(tmp_path / "cache", **words).features == ("y",)
    months[7], months[8] = months[8], months[7]
    (tmp_path / "s.csv").write_text("month,y\n" + "".join(f"{month},{n}\n" for n, month in enumerate(months)))
    with pytest.raises(InputError, match=r"column 'month', row 10 has 1990-08 after 1990-09; sort the file by time"):
        opened(tmp_path / "cache", **words)


def test_draws_change_nothing(tmp_path: Path) -> None:
    source = opened(tmp_path)
    index = np.array([5, 6])
    first, second = (source.train.batch(index, np.full(2, n, dtype=np.uint64)) for n in (1, 2))
    assert (first["inputs"] == second["inputs"]).all()


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"target": "temp"}, r"data.target: elnino has no column 'temp'; there is: temperature"),
        ({"features": ["temperatur"]}, r"data.features: elnino has no column 'temperatur'; did you mean 'temperature'"),
        ({"time": "day"}, r"data.time: the time of elnino is in 'month'; leave data.time out"),
        ({"source": "x.csv"}, r"data.target must be given for x.csv"),
        ({"source": "x.csv", "target": "y", "time": "t", "features": ["t"]}, r"each once, and not data.time"),
    ],
)
def test_options_that_do_not_go_together_are_told_while_planning(words: dict, message: str) -> None:
    for plan in (series.describe, lambda options: series.resolve(options, Path("/"))):
        with pytest.raises(InputError, match=message):
            plan(Options(**words))


@pytest.mark.parametrize(
    "words", [{"horizon": 0}, {"season": 0}, {"sequence_length": 0}, {"held_out": 0.0}, {"missing": "skip"}]
)
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
        ("t,y\n1,5\n2,6\n", {}, r"has 2 rows, of which 2 are to train on, and a window is 30 \(sequence_length 24 \+"),
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
