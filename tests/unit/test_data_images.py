"""Pictures: which are held out, how they are kept, scaled and augmented, and how mistakes are told."""

import gzip
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec import ValidationError
from PIL import Image

from dtrain.data import DataShape, images, picture_sets, pixels
from dtrain.data.augmentation import Augmentation, flip_and_crop, parts
from dtrain.data.chance import uniform
from dtrain.data.images import Options
from dtrain.data.order import draws
from dtrain.data.pixels import ImageSource
from dtrain.errors import InputError, TrainingError

CLASSES = ("ant", "bee", "cat")


def opened(cache: Path, **words: object) -> ImageSource:
    options = images.resolve(Options(**words), Path("/"))
    images.prepare(options, cache)
    return images.open(options, cache)


def everything(dataset: pixels.Kept | pixels.Decoded) -> dict[str, np.ndarray]:
    return dataset.batch(np.arange(dataset.num_samples), draws(0, np.arange(dataset.num_samples, dtype=np.uint64)))


def write_picture(path: Path, seed: int, size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of ten pictures."""
    for label, name in enumerate(CLASSES):
        for number in range(10):
            write_picture(tmp_path / "pictures" / name / f"{number}.png", 100 * label + number)
    return tmp_path / "pictures"


# Digits


def test_digits_are_the_default_and_need_nothing(tmp_path: Path) -> None:
    assert images.describe(Options()) == DataShape("images", num_classes=10, channels=1, height=8, width=8)
    source = opened(tmp_path)
    assert source.classes == tuple("0123456789")
    train, held_out = everything(source.train), everything(source.held_out)
    assert train["images"].shape == (source.train.num_samples, 1, 8, 8)
    assert train["images"].dtype == np.float32
    assert train["labels"].dtype == np.int64
    assert abs(train["images"].mean()) < 1e-4
    assert abs(train["images"].std() - 1) < 1e-4
    assert source.train.num_samples + source.held_out.num_samples == 1797
    rows = {part["images"].tobytes() for part in (train, held_out)}
    assert len(rows) == 2
    seen = [{one.tobytes() for one in part["images"]} for part in (train, held_out)]
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 1797
    shares = np.bincount(held_out["labels"]) / np.bincount(np.r_[train["labels"], held_out["labels"]])
    assert (abs(shares - 0.2) < 0.01).all()
    # The first few held-out samples are of all classes.
    assert len(set(held_out["labels"][:64])) == 10


def test_planning_knows_which_batches_are_cheap() -> None:
    words = {"source": "/p", "num_classes": 3}
    assert images.describe(Options(augment={"horizontal_flip": True})).is_cheap
    assert images.describe(Options(size=8, **words)).is_cheap
    assert not images.describe(Options(size=8, decode="on_read", **words)).is_cheap
    assert not images.describe(Options(augment={"resized_crop": 0.5})).is_cheap
    assert not images.describe(Options(size=64, **words)).is_cheap


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    expected = load_digits()
    found = picture_sets.digits(picture_sets.digits_file()).train
    assert (found.labels == expected.target).all()
    pixels = found.fitted(range(1797), 8, 1, 1.0)[..., 0]
    assert (pixels == np.round(expected.images * 255 / 16)).all()


def test_the_nearest_neighbour_is_measured_as_scikit_learn_does(tmp_path: Path) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    source = opened(tmp_path)
    train, held_out = everything(source.train), everything(source.held_out)
    model = KNeighborsClassifier(1).fit(train["images"].reshape(-1, 64), train["labels"])
    expected = model.score(held_out["images"].reshape(-1, 64), held_out["labels"])
    assert source.yardsticks()["accuracy"]["nearest neighbour"] == pytest.approx(expected, abs=0.003)


def test_pixels_come_back(tmp_path: Path) -> None:
    source = opened(tmp_path, mean=[0.5], std=[0.5])
    batch = everything(source.held_out)
    assert (batch["images"].min(), batch["images"].max()) == (-1, 1)
    pixels = source.to_pixels(batch["images"])
    assert pixels.shape == (source.held_out.num_samples, 8, 8, 1)
    assert pixels.dtype == np.uint8
    other = opened(tmp_path)
    assert (other.to_pixels(everything(other.held_out)["images"]) == pixels).all()
    assert other.fingerprint == source.fingerprint


def test_digits_can_be_scaled_and_coloured(tmp_path: Path) -> None:
    source = opened(tmp_path, size=16, channels=3)
    batch = everything(source.held_out)["images"]
    assert batch.shape[1:] == (3, 16, 16)
    assert np.allclose(batch[:, 0], batch[:, 2])


# Files of MNIST and CIFAR


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    data = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_mnist(folder: Path, suffix: str = "", num: int = 30) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(exist_ok=True, parents=True)
    random = np.random.default_rng(1)
    pixels, labels = random.integers(0, 256, (num + 10, 28, 28), dtype=np.uint8), np.arange(num + 10) % 10
    write_idx(folder / f"train-images-idx3-ubyte{suffix}", pixels[:num])
    write_idx(folder / f"train-labels-idx1-ubyte{suffix}", labels[:num])
    write_idx(folder / f"t10k-images-idx3-ubyte{suffix}", pixels[num:])
    write_idx(folder / f"t10k-labels-idx1-ubyte{suffix}", labels[num:])
    return pixels, labels


@pytest.mark.parametrize(("suffix", "within"), [("", ""), (".gz", ""), (".gz", "raw")])
def test_idx_files_are_read(tmp_path: Path, suffix: str, within: str) -> None:
    pixels, labels = write_mnist(tmp_path / "mnist" / within, suffix)
    source = opened(tmp_path / "cache", source=str(tmp_path / "mnist"), format="fashion_mnist")
    assert source.classes[9] == "ankle boot"
    train = everything(source.train)
    assert (source.to_pixels(train["images"])[..., 0] == pixels[:30]).all()
    assert (train["labels"] == labels[:30]).all()
    held = source.to_pixels(everything(source.held_out)["images"])[..., 0]
    assert {one.tobytes() for one in held} == {one.tobytes() for one in pixels[30:]}


@pytest.mark.parametrize(("kind", "before"), [("cifar10", 1), ("cifar100", 2)])
def test_cifar_files_are_read(tmp_path: Path, kind: str, before: int) -> None:
    folder = tmp_path / "cifar" / "binary"
    folder.mkdir(parents=True)
    random = np.random.default_rng(2)
    parts = [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]
    names = parts if kind == "cifar10" else ["train.bin", "test.bin"]
    rows = random.integers(0, 10, (len(names), 4, before + 3072), dtype=np.uint8)
    for name, chunk in zip(names, rows, strict=True):
        (folder / name).write_bytes(chunk.tobytes())
    source = opened(tmp_path / "cache", source=str(tmp_path / "cifar"), format=kind)
    train = everything(source.train)
    expected = rows[:-1].reshape(-1, before + 3072)
    assert (train["labels"] == expected[:, before - 1]).all()
    assert (
        source.to_pixels(train["images"]) == expected[:, before:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    ).all()
    assert source.held_out.num_samples == 4


def test_a_picture_that_is_held_out_is_not_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels, _ = write_mnist(tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.r_[pixels[:28], pixels[30:32]])
    source = opened(tmp_path / "cache", source=str(tmp_path), format="mnist")
    assert source.train.num_samples == 28
    assert "2 pictures" in caplog.text


# Folders of classes


FOLDERS = {"num_classes": 3, "size": 8}


@pytest.mark.parametrize("decode", ["once", "on_read"])
def test_folders_are_split_by_class_and_read(tmp_path: Path, folder: Path, decode: str) -> None:
    source = opened(tmp_path / "cache", source=str(folder), decode=decode, held_out=0.3, **FOLDERS)
    assert source.classes == CLASSES
    train, held_out = everything(source.train), everything(source.held_out)
    assert np.bincount(train["labels"]).tolist() == [7, 7, 7]
    assert np.bincount(held_out["labels"]).tolist() == [3, 3, 3]
    both = np.concatenate([source.to_pixels(part["images"]) for part in (train, held_out)])
    labels = np.r_[train["labels"], held_out["labels"]]
    expected = {}
    for label, name in enumerate(CLASSES):
        for path in (folder / name).iterdir():
            cut = Image.open(path).resize((8, 8), Image.Resampling.BILINEAR, box=(2, 0, 18, 16))
            expected[np.asarray(cut).tobytes()] = label
    assert {one.tobytes(): label for one, label in zip(both, labels, strict=True)} == expected


def test_both_ways_of_decoding_give_the_same(tmp_path: Path, folder: Path) -> None:
    write_picture(folder / "val" / "ant" / "x.png", 999)
    for name in CLASSES:
        (folder / "train").mkdir(exist_ok=True)
        (folder / name).rename(folder / "train" / name)
        write_picture(folder / "val" / name / "y.png", 900 + CLASSES.index(name))
    augment = {"horizontal_flip": True, "crop_padding": 2}
    found = [
        opened(tmp_path / decode, source=str(folder), decode=decode, augment=augment, **FOLDERS)
        for decode in ("once", "on_read")
    ]
    for part in ("train", "held_out"):
        one, other = (everything(getattr(source, part)) for source in found)
        assert (one["labels"] == other["labels"]).all()
        assert (one["images"] == other["images"]).all()
    assert found[0].held_out.num_samples == 4


def test_large_folders_are_decoded_on_reading() -> None:
    words = {"source": "/p", "num_classes": 3}
    assert images.resolve(Options(size=224, **words), Path("/")).decode == "on_read"
    assert images.resolve(Options(size=64, **words), Path("/")).decode == "once"


def test_equal_pictures_stand_on_one_side(tmp_path: Path) -> None:
    for name in CLASSES[:2]:
        for number in range(21):  # three of each: a fifth of all is no multiple of that
            write_picture(tmp_path / "p" / name / f"{number}.png", number // 3 + (50 if name == "bee" else 0))
    for decode in ("once", "on_read"):
        source = opened(tmp_path / "cache", source=str(tmp_path / "p"), num_classes=2, size=8, decode=decode)
        train, held = (
            {one.tobytes() for one in everything(part)["images"]} for part in (source.train, source.held_out)
        )
        assert held
        assert not train & held


def test_what_is_held_out_does_not_depend_on_where_the_folder_is(tmp_path: Path, folder: Path) -> None:
    first = opened(tmp_path / "cache", source=str(folder), **FOLDERS)
    folder.rename(tmp_path / "elsewhere")
    second = opened(tmp_path / "cache", source=str(tmp_path / "elsewhere"), **FOLDERS)
    assert second.fingerprint == first.fingerprint
    (tmp_path / "elsewhere" / "ant" / "0.png").unlink()
    assert opened(tmp_path / "cache", source=str(tmp_path / "elsewhere"), **FOLDERS).fingerprint != first.fingerprint


def test_a_picture_that_came_is_seen_without_preparing(tmp_path: Path, folder: Path) -> None:
    options = images.resolve(Options(source=str(folder), **FOLDERS), Path("/"))
    images.prepare(options, tmp_path / "cache")
    assert images.open(options, tmp_path / "cache").train.num_samples == 24
    for number in range(5):
        write_picture(folder / "bee" / f"new{number}.png", 5000 + number)
    assert images.open(options, tmp_path / "cache").train.num_samples == 28


def test_a_picture_that_changed_is_seen_by_preparing(tmp_path: Path, folder: Path) -> None:
    first = opened(tmp_path / "cache", source=str(folder), **FOLDERS)
    write_picture(folder / "bee" / "3.png", 4242)
    assert opened(tmp_path / "cache", source=str(folder), **FOLDERS).fingerprint != first.fingerprint


def _prepare(options: Options, cache: Path) -> None:
    images.prepare(options, cache)


def test_many_may_prepare_at_once(tmp_path: Path, folder: Path) -> None:
    options = images.resolve(Options(source=str(folder), **FOLDERS), Path("/"))
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_prepare, args=(options, tmp_path / "cache")) for _ in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * 4
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


# Augmentation


def test_augmentation_is_a_function_of_the_draws(tmp_path: Path) -> None:
    augment = {"horizontal_flip": True, "crop_padding": 2, "resized_crop": 0.5}
    source = opened(tmp_path, augment=augment)
    index = np.zeros(200, dtype=np.int64)
    first = source.train.batch(index, draws(1, np.arange(200, dtype=np.uint64)))["images"]
    again = source.train.batch(index[:7], draws(1, np.arange(200, dtype=np.uint64))[50:57])["images"]
    assert (first[50:57] == again).all()
    assert len({one.tobytes() for one in first}) > 190
    held = source.held_out.batch(index, draws(1, np.arange(200, dtype=np.uint64)))["images"]
    assert len({one.tobytes() for one in held}) == 1


def test_flips_and_crops_are_those_of_one_picture_at_a_time() -> None:
    random = np.random.default_rng(0)
    given = random.integers(1, 256, (500, 6, 6, 3), dtype=np.uint8)
    draw = draws(3, np.arange(500, dtype=np.uint64))
    flipped = flip_and_crop(given, Augmentation(horizontal_flip=True), draw)
    mirrored = (flipped == given[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (mirrored | (flipped == given).all(axis=(1, 2, 3))).all()
    assert 200 < mirrored.sum() < 300
    cropped = flip_and_crop(given, Augmentation(crop_padding=2), draw)
    seen = set()
    for one, before in zip(cropped, given, strict=True):
        padded = np.pad(before, ((2, 2), (2, 2), (0, 0)))
        places = [(y, x) for y in range(5) for x in range(5) if (padded[y : y + 6, x : x + 6] == one).all()]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) == 25


def test_random_parts_have_the_area_and_stay_inside() -> None:
    draw = draws(3, np.arange(5000, dtype=np.uint64))
    sizes = np.tile([300, 200], (5000, 1))
    left, top, right, bottom = parts(0.25, sizes, draw).T
    assert (left >= 0).all() and (top >= 0).all()
    assert (right <= 300 + 1e-9).all() and (bottom <= 200 + 1e-9).all()
    area = (right - left) * (bottom - top) / 60000
    assert area.min() > 0.25 - 1e-9
    assert abs(area.mean() - 0.625) < 0.01
    aspect = ((right - left) / (bottom - top))[area < 0.5]
    assert aspect.min() > 0.74 and aspect.max() < 1.34


def test_chance_is_uniform_and_independent() -> None:
    numbers = uniform(draws(0, np.arange(20000, dtype=np.uint64)), 3, 1)
    assert np.abs(numbers.mean(axis=0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(numbers.T) - np.eye(3)).max() < 0.03
    assert (
        np.abs(np.corrcoef(numbers[:, 0], uniform(draws(0, np.arange(20000, dtype=np.uint64)), 1, 2)[:, 0])[0, 1])
        < 0.03
    )


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"source": "/p"}, r"data.num_classes must be given for folders .* `num_classes: 1000`"),
        ({"source": "/p", "num_classes": 3}, r"data.size must be given for folders .* `size: 224`"),
        ({"num_classes": 5}, r"data.num_classes is 5, and digits has 10; leave it out"),
        ({"format": "mnist"}, r"data.format mnist and data.source 'digits' do not go together"),
        ({"source": "/p", "format": "digits"}, r"data.format digits and data.source '/p' do not go together"),
        ({"decode": "on_read"}, r"on_read is for folders of pictures, and not for digits"),
        ({"source": "/p", "format": "cifar10", "held_out": 0.1}, r"cifar10 says itself which pictures are held out"),
        ({"mean": [0.1, 0.2]}, r"data.mean has 2 numbers; write one, or one for each of 1 channels"),
        ({"augment": {"crop_padding": 9}}, r"crop_padding 9 is more than the size of a picture, 8"),
    ],
)
def test_options_that_do_not_go_together_are_told_while_planning(words: dict, message: str) -> None:
    for plan in (images.describe, lambda options: images.resolve(options, Path("/"))):
        with pytest.raises(InputError, match=message):
            plan(Options(**words))


@pytest.mark.parametrize("words", [{"size": 2}, {"channels": 2}, {"std": [0.0]}, {"held_out": 0.9}, {"form": "x"}])
def test_options_out_of_bounds_are_refused(words: dict) -> None:
    with pytest.raises(ValidationError):
        Options(**words)


def _no_folder(folder: Path) -> dict:
    return {"source": f"{folder}-none"}


def _other_number(folder: Path) -> dict:
    return {"num_classes": 4}


def _no_classes(folder: Path) -> dict:
    return {"source": str(folder / "ant")}


def _empty_class(folder: Path) -> dict:
    for path in (folder / "bee").iterdir():
        path.unlink()
    return {}


def _unknown_held_out(folder: Path) -> dict:
    for name in CLASSES:
        write_picture(folder / "train" / name / "0.png", 1)
    write_picture(folder / "val" / "dog" / "0.png", 1)
    return {"source": str(folder)}


def _too_few(folder: Path) -> dict:
    return {"held_out": 0.01}


def _deep(folder: Path) -> dict:
    Image.fromarray(np.zeros((9, 9), dtype=np.uint16)).save(folder / "cat" / "deep.png")
    return {}


def _corrupt(folder: Path) -> dict:
    path = folder / "cat" / "4.png"
    path.write_bytes(path.read_bytes()[:-300])
    return {}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_folder, r"there is no folder .*pictures-none"),
        (
            _other_number,
            r"data.num_classes is 4, and .*pictures holds 3 class folders: ant, bee, cat; .* num_classes: 3",
        ),
        (_no_classes, r"data.num_classes is 3, and .*ant holds no class folder"),
        (_empty_class, r"the class folder .*bee holds no picture"),
        (_unknown_held_out, r"val has a class 'dog' that .*train does not have"),
        (_too_few, r"data.held_out 0.01 of 30 samples leaves 0 held out and 30 to train on"),
        (_deep, r"deep.png has more than 8 bits a channel"),
        (_corrupt, r"the picture .*/cat/4.png cannot be decoded \(.+\); replace it or take it out"),
    ],
)
def test_folders_that_are_wrong_are_told(
    tmp_path: Path, folder: Path, spoil: Callable[[Path], dict], message: str
) -> None:
    words = {"source": str(folder), **FOLDERS} | spoil(folder)
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "cache", **words)


def test_a_picture_that_breaks_while_training_is_named(tmp_path: Path, folder: Path) -> None:
    source = opened(tmp_path / "cache", source=str(folder), decode="on_read", **FOLDERS)
    for path in (folder / "cat").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(TrainingError, match=r"the picture .*/cat/\d.png cannot be decoded"):
        everything(source.train)


def test_a_file_that_is_no_picture_is_left_out_and_told(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "ant" / "notes.txt").write_text("x")
    source = opened(tmp_path / "cache", source=str(folder), **FOLDERS)
    assert source.train.num_samples + source.held_out.num_samples == 30
    assert "1 files that are no pictures are left out" in caplog.text
    assert "notes.txt" in caplog.text


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("train-images-idx3-ubyte", b"junk", r"train-images-idx3-ubyte is no IDX file of bytes in 3 dimensions"),
        ("train-images-idx3-ubyte", None, r"there is no train-images-idx3-ubyte in "),
        ("t10k-labels-idx1-ubyte", bytes([0, 0, 8, 1, 0, 0, 0, 10, 1]), r"has 1 bytes after its head, not the 10"),
        ("t10k-labels-idx1-ubyte", bytes([0, 0, 8, 1, 0, 0, 0, 1, 1]), r"has 10 pictures and .* 1 labels"),
        ("t10k-labels-idx1-ubyte", bytes([0, 0, 8, 1, 0, 0, 0, 10, *range(3, 13)]), r"has the label 12; .*: 13"),
    ],
)
def test_idx_files_that_are_wrong_are_told(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    write_mnist(tmp_path / "mnist")
    path = tmp_path / "mnist" / name
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "cache", source=str(tmp_path / "mnist"), format="mnist")


def test_packed_files_that_are_cut_are_told(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist", ".gz")
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(InputError, match=r"cannot read .*train-images-idx3-ubyte.gz: .*; fetch it again"):
        opened(tmp_path / "cache", source=str(tmp_path / "mnist"), format="mnist")


def test_cifar_files_that_are_cut_are_told(tmp_path: Path) -> None:
    for name in ("train.bin", "test.bin"):
        (tmp_path / name).write_bytes(bytes(3074 * 2 - 1))
    with pytest.raises(InputError, match=r"train.bin has 6147 bytes, which is no multiple of 3074"):
        opened(tmp_path / "cache", source=str(tmp_path), format="cifar100")
