"""Data that Ray Data preprocesses, with a Ray that is started for it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dtrain.data import order, ray_data
from dtrain.data.ray_data import Options
from dtrain.errors import InputError

# Ray Data warns of its own older settings, and of functions where its expressions would be quicker.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

TASK = """
def doubled(dataset):
    return dataset.map_batches(lambda batch: {**batch, "x": batch["x"] * FACTOR}).filter(lambda row: row["x"] < 100)

FACTOR = 2

def labelled(dataset):
    return dataset.map(lambda row: {"image": row["image"], "label": int(row["path"].rpartition("_")[2][0])})

def shouted(dataset):
    return dataset.map(lambda row: {"text": row["text"].upper() + "\\\\n"})

def failing(dataset):
    def fail(batch):
        raise ValueError("the seventh seal")
    return dataset.map_batches(fail)

def nothing(dataset):
    return dataset.filter(lambda row: False)

def no_dataset(dataset):
    return [1, 2, 3]
"""


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray

    with ray_data._ray(Options(source="x", read="csv", samples={"name": "tokens"}, num_cpus=2)) as started:
        yield started
    assert not ray.is_initialized()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "csv").mkdir()
    for part in range(3):
        rows = "".join(f"{n},{n % 2}\n" for n in range(part * 20, part * 20 + 20))
        (tmp_path / "csv" / f"{part}.csv").write_text("x,y\n" + rows)
    return tmp_path


TABLE = {"name": "table", "target": "y", "num_classes": 2, "features": ["x"]}


def resolved(folder: Path, **words: object) -> Options:
    return ray_data.resolve(Options(**words), folder)


def opened(folder: Path, **words: object) -> Any:
    options = resolved(folder, **words)
    ray_data.prepare(options, folder / "cache")
    return ray_data.open(options, folder / "cache")


def everything(dataset: Any) -> dict[str, np.ndarray]:
    number = dataset.num_samples
    return dataset.batch(np.arange(number), order.draws(0, np.arange(number, dtype=np.uint64)))


def test_rows_are_transformed_and_kept(folder: Path, ray: Any) -> None:
    words = {"source": "csv", "read": "csv", "transform": "./task.py:doubled", "samples": TABLE}
    source = opened(folder, **words)
    parts = [everything(part) for part in (source.train, source.held_out)]
    both = {name: np.concatenate([part[name] for part in parts]) for name in ("features", "targets")}
    assert len(both["targets"]) == 50  # those that are below 100 when doubled
    ranked = both["targets"][np.argsort(both["features"][:, 0])]
    assert ranked.tolist() == [n % 2 for n in range(50)]
    again = opened(folder, **words)
    assert again.fingerprint == source.fingerprint
    assert len([path for path in (folder / "cache").iterdir() if path.is_dir()]) == 1
    # Another function of the same name is another transformation.
    (folder / "task.py").write_text(TASK.replace("FACTOR = 2", "FACTOR = 4"))
    assert ray_data.own_code(resolved(folder, **words)) == [folder / "task.py"]
    for name in ("task", *(name for name in sys.modules if name.startswith("task_"))):
        sys.modules.pop(name, None)  # a run imports it anew
    assert opened(folder, **words).fingerprint != source.fingerprint
    assert opened(folder, **words).train.num_samples < source.train.num_samples


@pytest.mark.parametrize("decode", ["once", "on_read"])
def test_pictures(folder: Path, ray: Any, decode: str) -> None:
    (folder / "png").mkdir()
    for n in range(12):
        Image.fromarray(np.full((8, 8, 3), 20 * n, dtype=np.uint8)).save(folder / "png" / f"{n:02d}_{n % 2}.png")
    samples = {"name": "images", "num_classes": 2, "size": 8, "decode": decode}
    source = opened(folder, source="png", read="images", transform="./task.py:labelled", samples=samples, held_out=0.3)
    greys = []
    for part in (source.train, source.held_out):
        batch = everything(part)
        grey = source.to_pixels(batch["images"])[:, 0, 0, 0]
        assert (batch["labels"] == grey // 20 % 2).all()
        greys += grey.tolist()
    assert sorted(greys) == [20 * n for n in range(12)]


def test_text(folder: Path, ray: Any) -> None:
    (folder / "lines.txt").write_text("".join(f"line number {n}\n" for n in range(60)))
    samples = {"name": "tokens", "tokenizer": {"name": "bytes"}, "sequence_length": 8}
    source = opened(folder, source="lines.txt", read="text", transform="./task.py:shouted", samples=samples)
    lines = source.decode(everything(source.train)["inputs"].ravel()).splitlines()[:-1]
    order_of = [int(line.split()[-1]) for line in lines]
    assert all(line.startswith("LINE NUMBER ") for line in lines)
    assert order_of == sorted(order_of)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"transform": "./task.py:failing"},
            r"data.transform: .*task.py:failing failed: ValueError: the seventh seal",
        ),
        ({"transform": "./task.py:nothing"}, r"data.transform: .*task.py:nothing has no row; let some through"),
        ({"transform": "./task.py:no_dataset"}, r"no_dataset gave a list; it must give a ray.data.Dataset"),
        ({"samples": {**TABLE, "features": ["z"]}}, r"what Ray Data read has no column 'z'; there is: x, y; name"),
        ({"samples": {**TABLE, "num_classes": 3}}, r"data.num_classes is 3, .* 2 values: 0, 1"),
        ({"source": "none"}, r"data.source: .*none leads to no file"),
    ],
)
def test_what_goes_wrong_is_told(folder: Path, ray: Any, words: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        opened(folder, **{"source": "csv", "read": "csv", "samples": TABLE, **words})
