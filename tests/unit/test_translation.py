"""Pairs of texts: how they are found, split, tokenized and padded, and how mistakes are told."""

import struct
from pathlib import Path

import numpy as np
import pytest

from dtrain.data import DataShape, catalogues, translation
from dtrain.data.order import Order
from dtrain.data.translation import Options, TextPairs, describe, prepare, resolve
from dtrain.errors import InputError
from dtrain.settings import convert, from_json, to_json

WORDS = ["house", "tree", "grün", "water", "stein", "日本", "light", "road", "cloud"]
BYTES = {"tokenizer": {"name": "bytes"}, "sequence_length": 64}
BPE = {"tokenizer": {"name": "bpe", "vocab_size": 300}, "sequence_length": 64}


def made(num: int = 200, seed: int = 0) -> list[tuple[str, str]]:
    """Texts that differ in their words, and what they are turned into."""
    random = np.random.default_rng(seed)
    texts = {" ".join(random.choice(WORDS, int(random.integers(1, 7)))): None for _ in range(num)}
    return [(text, text.upper()[::-1]) for text in texts]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{a}\t{b}\n" for a, b in made()), "utf-8")
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def options(source: object, **words: object) -> Options:
    return convert({"source": source, "held_out": 0.2, **BYTES, **words}, Options)


def pairs_of(source: translation.TranslationSource, dataset: TextPairs) -> list[tuple[str, str]]:
    """What the batches say, decoded; checks how they are padded."""
    number = np.arange(dataset.num_samples)
    batch = dataset.batch(number, number.astype(np.uint64))
    assert list(batch) == ["source", "inputs", "targets"]
    found = []
    for source_row, inputs, targets in zip(*batch.values(), strict=True):
        assert {row.dtype for row in (source_row, inputs, targets)} == {np.dtype(np.int64)}
        num_source, num = int((source_row >= 0).sum()), int((targets >= 0).sum())
        assert (source_row[num_source:] == -1).all() and (source_row[:num_source] >= 0).all()
        assert inputs[0] == source.separator == targets[num - 1] and (targets[num:] == -1).all()
        assert np.array_equal(inputs[1:num], targets[: num - 1]) and (inputs[num:] == -1).all()
        found.append((source.decode(source_row[:num_source].tolist()), source.decode(targets[: num - 1].tolist())))
    return found


@pytest.mark.parametrize("words", [BYTES, BPE])
@pytest.mark.parametrize("form", ["tsv", "files"])
def test_every_pair_stands_on_one_side_as_it_was_written(table: Path, cache: Path, words, form) -> None:
    where: object = str(table)
    if form == "files":
        where = [str(table.with_name("a.txt")), str(table.with_name("b.txt"))]
        for side in range(2):
            Path(where[side]).write_text("".join(f"{pair[side]}\r\n" for pair in made()) + "\n", "utf-8")
    source = translation.open(options(where, **words), cache)
    train, held_out = pairs_of(source, source.train), pairs_of(source, source.held_out)
    assert sorted(train + held_out) == sorted(made())
    assert not {a for a, _ in train} & {a for a, _ in held_out}
    assert 0.1 < len(held_out) / len(made()) < 0.3
    assert source.decode(source.encode("grün 日本")) == "grün 日本"


def test_repetitions_stay_on_one_side(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{n}. {a}, {n}!\t{b} {n}\n" for a, b in made() for n in range(3)), "utf-8")
    source = translation.open(options(str(path)), cache)
    letters = [
        {"".join(c for c in a if c.isalpha()) for a, _ in pairs_of(source, dataset)}
        for dataset in (source.train, source.held_out)
    ]
    assert not letters[0] & letters[1] and all(letters)


def test_pairs_are_read_once_an_epoch(table: Path, cache: Path) -> None:
    source = translation.open(options(str(table)), cache)
    num = source.train.num_samples
    stream = np.concatenate([Order(1, num, num, num, 1, 1, 0).micro_batch(0, 0)[0]])
    batch = source.train.batch(stream, stream.astype(np.uint64))
    assert len({row.tobytes() for row in batch["source"]}) == num


def test_long_pairs_are_left_out_and_counted(table: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fits(pair: tuple[str, str]) -> bool:
        return len(pair[0].encode()) <= 20 and len(pair[1].encode()) <= 19

    source = translation.open(options(str(table), sequence_length=20), cache)
    left = pairs_of(source, source.train) + pairs_of(source, source.held_out)
    assert sorted(left) == sorted(filter(fits, made()))
    num_long = len(made()) - len(left)
    assert f"{num_long} of {len(made())} pairs are longer than data.sequence_length 20" in caplog.text


def test_the_share_held_out_is_limited(table: Path, cache: Path) -> None:
    source = translation.open(options(str(table), held_out=0.5, held_out_limit=20), cache)
    assert 5 <= source.held_out.num_samples <= 40


def test_pairs_are_learnt_from_both_sides_of_the_training_part(table: Path, cache: Path) -> None:
    source = translation.open(options(str(table), tokenizer={"name": "bpe", "vocab_size": 400}), cache)
    assert len(source.encode("house water")) <= 3 and len(source.encode("RETAW ESUOH")) <= 3


def test_the_same_files_are_prepared_once(table: Path, cache: Path, tmp_path: Path) -> None:
    first = translation.open(options(str(table)), cache)
    again = translation.open(options(str(table.rename(tmp_path / "other.tsv"))), cache)
    assert again.fingerprint == first.fingerprint
    (tmp_path / "other.tsv").write_text((tmp_path / "other.tsv").read_text("utf-8") + "more\tmehr\n", "utf-8")
    assert translation.open(options(str(tmp_path / "other.tsv")), cache).fingerprint != first.fingerprint
    shorter = translation.open(options(str(tmp_path / "other.tsv"), sequence_length=32), cache)
    assert shorter.fingerprint != first.fingerprint


# The messages of programs


def catalogue(pairs: list[tuple[bytes, bytes]], order: str = "<", charset: str = "UTF-8") -> bytes:
    """A .mo file, as `msgfmt` writes it."""
    entries = sorted([(b"", f"Content-Type: text/plain; charset={charset}\n".encode()), *pairs])
    head, texts, tables = 28, b"", [[], []]
    start = head + 16 * len(entries)
    for side in range(2):
        for entry in entries:
            tables[side].append((len(entry[side]), start + len(texts)))
            texts += entry[side] + b"\0"
    table = b"".join(struct.pack(f"{order}2I", *one) for side in tables for one in side)
    numbers = (0x950412DE, 0, len(entries), head, head + 8 * len(entries), 0, 0)
    return struct.pack(f"{order}7I", *numbers) + table + texts


@pytest.fixture
def messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "locale"
    (folder / "de" / "LC_MESSAGES").mkdir(parents=True)
    monkeypatch.setattr(catalogues, "FOLDER", folder)
    return folder / "de" / "LC_MESSAGES"


@pytest.mark.parametrize("order", ["<", ">"])
def test_catalogues_are_read(messages: Path, order: str) -> None:
    pairs = [
        (b"menu\4Open", "Öffnen".encode("latin-1")),
        (b"%d file\0%d files", b"%d Datei\0%d Dateien"),
        (b"same", b"same"),
        (b"empty", b""),
    ]
    (messages / "one.mo").write_bytes(catalogue(pairs, order, "ISO-8859-1"))
    (messages / "two.mo").write_bytes(catalogue([(b"Open", "Öffnen".encode()), (b"Tree", b"Baum")]))
    (messages / "iso_3166.mo").write_bytes(catalogue([(b"Germany", b"Deutschland")]))
    found = list(catalogues.read(catalogues.find("de")))
    assert found == [("%d file", "%d Datei"), ("Open", "Öffnen"), ("Tree", "Baum")]


def test_messages_are_a_source(messages: Path, cache: Path) -> None:
    pairs = [(a.encode(), b.encode()) for a, b in made()]
    (messages / "one.mo").write_bytes(catalogue(pairs))
    source = translation.open(options("messages"), cache)
    assert sorted(pairs_of(source, source.train) + pairs_of(source, source.held_out)) == sorted(made())


@pytest.mark.skipif(
    not list(catalogues.FOLDER.glob("de/LC_MESSAGES/*.mo")), reason="this machine keeps no messages in German"
)
def test_the_messages_of_this_machine_are_pairs() -> None:
    found = list(catalogues.read(catalogues.find("de")))
    assert len(found) > 500
    assert len({a for a, _ in found}) > 0.8 * len(found)
    assert np.mean([any(c in "äöüß" for c in b.lower()) for a, b in found if len(b) > 60]) > 0.5


# Mistakes


def refused(match: str, source: object, cache: Path, **words: object) -> None:
    with pytest.raises(InputError, match=match):
        prepare(options(source, **words), cache)
    assert not list(cache.glob("*.making"))


def test_mistakes_are_named_with_file_and_line(tmp_path: Path, cache: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    refused("there is no file .*one.txt", str(one), cache)
    one.write_text("a\tb\n\nc d\n")
    refused("one.txt:3 has no tab", str(one), cache)
    one.write_bytes(b"a\tb\n\xff\tx\n")
    refused("one.txt:2 is not UTF-8", str(one), cache)
    one.write_text("a\nb\nc\n")
    two.write_text("a\nb\n")
    refused(r"two.txt ends at line 2 and the other of .* goes on", [str(one), str(two)], cache)
    one.write_text("")
    refused("has 0 pairs.*give more pairs", str(one), cache)
    one.write_text("a long text\tein langer Text\n" * 10)
    refused("has 10 pairs, 10 of them longer than data.sequence_length 4", str(one), cache, sequence_length=4)


def test_a_machine_without_messages_says_so(messages: Path, cache: Path) -> None:
    refused("no translated messages .* for language 'de' .*none of any language", "messages", cache)
    (messages / "a.mo").write_bytes(b"nothing of that kind, and long enough")
    refused("no translated messages .* for language 'fr' .*there is: de", "messages", cache, language="fr")
    refused("a.mo is no catalogue of messages", "messages", cache)


def test_describing_and_resolving_read_nothing(tmp_path: Path) -> None:
    assert describe(Options()) == DataShape("pairs", 4096, 64)
    assert resolve(Options(), tmp_path).source == "messages"
    assert resolve(options("a.tsv"), tmp_path).source == str(tmp_path / "a.tsv")
    asked = resolve(options(["a", "b"]), tmp_path)
    assert asked.source == (str(tmp_path / "a"), str(tmp_path / "b"))
    assert asked == from_json(to_json(asked), Options)
