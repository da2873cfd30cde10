"""Tables: which rows are held out, how columns become features, and how mistakes are told."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from msgspec import ValidationError

from dtrain.data import DataShape, table
from dtrain.data.order import draws
from dtrain.data.table import Options, TableSource
from dtrain.errors import InputError


def opened(cache: Path, **words: object) -> TableSource:
    options = table.resolve(Options(**words), Path("/"))
    table.prepare(options, cache)
    return table.open(options, cache)


def everything(rows: table.Rows) -> dict[str, np.ndarray]:
    return rows.batch(np.arange(rows.num_samples), draws(0, np.arange(rows.num_samples, dtype=np.uint64)))


def write(path: Path, num_rows: int = 50) -> Path:
    """Houses: two numbers, a word, a class, a price."""
    random = np.random.default_rng(0)
    lines = ["area,rooms,town,kind,price"]
    for number in range(num_rows):
        area, rooms = random.normal(100, 20), random.integers(1, 6)
        town = ["Ulm", "Ulm", "Bonn", "Ulm", "Kiel", "Bonn"][number % 6]
        lines.append(f"{area:.3f},{rooms},{town},{'abc'[number % 3]},{3 * area + rooms:.3f}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def houses(tmp_path: Path) -> Path:
    return write(tmp_path / "houses.csv")


# Tables that come along


@pytest.mark.parametrize(
    ("name", "loader"),
    [("breast_cancer", "load_breast_cancer"), ("iris", "load_iris"), ("wine", "load_wine"), ("diabetes", "")],
)
def test_tables_that_come_along_are_scikit_learns(tmp_path: Path, name: str, loader: str) -> None:
    from sklearn import datasets

    expected = getattr(datasets, loader)() if loader else datasets.load_diabetes(scaled=False)
    shape = table.describe(Options(source=name))
    assert shape == DataShape(
        "table", num_classes=len(expected.get("target_names", ())), num_features=expected.data.shape[1]
    )
    source = opened(tmp_path, source=name)
    train, held_out = everything(source.train), everything(source.held_out)
    assert source.train.num_samples + source.held_out.num_samples == len(expected.data)
    assert np.allclose(train["features"].mean(axis=0), 0, atol=1e-5)
    assert np.allclose(train["features"].std(axis=0), 1, atol=1e-5)
    assert train["features"].dtype == np.float32
    # Standardizing keeps which row is like which: correlations of all columns and the target are those of the original.
    both = np.concatenate([train["features"], held_out["features"]])
    targets = np.r_[train["targets"], held_out["targets"]]
    if loader:
        assert targets.dtype == np.int64
        names = np.array(source.classes)[targets]
        original = expected.target_names[expected.target]
        assert sorted(names) == sorted(original)
        found, wanted = names == source.classes[0], original == source.classes[0]
    else:
        assert targets.dtype == np.float32
        assert np.allclose(np.sort(source.to_target(targets)), np.sort(expected.target), atol=1e-3)
        found, wanted = targets, expected.target
    assert np.allclose(np.corrcoef(both.T, found), np.corrcoef(expected.data.T, wanted), atol=1e-4)
    assert [name.lower() for name in source.features][:1] == [expected.feature_names[0].replace(" (cm)", "")]


def test_the_names_of_the_default_are_scikit_learns() -> None:
    from sklearn.datasets import load_breast_cancer

    assert table.resolve(Options(), Path("/")).features == tuple(load_breast_cancer().feature_names)


# Files


def test_classes_and_words_from_a_file(tmp_path: Path, houses: Path) -> None:
    source = opened(
        tmp_path / "cache", source=str(houses), target="kind", num_classes=3, features=["area"], categories={"town": 2}
    )
    assert source.features == ("area", "town=Ulm", "town=Bonn")
    assert source.classes == ("a", "b", "c")
    train, held_out = everything(source.train), everything(source.held_out)
    assert train["features"].shape == (41, 3)
    assert held_out["features"].shape == (9, 3)
    assert np.bincount(held_out["targets"]).tolist() == [3, 3, 3]
    rows = [line.split(",") for line in houses.read_text().splitlines()[1:]]
    areas = np.array([float(row[0]) for row in rows])
    order = np.argsort(areas)
    for part in (train, held_out):
        # The area tells which row it is, since standardizing keeps the order.
        both = np.concatenate([train["features"][:, 0], held_out["features"][:, 0]])
        for features, target in zip(part["features"], part["targets"], strict=True):
            row = rows[order[(both < features[0]).sum()]]
            assert "abc"[target] == row[3]
            assert features[1:].tolist() == [row[2] == "Ulm", row[2] == "Bonn"]


def test_a_number_is_predicted_without_classes(tmp_path: Path, houses: Path) -> None:
    options = table.resolve(Options(source=str(houses), target="price", features=["area", "rooms"]), Path("/"))
    assert table.describe(options) == DataShape("table", num_features=2)
    source = opened(tmp_path / "cache", source=str(houses), target="price", features=["area", "rooms"])
    losses = source.yardsticks()["loss"]
    assert losses["linear regression"] < 1e-5 < losses["always the mean"]
    held = everything(source.held_out)
    assert losses["always the mean"] == pytest.approx((held["targets"] ** 2).mean(), rel=1e-5)
    prices = {float(line.split(",")[-1]) for line in houses.read_text().splitlines()[1:]}
    found = np.r_[source.to_target(everything(source.train)["targets"]), source.to_target(held["targets"])]
    assert np.allclose(np.sort(found), sorted(prices), rtol=1e-5)


def test_features_are_read_from_the_header_while_planning(houses: Path) -> None:
    words = {"target": "price", "categories": {"town": 3, "kind": 3}}
    for source, folder in ((str(houses), "/"), (houses.name, houses.parent)):
        options = table.resolve(Options(source=source, **words), Path(folder))
        assert options.features == ("area", "rooms")
        assert options.source == (str(houses),)
        assert table.describe(options).num_features == 8
    assert table.resolve(options, Path("/elsewhere")) == options


def test_planning_with_listed_features_needs_no_file(tmp_path: Path) -> None:
    words = {"source": str(tmp_path / "none.csv"), "target": "y", "num_classes": 2}
    assert table.describe(table.resolve(Options(features=["a", "b"], **words), Path("/"))).num_features == 2
    with pytest.raises(InputError, match=r"none.csv' leads to no file .*; to plan without it, list data.features"):
        table.resolve(Options(**words), Path("/"))
    with pytest.raises(InputError, match=r"data.features must be listed where .*none.csv is not at hand"):
        table.describe(Options(**words))


def test_parquet_and_several_files_are_the_same_rows(tmp_path: Path, houses: Path) -> None:
    from pyarrow import csv, parquet

    whole = csv.read_csv(houses)
    parts = tmp_path / "parts"
    parts.mkdir()
    parquet.write_table(whole.slice(0, 20), parts / "0.parquet")
    parquet.write_table(whole.slice(20), parts / "1.parquet")
    words = {"target": "price", "categories": {"town": 3, "kind": 3}}
    one, other = (opened(tmp_path / "cache", source=str(source), **words) for source in (houses, parts))
    for part in ("train", "held_out"):
        found, expected = everything(getattr(other, part)), everything(getattr(one, part))
        assert np.allclose(found["features"], expected["features"])
        assert np.allclose(found["targets"], expected["targets"])


def test_what_is_held_out_does_not_depend_on_the_order_of_rows(tmp_path: Path, houses: Path) -> None:
    words = {"target": "kind", "num_classes": 3, "features": ["area", "rooms"]}
    first = opened(tmp_path / "cache", source=str(houses), **words)
    head, *rows = houses.read_text().splitlines()
    houses.write_text("\n".join([head, *rows[::-1]]) + "\n")
    second = opened(tmp_path / "cache", source=str(houses), **words)
    assert second.fingerprint != first.fingerprint
    held = [
        {row.tobytes() for row in np.round(everything(source.held_out)["features"], 4)} for source in (first, second)
    ]
    assert held[0] == held[1]


def test_equal_rows_stand_on_one_side(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("x,y\n" + "".join(f"{n % 25},{n % 2}\n" for n in range(100)))
    source = opened(tmp_path / "cache", source=str(path), target="y", num_classes=2)
    train, held = ({row.tobytes() for row in everything(part)["features"]} for part in (source.train, source.held_out))
    assert held
    assert not train & held


def test_words_are_learnt_from_the_training_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("word,y\n" + "".join(f"w{n},{n % 2}\n" for n in range(50)))
    source = opened(
        tmp_path / "cache", source=str(path), target="y", num_classes=2, features=[], categories={"word": 60}
    )
    assert source.train.num_samples == 40
    assert sum(not name.endswith("=?") for name in source.features) == 40
    assert everything(source.train)["features"].sum() == 40
    assert everything(source.held_out)["features"].sum() == 0


def test_statistics_are_of_the_training_rows_alone(tmp_path: Path, houses: Path) -> None:
    words = {"source": str(houses), "target": "price", "features": ["area"], "categories": {"town": 3}}
    source = opened(tmp_path / "cache", **words)
    features = everything(source.train)["features"]
    assert abs(features[:, 0].mean()) < 1e-5
    assert abs(features[:, 0].std() - 1) < 1e-5
    assert abs(everything(source.held_out)["features"][:, 0].mean()) > 1e-3


def test_missing_numbers_are_the_mean_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("x,z,y\n" + "".join(f"{n if n % 5 else ''},{n},{n % 2}\n" for n in range(40)))
    words = {"source": str(path), "target": "y", "num_classes": 2}
    with pytest.raises(InputError, match=r"t.csv, column 'x', row 2 has no number; correct it"):
        opened(tmp_path / "cache", **words)
    source = opened(tmp_path / "cache", missing="mean", **words)
    features = np.concatenate([everything(part)["features"] for part in (source.train, source.held_out)])
    assert (features[:, 0] == 0).sum() == 8
    assert np.isfinite(features).all()


def test_a_column_that_never_changes_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("x,z,y\n" + "".join(f"0.1,{n},{n % 2}\n" for n in range(40)))
    source = opened(tmp_path / "cache", source=str(path), target="y", num_classes=2)
    assert np.abs(everything(source.held_out)["features"][:, 0]).max() < 1e-6


def test_planning_loads_nothing_heavy(houses: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dtrain.data import table, series, images\n"
        f"options = table.resolve(table.Options(source={str(houses)!r}, target='price'), Path('/'))\n"
        "table.describe(options), table.describe(table.Options())\n"
        "series.describe(series.Options()), images.describe(images.Options())\n"
        "heavy = ('numpy', 'pyarrow', 'PIL', 'sklearn', 'statsmodels', 'torch')\n"
        "print(*(name for name in heavy if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"num_classes": 3}, r"breast_cancer has 2 classes in 'diagnosis' to predict; leave data.target and"),
        ({"source": "diabetes", "target": "bmi"}, r"diabetes has a number in 'progression' to predict"),
        ({"features": ["mean radios"]}, r"breast_cancer has no column 'mean radios'; did you mean 'mean radius'"),
        ({"categories": {"x": 2}}, r"data.categories: breast_cancer has numbers only"),
        ({"source": "x.csv"}, r"data.target must be given for x.csv: .* `target: price`"),
        (
            {"source": "x.csv", "target": "y", "features": ["y"]},
            r"column 'y' is named twice in features, categories and",
        ),
        ({"source": "x.csv", "target": "y", "features": []}, r"data.features is empty; list the columns"),
    ],
)
def test_options_that_do_not_go_together_are_told_while_planning(words: dict, message: str) -> None:
    for plan in (table.describe, lambda options: table.resolve(options, Path("/"))):
        with pytest.raises(InputError, match=message):
            plan(Options(**words))


@pytest.mark.parametrize("words", [{"num_classes": 1}, {"categories": {"a": 0}}, {"held_out": 0.6}, {"sorce": "x"}])
def test_options_out_of_bounds_are_refused(words: dict) -> None:
    with pytest.raises(ValidationError):
        Options(**words)


@pytest.mark.parametrize(
    ("data", "words", "message"),
    [
        ("", {}, r"t.csv is empty; give a file with a header and rows"),
        ("a,b,y\n", {}, r"t.csv has columns and no row"),
        ("a,a,y\n1,2,3\n", {}, r"t.csv has more than one column 'a'"),
        ("a,b,z\n1,2,3\n", {}, r"data.target: .*t.csv has no column 'y'; there is: a, b, z"),
        ("a,b,y\n1,2,3\n", {"features": ["a", "bb"]}, r"t.csv has no column 'bb'; .*; name another, or take it out"),
        ("a,b,y\n1,2,3\n4,five,6\n", {}, r"t.csv, column 'b', row 3 has 'five', which is no number; correct it"),
        ("a,b,y\n1,2,3\n4,,6\n", {}, r"t.csv, column 'b', row 3 has no number"),
        ("a,b,y\n1,2,3\n4,inf,6\n", {}, r"t.csv, column 'b', row 3 has an infinite number"),
        ("a,b,y\n1,2,3\n4,5,x\n", {}, r"t.csv, column 'y', row 3 has 'x', which is no number"),
        ("a,b,y\n1,2,3\n4,5,\n", {"num_classes": 2}, r"t.csv, column 'y', row 3 is empty"),
        ("a,b,y\n1,2,3\n4,5\n", {}, r"t.csv cannot be read as CSV: .*Row #3: Expected 3 columns, got 2"),
        (
            "a,b,y\n1,2,3\n4,5,6\n4,5,7\n",
            {"num_classes": 2},
            r"num_classes is 2, .* 3 values: 3, 6, 7; .*num_classes: 3",
        ),
        ("a,b,y\n1,2,3\n4,5,3\n", {"num_classes": 2}, r"has 1 values: 3; there is nothing to tell apart"),
        ("a,b,y\n1,2,3\n4,5,6\n", {}, r"data.held_out 0.2 of 2 samples leaves 0 held out"),
    ],
)
def test_files_that_are_wrong_are_told(tmp_path: Path, data: str, words: dict, message: str) -> None:
    (tmp_path / "t.csv").write_text(data)
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "cache", source=str(tmp_path / "t.csv"), target="y", **words)


def test_files_that_are_no_table_are_told(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"t.parquet cannot be read as Parquet"):
        opened(tmp_path / "cache", source=str(tmp_path / "t.parquet"), target="y")
    (tmp_path / "t.xls").write_bytes(b"x")
    with pytest.raises(InputError, match=r"t.xls is neither CSV nor Parquet by its name"):
        opened(tmp_path / "cache", source=str(tmp_path / "t.xls"), target="y")
    (tmp_path / "t.csv.gz").write_bytes(b"x")
    with pytest.raises(InputError, match=r"t.csv.gz cannot be read as CSV"):
        opened(tmp_path / "cache", source=str(tmp_path / "t.csv.gz"), target="y")


def test_a_parquet_column_of_another_kind_is_told(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"a": [[1], [2]], "y": [1.0, 2.0]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t.parquet, column 'a', row 1 has '\[1\]', which is no number"):
        opened(tmp_path / "cache", source=str(tmp_path / "t.parquet"), target="y")
