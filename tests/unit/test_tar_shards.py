"""Tar shards: every sample once, found by its place, through fsspec; and what is said of those that are broken."""

import io
import json
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from dtrain.data import DataShape, tar_shards, webdataset
from dtrain.data.order import Order, draws
from dtrain.data.webdataset import Options, describe, prepare, resolve
from dtrain.errors import InputError, TrainingError
from dtrain.settings import convert, from_json, to_json

SIZE = 8


def picture(number: int) -> bytes:
    """A grey picture whose brightness is its number."""
    out = io.BytesIO()
    Image.new("RGB", (SIZE + number % 3, SIZE), (number,) * 3).save(out, "PNG")
    return out.getvalue()


def shard(samples: dict[str, dict[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for key, members in samples.items():
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def plain(numbers: range) -> bytes:
    return shard({f"dir/{n:04d}": {"png": picture(n), "cls": str(n % 4).encode()} for n in numbers})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of 30, 40 and 50 samples."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, numbers in (("000", range(30)), ("001", range(30, 70)), ("002", range(70, 120))):
        (folder / f"train-{name}.tar").write_bytes(plain(numbers))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def options(source: object, **words: object) -> Options:
    asked = {"source": source, "num_classes": 4, "size": SIZE, "center_crop": 1.0, "mean": [0.0], "std": [1.0], **words}
    return resolve(convert(asked, Options), Path("/"))


def seen(dataset: webdataset.Members) -> dict[int, int]:
    """The number of each picture, and its label."""
    number = np.arange(dataset.num_samples)
    batch = dataset.batch(number, draws(0, number.astype(np.uint64)))
    assert batch["images"].shape == (len(number), 3, SIZE, SIZE) and batch["images"].dtype == np.float32
    assert batch["labels"].dtype == np.int64
    values = np.rint(batch["images"][:, 0, 0, 0] * 255).astype(int)
    assert len(set(values.tolist())) == len(number)
    return dict(zip(values.tolist(), batch["labels"].tolist(), strict=True))


def test_every_sample_stands_on_one_side_with_its_label(folder: Path, cache: Path) -> None:
    source = webdataset.open(options(str(folder / "train-{000..002}.tar"), held_out=0.1), cache)
    assert (source.train.num_samples, source.held_out.num_samples) == (108, 12)
    train, held_out = seen(source.train), seen(source.held_out)
    assert train | held_out == {n: n % 4 for n in range(120)} and not train.keys() & held_out.keys()
    assert len({n // 40 for n in held_out}) == 3  # from all over the shards
    assert (
        source.yardsticks()["accuracy"]["always the most frequent class"]
        == sum(v == _most(train) for v in held_out.values()) / 12
    )


def _most(labels: dict[int, int]) -> int:
    return int(np.bincount(list(labels.values())).argmax())


def test_an_epoch_holds_every_sample_once_for_any_number_of_workers(folder: Path, cache: Path) -> None:
    source = webdataset.open(options(str(folder / "*.tar"), held_out=0.1), cache)
    for num_workers in (1, 2, 3):
        found: list[int] = []
        for worker in range(num_workers):
            order = Order(5, 108, 12, 12 // num_workers, 1, num_workers, worker)
            for step in range(9):
                batch = source.train.batch(*order.micro_batch(step, 0))
                found += np.rint(batch["images"][:, 0, 0, 0] * 255).astype(int).tolist()
        assert sorted(found) == sorted(seen(source.train))


def test_shards_in_object_storage_are_read_alike(folder: Path, cache: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    here = webdataset.open(options(str(folder / "*.tar")), cache)
    there = [
        webdataset.open(options(address), cache)
        for address in ("memory://bucket/*.tar", "memory://bucket/train-{000..002}.tar", "memory://bucket/train-00{0,1,2}.tar")
    ]  # fmt: skip
    assert {source.fingerprint for source in there} == {here.fingerprint}
    for source in there:
        assert seen(source.held_out) == seen(here.held_out) and seen(source.train) == seen(here.train)
    by_file = webdataset.open(options([f"file://{folder}/train-00{n}.tar" for n in range(3)]), cache)
    assert by_file.fingerprint == here.fingerprint


def test_held_out_shards_are_their_own(folder: Path, cache: Path) -> None:
    asked = options(str(folder / "train-00[01].tar"), held_out_source=str(folder / "train-002.tar"))
    source = webdataset.open(asked, cache)
    assert seen(source.held_out) == {n: n % 4 for n in range(70, 120)}
    assert seen(source.train) == {n: n % 4 for n in range(70)}
    with pytest.raises(InputError, match=r"train-002\.tar is among data.source too"):
        prepare(options(str(folder / "*.tar"), held_out_source=str(folder / "train-002.tar")), cache)


@pytest.mark.parametrize(
    ("words", "write"),
    [
        ({"label": "txt", "classes": ["ant", "bee", "cow", "dog"]}, lambda n: ["ant", "bee", "cow", "dog"][n]),
        ({"label": "json"}, lambda n: json.dumps({"label": n, "width": 3})),
        ({"label": "json", "label_key": "kind", "classes": list("abcd")}, lambda n: json.dumps({"kind": "abcd"[n]})),
        ({"label": "cls"}, lambda n: f" {n}\n"),
    ],
)
def test_labels_are_numbers_or_names(tmp_path: Path, cache: Path, words: dict[str, object], write) -> None:
    suffix = words["label"]
    members = {f"{n:03d}": {suffix: write(n % 4).encode(), "png": picture(n), "other.bin": b"x"} for n in range(20)}
    (tmp_path / "a.tar").write_bytes(shard(members))
    source = webdataset.open(options(str(tmp_path / "a.tar"), held_out=0.25, **words), cache)
    assert seen(source.train) | seen(source.held_out) == {n: n % 4 for n in range(20)}
    assert len(source.classes) == 4


def test_only_what_changed_is_looked_up_again(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []
    real = tar_shards.samples

    def samples(shard, stream, size):
        looked_at.append(shard.name)
        return real(shard, stream, size)

    monkeypatch.setattr(tar_shards, "samples", samples)
    asked = options(str(folder / "*.tar"))
    prepare(asked, cache)
    assert sorted(looked_at) == ["train-000.tar", "train-001.tar", "train-002.tar"]
    before = webdataset.open(asked, cache).fingerprint
    prepare(asked, cache)
    assert len(looked_at) == 3
    (folder / "train-001.tar").write_bytes(plain(range(130, 140)))
    prepare(asked, cache)
    assert looked_at[3:] == ["train-001.tar"]
    after = webdataset.open(asked, cache)
    assert after.fingerprint != before and after.train.num_samples + after.held_out.num_samples == 90


def test_random_parts_depend_on_the_draw_alone(folder: Path, cache: Path) -> None:
    source = webdataset.open(
        options(str(folder / "*.tar"), augment={"resized_crop": 0.3, "horizontal_flip": True}), cache
    )
    number, chance = np.arange(6), draws(3, np.arange(6, dtype=np.uint64))
    whole = source.train.batch(number, chance)["images"]
    assert np.array_equal(whole[[4]], source.train.batch(number[[4]], chance[[4]])["images"])


def test_long_names_and_odd_members_are_understood(tmp_path: Path, cache: Path) -> None:
    long = "a/" * 80 + "picture"
    samples = {f"./{long}{n}": {"PNG": picture(n), "cls": b"1"} for n in range(4)}
    samples["__meta__/x"] = {"txt": b"no sample"}
    (tmp_path / "a.tar").write_bytes(shard(samples))
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        tar.add(tmp_path, "some-folder", recursive=False)
    source = webdataset.open(options(str(tmp_path / "a.tar"), held_out=0.25), cache)
    assert set(seen(source.train) | seen(source.held_out)) == set(range(4))


def test_describing_reads_nothing() -> None:
    asked = options("s3://bucket/train-{000..146}.tar", storage_options={"anon": True})
    assert describe(asked) == DataShape("images", num_classes=4, channels=3, height=8, width=8, is_cheap=False)
    assert asked.source == ("s3://bucket/train-{000..146}.tar",)
    assert resolve(Options(source="x/*.tar", num_classes=2), Path("/jobs")).source == ("/jobs/x/*.tar",)
    assert asked == from_json(to_json(asked), Options)


def test_names_are_expanded() -> None:
    assert tar_shards.expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert sorted(tar_shards.expand("{a,b}/{1..2}")) == ["a/1", "a/2", "b/1", "b/2"]
    assert tar_shards.expand("plain") == ["plain"]


# Mistakes


def refused(match: str, source: object, cache: Path, **words: object) -> None:
    with pytest.raises(InputError, match=match):
        prepare(options(source, **words), cache)
    assert not list(cache.glob("*.making"))


def test_shards_that_are_not_there_are_refused(folder: Path, cache: Path) -> None:
    refused("nothing matches '.*/none-\\*.tar'", str(folder / "none-*.tar"), cache)
    refused("there is no .*train-003.tar", str(folder / "train-{000..003}.tar"), cache)
    refused("there is no .*bucket/none.tar", "memory://bucket/none.tar", cache)
    refused("Protocol not known: nowhere.*install what fsspec needs", "nowhere://x.tar", cache)
    (folder / "train-000.tar").rename(folder / "train-000.tar.gz")
    refused("packed shards cannot be read from the middle", str(folder / "*.tar.gz"), cache)


@pytest.mark.parametrize(
    ("harm", "match"),
    [
        (lambda data: data[:5000], r"train-001.tar is damaged after .*unexpected end of data"),
        (lambda data: data[: 512 * 8 + 100], r"train-001.tar is damaged after .*"),
        (lambda data: data[: 512 * 8] + b"\1" * 512 + data[512 * 9 :], r"train-001.tar is damaged after member dir/"),
        (lambda data: b"\x1f\x8b" + data, r"train-001.tar is damaged after its beginning"),
        (lambda data: b"", r"train-001.tar is damaged after its beginning: empty file"),
    ],
)
def test_a_damaged_shard_is_named_and_never_taken_for_a_short_one(folder: Path, cache: Path, harm, match) -> None:
    path = folder / "train-001.tar"
    path.write_bytes(harm(path.read_bytes()))
    refused(match, str(folder / "*.tar"), cache)


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"png": b"x"}, r"sample k in the shard .*a.tar has no .cls \(it has .png\)"),
        ({"gif": b"x", "cls": b"1"}, "has no .jpg or .jpeg or .png or .webp"),
        ({"png": b"x", "cls": b"4"}, r"its .cls says '4', which is no label \(out of range\).*num_classes 4"),
        ({"png": b"x", "cls": b"cat"}, "its .cls says 'cat', which is no label"),
    ],
)
def test_a_sample_that_lacks_something_is_named(tmp_path: Path, cache: Path, members, match) -> None:
    (tmp_path / "a.tar").write_bytes(shard({"k": members}))
    refused(match, str(tmp_path / "a.tar"), cache)


def test_json_without_the_label_is_named(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.tar").write_bytes(shard({"k": {"png": b"x", "json": b'{"kind": 1}'}}))
    refused("its .json says .*there is no 'label' in it", str(tmp_path / "a.tar"), cache, label="json")


def test_a_picture_that_is_broken_is_named_while_training(folder: Path, cache: Path) -> None:
    path = folder / "train-001.tar"
    whole = path.read_bytes()
    place = whole.index(picture(44))
    path.write_bytes(whole[: place + 20] + b"\0" * 30 + whole[place + 50 :])
    source = webdataset.open(options(str(folder / "*.tar")), cache)
    with pytest.raises(
        TrainingError, match=r"the picture dir/0044.png in the shard .*train-001.tar cannot be decoded \(.*"
    ):
        for part in (source.train, source.held_out):
            seen(part)


def test_a_member_that_is_no_picture_is_named_while_training(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.tar").write_bytes(shard({f"{n}": {"png": b"words", "cls": b"1"} for n in range(4)}))
    source = webdataset.open(options(str(tmp_path / "a.tar"), held_out=0.25), cache)
    with pytest.raises(TrainingError, match=r"the picture \d.png in .*a.tar cannot be decoded \(it is of no kind"):
        source.train.batch(np.arange(1), np.zeros(1, dtype=np.uint64))


def test_a_shard_that_shrinks_or_goes_while_training_is_named(folder: Path, cache: Path) -> None:
    source = webdataset.open(options(str(folder / "*.tar"), held_out_source=None), cache)
    path = folder / "train-002.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(TrainingError, match=r"train-002.tar cannot be read \(\d+ bytes are left of \d+\)"):
        seen(source.train)
    path.unlink()
    with pytest.raises(TrainingError, match=r"at byte \d+ in the shard .*train-002.tar cannot be read .*No such file"):
        seen(source.train)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"held_out": 0.1, "held_out_source": "x.tar"}, "exclude each other"),
        ({"classes": ["a"]}, "data.classes has 1 names, and data.num_classes is 4"),
        ({"mean": [0.5, 0.5]}, "data.mean has 2 numbers"),
        ({"augment": {"crop_padding": 9}}, "data.augment.crop_padding 9 is more than the size of a picture, 8"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        options("x.tar", **words)
