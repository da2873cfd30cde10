"""Data sets that the library `datasets` saved: pictures, text and tables of it, and how mistakes are told."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import ValidationError
from PIL import Image

from dtrain.data import DataShape, huggingface, order
from dtrain.data.huggingface import Options
from dtrain.errors import InputError, TrainingError

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


def opened(cache: Path, **words: object) -> Any:
    options = huggingface.resolve(Options(**words), Path("/"))
    huggingface.prepare(options, cache)
    return huggingface.open(options, cache)


def everything(dataset: Any) -> dict[str, np.ndarray]:
    number = dataset.num_samples
    return dataset.batch(np.arange(number), order.draws(0, np.arange(number, dtype=np.uint64)))


def rows(start: int, num: int) -> Any:
    """Pictures of one grey each, its label, its text, numbers."""
    greys = np.arange(start, start + num)
    pixels = np.broadcast_to(greys[:, None, None, None], (num, 8, 8, 3)).astype(np.uint8)
    return datasets.Dataset.from_dict(
        {
            "image": [Image.fromarray(one) for one in pixels],
            "array": pixels.tolist(),
            "label": (greys % 3).tolist(),
            "text": [f"The number {n} is {'even' if n % 2 == 0 else 'odd'}.\n" for n in greys],
            "x": (greys * 2.0).tolist(),
            "parity": ["even" if n % 2 == 0 else "odd" for n in greys],
        },
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "array": datasets.Array3D((8, 8, 3), "uint8"),
                "label": datasets.ClassLabel(names=["ant", "bee", "cat"]),
                "text": datasets.Value("string"),
                "x": datasets.Value("float64"),
                "parity": datasets.Value("string"),
            }
        ),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole` is one data set of 60 rows in three files; `splits` has 40 to train on and 20 of them for a test."""
    folder = tmp_path_factory.mktemp("saved")
    rows(0, 60).save_to_disk(folder / "whole", num_shards=3)
    datasets.DatasetDict({"train": rows(0, 40), "test": rows(40, 20)}).save_to_disk(folder / "splits")
    return folder


IMAGES = {"name": "images", "num_classes": 3, "size": 8}
TOKENS = {"name": "tokens", "tokenizer": {"name": "bytes"}, "sequence_length": 16}
TABLE = {"name": "table", "target": "x", "features": ["label"], "categories": {"parity": 2}}


@pytest.mark.parametrize("decode", ["once", "on_read"])
@pytest.mark.parametrize("column", ["image", "array"])
def test_pictures(tmp_path: Path, saved: Path, decode: str, column: str) -> None:
    words = {**IMAGES, "decode": decode, "image": column}
    options = Options(source=str(saved / "whole"), samples=words, held_out=0.25)
    expected = DataShape("images", num_classes=3, channels=3, height=8, width=8, is_cheap=decode == "once")
    assert huggingface.describe(options) == expected
    source = opened(tmp_path, source=str(saved / "whole"), samples=words, held_out=0.25)
    assert source.classes == ("ant", "bee", "cat")
    greys = []
    for part, num in ((source.train, 45), (source.held_out, 15)):
        batch = everything(part)
        pixels = source.to_pixels(batch["images"])
        assert pixels.shape == (num, 8, 8, 3)
        assert (pixels == pixels[:, :1, :1, :1]).all()
        assert (batch["labels"] == pixels[:, 0, 0, 0] % 3).all()
        greys += pixels[:, 0, 0, 0].tolist()
    assert sorted(greys) == list(range(60))


def test_splits_are_as_they_were_saved(tmp_path: Path, saved: Path) -> None:
    for words in ({}, {"split": "train", "held_out_split": "test"}):
        source = opened(tmp_path, source=str(saved / "splits"), samples=IMAGES, **words)
        greys = [source.to_pixels(everything(part)["images"])[:, 0, 0, 0] for part in (source.train, source.held_out)]
        assert greys[0].tolist() == list(range(40))
        assert sorted(greys[1].tolist()) == list(range(40, 60))
    other = opened(tmp_path, source=str(saved / "splits"), samples=IMAGES, split="test", held_out_split="train")
    assert other.train.num_samples == 20


@pytest.mark.parametrize("name", ["whole", "splits"])
def test_text(tmp_path: Path, saved: Path, name: str) -> None:
    words = {"source": str(saved / name), "samples": {**TOKENS, "held_out_context": 0.0}, "held_out": 0.2}
    assert huggingface.describe(Options(**words)) == DataShape("tokens", 257, 16)
    source = opened(tmp_path, **words)
    train, held = everything(source.train), everything(source.held_out)
    assert (train["inputs"][:, 1:] == train["targets"][:, :-1]).all()
    documents = source.decode(train["inputs"].ravel()).splitlines()[:-1]
    assert len(set(documents)) == len(documents)
    assert documents[0].startswith("The number ")
    texts = held["target_bytes"].sum()
    assert texts == source.held_out_bytes
    if name == "splits":
        assert [int(line.split()[2]) for line in documents] == list(range(len(documents)))
        expected = "".join(rows(40, 20)["text"])
        assert len(expected) == texts
        assert source.yardsticks()["bits_per_byte"]["gzip -9"] == pytest.approx(
            8 * len(gzip.compress(expected.encode(), 9, mtime=0)) / texts, rel=0.2
        )
    else:
        whole = sum(len(one) for one in rows(0, 60)["text"])
        assert 0.1 * whole < texts <= 0.2 * whole


def test_held_out_text_has_a_limit_and_is_not_trained_on(tmp_path: Path, saved: Path) -> None:
    words = {"source": str(saved / "splits"), "samples": {**TOKENS, "held_out_limit": 100}}
    assert 50 < opened(tmp_path, **words).held_out_bytes <= 100
    both = datasets.DatasetDict({"train": rows(0, 40), "test": rows(30, 20)})
    both.save_to_disk(tmp_path / "overlap")
    source = opened(tmp_path, source=str(tmp_path / "overlap"), samples=TOKENS)
    assert (source.train._tokens == source.separator).sum() == 30


def test_tables(tmp_path: Path, saved: Path) -> None:
    words = {"source": str(saved / "splits"), "samples": TABLE}
    assert huggingface.describe(Options(**words)) == DataShape("table", num_features=3)
    source = opened(tmp_path, **words)
    assert source.features == ("label", "parity=even", "parity=odd")
    train = everything(source.train)
    assert np.allclose(source.to_target(train["targets"]), np.arange(40) * 2.0, atol=1e-4)
    assert (train["features"][:, 1] == (np.arange(40) % 2 == 0)).all()
    held = source.to_target(everything(source.held_out)["targets"])
    assert np.allclose(np.sort(held), np.arange(40, 60) * 2.0, atol=1e-3)


def test_a_data_set_that_changed_is_seen(tmp_path: Path) -> None:
    for decode in ("once", "on_read"):
        words = {"source": str(tmp_path / "d"), "samples": {**IMAGES, "decode": decode}}
        fingerprints = []
        for start in (0, 1):
            rows(start, 30).save_to_disk(tmp_path / "d")
            fingerprints.append(opened(tmp_path / "cache", **words).fingerprint)
        assert fingerprints[0] != fingerprints[1]


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"source": "none"}, r"there is no folder .*none; name one that `save_to_disk`"),
        ({"source": "."}, r"has no state.json; name a folder that `save_to_disk`"),
        ({"source": "splits", "split": "trian"}, r"data.split: .*splits has no split 'trian'; did you mean 'train'"),
        ({"source": "splits", "held_out_split": "dev"}, r"data.held_out_split: .*splits has no split 'dev'"),
        ({"source": "splits", "held_out_split": "train"}, r"'train' is trained on; name another split"),
        ({"held_out_split": "test"}, r"whole is one data set without splits; leave it out"),
        ({"samples": {**IMAGES, "image": "imag"}}, r"whole has no column 'imag'; did you mean 'image'"),
        ({"samples": {**IMAGES, "label": "labels"}}, r"whole has no column 'labels'; did you mean 'label'"),
        ({"samples": {**IMAGES, "num_classes": 2}}, r"column 'label', row 2 has the label 2, which is none of 0 to 1"),
        (
            {"samples": {**IMAGES, "label": "text"}},
            r"column 'text', row 0 has 'The number 0 is even.', which is no num",
        ),
        (
            {"samples": {**IMAGES, "image": "text"}},
            r"column 'text', row 0 holds 'The number 0 .*', which is no picture",
        ),
        ({"samples": {**TOKENS, "text": "words"}}, r"whole has no column 'words'"),
        ({"samples": {**TOKENS, "text": "x"}}, r"column 'x' of .*whole holds double, and no text"),
        ({"samples": {**TABLE, "features": ["z"]}}, r"whole has no column 'z'"),
        ({"samples": {**TABLE, "features": ["text"]}}, r"column 'text', row 0 has 'The number 0"),
    ],
)
def test_what_is_not_there_is_told(tmp_path: Path, saved: Path, words: dict, message: str) -> None:
    given = {"samples": IMAGES, **words, "source": str(saved / words.get("source", "whole"))}
    with pytest.raises(InputError, match=message):
        opened(tmp_path, **given)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({**IMAGES, "mean": [0.1, 0.2]}, r"data.mean has 2 numbers; write one, or one for each of 3"),
        ({"name": "table", "target": "x"}, r"data.samples: list the columns to predict from"),
        ({**TABLE, "features": ["x"]}, r"column 'x' is named twice"),
    ],
)
def test_samples_that_do_not_go_together_are_told_while_planning(samples: dict, message: str) -> None:
    for plan in (huggingface.describe, lambda options: huggingface.resolve(options, Path("/"))):
        with pytest.raises(InputError, match=message):
            plan(Options(source="/d", samples=samples))


@pytest.mark.parametrize("samples", [{"name": "images"}, {"name": "sound"}, {**TOKENS, "size": 3}])
def test_samples_must_be_of_a_kind(samples: dict) -> None:
    with pytest.raises(ValidationError):
        Options(source="/d", samples=samples)


def _with_image(folder: Path, data: bytes) -> None:
    found = rows(0, 20).cast_column("image", datasets.Image(decode=False))
    cells = [dict(cell) for cell in found["image"]]
    cells[7]["bytes"] = data
    datasets.Dataset.from_dict(
        {"image": cells, "label": found["label"]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    ).save_to_disk(folder)


def test_a_corrupt_picture_is_named(tmp_path: Path) -> None:
    _with_image(tmp_path / "d", b"no picture")
    message = r"the picture .*/d, column 'image', row 7 cannot be decoded"
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "cache", source=str(tmp_path / "d"), samples=IMAGES)


def test_a_picture_that_breaks_while_training_is_named(tmp_path: Path) -> None:
    import pyarrow as pa

    rows(0, 20).save_to_disk(tmp_path / "d")
    words = {"source": str(tmp_path / "d"), "samples": {**IMAGES, "decode": "on_read"}}
    source = opened(tmp_path / "cache", **words)
    broken = pa.array([{"bytes": b"no picture", "path": None}] * 20)
    source.train._pictures._cells = pa.chunked_array([broken])
    with pytest.raises(TrainingError, match=r"/d, column 'image', row \d+ cannot be decoded"):
        everything(source.train)


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    rows(0, 20).save_to_disk(tmp_path / "d")
    (file,) = (tmp_path / "d").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match=r"arrow cannot be read \(.*\); save the data set again"):
        opened(tmp_path / "cache", source=str(tmp_path / "d"), samples=IMAGES)
    (tmp_path / "d" / "state.json").write_text(json.dumps({"_indices_data_files": [1]}))
    with pytest.raises(InputError, match=r"saved by an old version of datasets; save it again"):
        opened(tmp_path / "cache", source=str(tmp_path / "d"), samples=IMAGES)
