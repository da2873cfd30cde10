"""Text: what is held out, how it is tokenized, kept and read, and how mistakes are told."""

import gzip
import itertools
import json
import lzma
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import ValidationError

from dtrain.data import Dataset, DataShape, corpus, text, tokens
from dtrain.data.order import draws
from dtrain.data.text import Options, TextSource, describe, prepare, resolve
from dtrain.data.windows import HeldOutWindows, MaskedWindows, Windows
from dtrain.errors import InputError, StorageError
from dtrain.settings import from_json, to_json

WORDS = ["loss", "model", "train", "gradient", "héllo", "self.step", "return", "    if x:"]


def write_corpus(folder: Path, num_files: int = 30, seed: int = 0) -> Path:
    """Folders of two files each, every line with words and numbers of its own."""
    random = np.random.default_rng(seed)
    for number in range(num_files):
        path = folder / f"module_{number // 2:02d}" / f"file_{number:02d}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [" ".join([*random.choice(WORDS, 4), str(random.integers(10**9))]) for _ in range(40)]
        path.write_text("\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def read(windows: Dataset) -> dict[str, np.ndarray]:
    """All samples in one batch."""
    return windows.batch(np.arange(windows.num_samples), np.zeros(windows.num_samples, dtype=np.uint64))


def options(source: Path | str, **words: object) -> Options:
    return Options(**{"source": str(source), "tokenizer": {"name": "bytes"}, "sequence_length": 32, **words})


BPE = {"tokenizer": {"name": "bpe", "vocab_size": 400}}


def text_of(source: TextSource, name: str) -> list[bytes]:
    """The documents in the stream of tokens, decoded."""
    stream = np.fromfile(source._folder / f"{name}.bin", source._meta["dtype"])
    assert stream[0] == source.separator
    starts = [*np.flatnonzero(stream == source.separator), len(stream)]
    return [source._tokenizer.decode(stream[start + 1 : stop].tolist()) for start, stop in itertools.pairwise(starts)]


# What is held out


def test_the_standard_library_is_split_by_modules_and_nothing_stands_on_both_sides() -> None:
    files = corpus.read(corpus.find("python-stdlib"))
    names = {file.name for file in files}
    assert {"os.py", "pydoc_data/topics.py", "json/decoder.py"} <= names
    assert not [name for name in names if {"test", "tests", "site-packages", "idle_test"} & set(Path(name).parts)]
    split = corpus.split(files, 0.05, 512_000)
    assert split.by == "folder"
    held, train = ({p.file for p in pieces} for pieces in (split.held_out, split.train))
    assert len(held) + len(train) == len(files)
    assert not {f.name.split("/")[0] for f in held} & {f.name.split("/")[0] for f in train}
    assert not {f.sha256 for f in held} & {f.sha256 for f in train}
    size = sum(piece.size for piece in split.held_out)
    assert 256_000 <= size <= 512_000

    def lines(chosen: set[corpus.File]) -> set[bytes]:
        return {line for f in chosen for line in Path(f.path).read_bytes().split(b"\n") if len(line.strip()) >= 24}

    trained_on = lines(train)
    for file in held:
        own = lines({file})
        assert len(own) < 20 or len(own & trained_on) < 0.4 * len(own), file.name


def test_a_split_is_a_function_of_the_files(folder: Path) -> None:
    files = corpus.read(corpus.find(str(folder)))
    assert corpus.split(files, 0.1, 10**6) == corpus.split(list(files), 0.1, 10**6)
    assert sum(p.size for p in corpus.split(files, 0.2, 5000).held_out) <= 5000


def test_copies_count_once_and_near_copies_stay_together(folder: Path) -> None:
    original = (folder / "module_00" / "file_00.py").read_text()
    for number in range(40):
        copy = folder / f"copy_{number:02d}" / "file.py"
        copy.parent.mkdir()
        copy.write_text(original if number % 2 else f"# {number}\n" + original)
    files = corpus.read(corpus.find(str(folder)))
    assert len({file.sha256 for file in files}) == len(files) == 30 + 20
    split = corpus.split(files, 0.3, 10**6)
    sides = {
        side: {p.file.name.split("/")[0] for p in pieces}
        for side, pieces in (("train", split.train), ("held_out", split.held_out))
    }
    near = {name for name in (*sides["train"], *sides["held_out"]) if name.startswith("copy")}
    assert near <= sides["train"] or near <= sides["held_out"]


def test_few_files_are_split_by_file_and_one_file_by_passage(tmp_path: Path) -> None:
    flat = tmp_path / "flat" / "pages"
    write_corpus(tmp_path / "flat", 20)
    for number, path in enumerate(sorted((tmp_path / "flat").rglob("*.py"))):
        flat.mkdir(exist_ok=True)
        path.rename(flat / f"{number}.txt")
    split = corpus.split(
        corpus.read(corpus.find([str(flat), str(write_corpus(tmp_path / "flat" / "b", 2))])), 0.1, 10**6
    )
    assert split.by == "file"
    one = tmp_path / "one.txt"
    one.write_text("".join(f"line {number}\n" for number in range(1000)))
    split = corpus.split(corpus.read(corpus.find(str(one))), 0.1, 10**6)
    assert split.by == "passage"
    (train,), (held,) = split.train, split.held_out
    assert train.stop == held.start and held.stop == one.stat().st_size
    assert held.size == pytest.approx(0.1 * one.stat().st_size, rel=0.02)
    assert b"".join(held.blocks()).startswith(b"line ")


def test_blocks_are_the_whole_text(tmp_path: Path) -> None:
    path = tmp_path / "x"
    content = b"a\nbb\nccc" * 100 + b"d" * 500
    path.write_bytes(content)
    for start, stop, size in [(0, len(content), 7), (3, 700, 64), (0, len(content), 10**6)]:
        piece = corpus.Piece(corpus.File(str(path), "x"), start, stop)
        assert b"".join(piece.blocks(size)) == content[start:stop]


# How it is tokenized


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_tokenizers_lose_nothing(data: bytes) -> None:
    for tokenizer in TOKENIZERS:
        (found,) = tokenizer.encode([data])
        assert tokenizer.decode(found.tolist()) == data
        assert tokenizer.lengths()[found].sum() == len(data)
        assert tokenizer.separator not in found


TEXT = [b"def step(self):\n    return self.loss\n" * 3, "näive café 東京\n".encode() * 3, bytes(range(256)) * 2]
TOKENIZERS = [
    tokens.learn(tokens.Bytes(), TEXT),
    tokens.learn(tokens.BytePairs(vocab_size=300), TEXT),
    tokens.load(tokens.BytePairs(vocab_size=300), tokens.learn(tokens.BytePairs(vocab_size=300), TEXT).to_json()),
]


def test_pairs_are_merged_and_learnt_alike_each_time() -> None:
    (found,) = TOKENIZERS[1].encode([TEXT[0]])
    assert len(found) < len(TEXT[0]) / 2
    assert TOKENIZERS[1].to_json() == tokens.learn(tokens.BytePairs(vocab_size=300), TEXT).to_json()
    assert np.array_equal(TOKENIZERS[2].encode([TEXT[0]])[0], found)


def test_pairs_are_learnt_from_the_training_part_only(folder: Path, cache: Path) -> None:
    split = corpus.split(corpus.read(corpus.find(str(folder))), 0.1, 10**6)
    for piece in split.held_out:
        path = Path(piece.file.path)
        path.write_text(path.read_text() + "zqxjzqxj" * 200 + "\n")
    source = text.open(options(folder, held_out=0.2, **BPE), cache)
    if not any(b"zqxjzqxj" in document for document in text_of(source, "held_out")):
        pytest.fail("the marked files are not held out")
    assert not any(b"zq" in token for token in source._tokenizer._bytes)


# How it is kept and read


@pytest.mark.parametrize("words", [{}, BPE])
def test_the_streams_are_the_files(folder: Path, cache: Path, words: dict[str, object]) -> None:
    source = text.open(options(folder, **words), cache)
    split = corpus.split(corpus.read(corpus.find(str(folder))), 0.05, 512_000)
    for name, pieces in (("train", split.train), ("held_out", split.held_out)):
        assert text_of(source, name) == [Path(piece.file.path).read_bytes() for piece in pieces]
    assert source.decode(source.encode("héllo 東京\n")) == "héllo 東京\n"
    assert source.decode(source.encode("é")[:1]) in ("\ufffd", "é")


def test_training_windows_cover_every_target_once() -> None:
    stream = np.arange(100, dtype=np.uint16)
    windows = Windows(stream, 9)
    batch = read(windows)
    assert batch["inputs"].shape == (11, 9) and batch["inputs"].dtype == np.int64
    assert batch["targets"].flatten().tolist() == list(range(1, 100))
    assert np.array_equal(batch["inputs"] + 1, batch["targets"])


@given(num_tokens=st.integers(1, 200), length=st.integers(1, 40), share=st.floats(0, 0.9), num_bytes=st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_held_out_windows_predict_every_token_once(num_tokens: int, length: int, share: float, num_bytes: int) -> None:
    stream = np.arange(num_tokens, dtype=np.uint16)
    context = int(length * share)
    windows = HeldOutWindows(stream, length, context, np.full(num_tokens, num_bytes, dtype=np.uint16))
    batch = read(windows)
    counted = batch["targets"] >= 0
    assert sorted(batch["targets"][counted].tolist()) == list(range(1, num_tokens))
    assert np.array_equal(batch["inputs"][counted] + 1, batch["targets"][counted])
    assert batch["target_bytes"].sum() == num_bytes * (num_tokens - 1)
    assert batch["target_bytes"].dtype == np.int64
    first_counted = np.where(counted.any(axis=1), counted.argmax(axis=1), context)
    starts_stream = batch["inputs"][:, 0] == 0
    assert (first_counted[~starts_stream] == context).all()


@pytest.mark.parametrize("words", [{}, BPE, {"held_out_context": 0.0}])
def test_yardsticks_and_evaluation_are_over_the_same_bytes(folder: Path, cache: Path, words: dict[str, object]) -> None:
    source = text.open(options(folder, **words), cache)
    held_out = b"".join(text_of(source, "held_out"))
    whole = read(source.held_out)
    assert whole["target_bytes"].sum() == len(held_out) == source.held_out_bytes
    figures = source.yardsticks()["bits_per_byte"]
    assert figures["gzip -9"] == 8 * len(gzip.compress(held_out, 9, mtime=0)) / len(held_out)
    assert figures["xz -9e"] == 8 * len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)) / len(held_out)


def test_the_same_text_is_prepared_once_wherever_it_lies(folder: Path, cache: Path, tmp_path: Path) -> None:
    first = text.open(options(folder), cache)
    made = first._folder.stat().st_mtime_ns
    moved = folder.rename(tmp_path / "elsewhere")
    second = text.open(options(moved, sequence_length=16), cache)
    assert second.fingerprint == first.fingerprint and second._folder.stat().st_mtime_ns == made


def test_other_text_or_settings_are_prepared_anew(folder: Path, cache: Path) -> None:
    prints = {text.open(options(folder, **words), cache).fingerprint for words in ({}, BPE, {"held_out": 0.2})}
    path = folder / "module_03" / "file_06.py"
    path.write_text(path.read_text().replace("loss", "gain"))
    prints.add(text.open(options(folder), cache).fingerprint)
    (folder / "module_03" / "more.py").write_text("more = 1\n")
    prints.add(text.open(options(folder), cache).fingerprint)
    assert len(prints) == 5


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "garble meta", "remove meta"])
def test_a_damaged_cache_is_made_anew(folder: Path, cache: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    good = text.open(options(folder), cache)
    kept = {path.name: path.read_bytes() for path in good._folder.iterdir()}
    path = good._folder / ("meta.json" if "meta" in harm else "train.bin")
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif harm == "truncate":
        path.write_bytes(content[:-2])
    elif harm == "garble meta":
        path.write_bytes(b"[1")
    else:
        path.unlink()
    prepare(options(folder), cache)
    assert "is damaged" in caplog.text and "made anew" in caplog.text
    assert {path.name: path.read_bytes() for path in good._folder.iterdir()} == kept


def test_opening_mends_what_it_can_see(folder: Path, cache: Path) -> None:
    path = text.open(options(folder), cache)._folder / "train.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    text.open(options(folder), cache)
    assert path.read_bytes() == whole


def test_what_a_dead_process_left_half_made_is_swept_up(folder: Path, cache: Path) -> None:
    name = text.open(options(folder), cache).fingerprint
    (cache / name).rename(cache / f"{name}.making")
    (cache / f"{name}.making" / "junk").write_text("half")
    source = text.open(options(folder), cache)
    assert sorted(path.name for path in source._folder.iterdir()) == [
        "held_out.bin", "meta.json", "token_bytes.bin", "tokenizer.json", "train.bin",
    ]  # fmt: skip
    assert not (cache / f"{name}.making").exists()


def _prepare_and_read(words: tuple[Options, Path]) -> tuple[str, int]:
    prepare(*words)
    source = text.open(*words)
    return source.fingerprint, int(read(source.train)["inputs"].sum())


def test_processes_may_prepare_at_the_same_time(folder: Path, cache: Path) -> None:
    with multiprocessing.get_context("forkserver").Pool(4) as pool:
        found = pool.map(_prepare_and_read, [(options(folder), cache)] * 8, chunksize=1)
    assert len(set(found)) == 1
    assert len(list(cache.glob("text-*/"))) == 1 and not list(cache.glob("*.making"))


def test_describing_and_resolving_read_nothing(tmp_path: Path) -> None:
    asked = Options(source="texts/*.txt", tokenizer={"name": "bpe", "vocab_size": 999}, sequence_length=7)
    assert describe(asked) == DataShape("tokens", 999, 7)
    assert describe(options("nowhere")).vocabulary_size == 257
    assert resolve(asked, tmp_path).source == (str(tmp_path / "texts/*.txt"),)
    assert resolve(Options(), tmp_path).source == "python-stdlib"
    assert resolve(asked, tmp_path) == from_json(to_json(resolve(asked, tmp_path)), Options)


# Mistakes


def refused(match: str, source: Path | str, cache: Path, **words: object) -> None:
    with pytest.raises(InputError, match=match) as caught:
        text.open(options(source, **words), cache)
    assert "data." in caught.value.message
    assert not list(cache.glob("*.making")) and not list(cache.glob("text-*/meta.json"))


def test_a_corpus_that_is_not_there_is_refused(tmp_path: Path, cache: Path) -> None:
    refused("no file, folder or match for '.*nowhere'", tmp_path / "nowhere", cache)
    refused("holds no text file", tmp_path / "*.txt", cache)
    (tmp_path / "empty").mkdir()
    refused("holds no text file", tmp_path / "empty", cache)
    (tmp_path / "empty" / "a.txt").touch()
    refused("every file of .* is empty", tmp_path / "empty", cache)
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "x.so").write_bytes(b"\x7fELF\0\0")
    refused("holds no text file", tmp_path / "binary", cache)


def test_a_file_that_cannot_be_read_is_named(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "module_01" / "gone.py").symlink_to("nowhere")
    refused("cannot read .*gone.py: No such file or directory; make it readable or leave it out", folder, cache)
    (folder / "module_01" / "gone.py").unlink()
    real = corpus.__builtins__["open"]

    def deny(path: str, *words: object) -> object:
        if str(path).endswith("file_03.py"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *words)

    monkeypatch.setattr(corpus, "open", deny, raising=False)
    refused("cannot read .*file_03.py: Permission denied", folder, cache)


def test_too_little_text_is_refused(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "small.txt"
    path.write_text("one line\n" * 10)
    with pytest.raises(InputError, match=r"has \d+ tokens to train on, and data.sequence_length 100"):
        text.open(options(path, sequence_length=100), cache)
    path.write_text("x")
    refused("holds nothing out", path, tmp_path / "other")
    path.write_text("one line without an end " * 100)
    assert text.open(options(path), cache).held_out_bytes == 120


def test_a_cache_that_cannot_be_written_is_a_storage_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot keep prepared data under .*XDG_CACHE_HOME"):
        prepare(options(folder), tmp_path / "file" / "cache")


def test_bpe_without_its_package_is_refused(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("bpe needs the package 'tokenizers'; install dtrain\\[train\\]", folder, cache, **BPE)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"tokenizer": {"name": "bpe", "vocab_size": 100}}, "`int` >= 257.*vocab_size"),
        ({"tokenizer": {"name": "words"}}, "one of: bytes, bpe"),
        ({"tokenizer": {"name": "bytes", "vocab_size": 300}}, "unknown field `vocab_size`"),
        ({"held_out": 0.0}, "`float` > 0.0.*held_out"),
        ({"source": ()}, "length >= 1.*source"),
    ],
)
def test_options_that_cannot_be_are_refused(words: dict[str, object], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        Options(**words)


def test_meta_says_what_was_held_out(folder: Path, cache: Path) -> None:
    meta = json.loads((text.open(options(folder, held_out=0.2), cache)._folder / "meta.json").read_text())
    assert meta["held_out_by"] == "folder" and meta["held_out_files"]
    assert meta["train_bytes"] + meta["held_out_bytes"] == sum(p.stat().st_size for p in folder.rglob("*.py"))


# Hidden tokens, and documents in one sample


def masked(length: int = 64, share: float = 0.15, seed: int = 1, **words: object) -> tuple[MaskedWindows, np.ndarray]:
    """Windows over documents of 20 tokens; separator 100, mask 101."""
    stream = np.random.default_rng(seed).integers(0, 100, 40 * length).astype(np.uint16)
    stream[::20] = 100
    return MaskedWindows(stream, length, share, 100, **words), stream.astype(np.int64)


@pytest.mark.parametrize(("length", "share", "count"), [(64, 0.15, 10), (256, 0.15, 38), (10, 0.01, 1), (64, 0.9, 58)])
def test_a_fixed_number_of_tokens_is_hidden(length: int, share: float, count: int) -> None:
    windows, stream = masked(length, share)
    found = windows.batch(np.arange(windows.num_samples), draws(3, np.arange(windows.num_samples, dtype=np.uint64)))
    assert found["inputs"].dtype == found["targets"].dtype == np.int64
    hidden = found["targets"] >= 0
    assert (hidden.sum(axis=1) == count).all()
    whole = stream[: windows.num_samples * length].reshape(-1, length)
    assert np.array_equal(found["targets"][hidden], whole[hidden])
    assert np.array_equal(found["inputs"][~hidden], whole[~hidden])
    assert not (found["targets"] == 100).any()
    assert found["places"].dtype == np.int64
    assert np.array_equal(found["places"], [np.flatnonzero(row) for row in hidden])


def test_hidden_tokens_are_shown_as_bert_does() -> None:
    windows, _ = masked(256)
    numbers = np.arange(4000)
    found = windows.batch(numbers % windows.num_samples, draws(3, numbers.astype(np.uint64)))
    hidden = found["targets"] >= 0
    shown, true = found["inputs"][hidden], found["targets"][hidden]
    assert (shown == 101).mean() == pytest.approx(0.8, abs=0.005)
    assert (shown == true).mean() == pytest.approx(0.1 + 0.1 / 100, abs=0.005)
    others = shown[(shown != 101) & (shown != true)]
    assert set(others.tolist()) == set(range(100))
    assert np.bincount(others, minlength=100).std() < 0.15 * len(others) / 100
    assert hidden.mean(axis=0)[1:].std() < 0.02  # each place as often as the others
    assert np.corrcoef(hidden[:, 1], hidden[:, 2])[0, 1] < 0.05


def test_what_is_hidden_is_a_function_of_the_draw() -> None:
    windows, _ = masked()
    samples, chances = np.arange(8), draws(3, np.arange(8, dtype=np.uint64))
    whole = windows.batch(samples, chances)
    for number in range(8):
        one = windows.batch(samples[[number]], chances[[number]])
        assert all(np.array_equal(one[name][0], whole[name][number]) for name in whole)
    again = windows.batch(samples, draws(4, np.arange(8, dtype=np.uint64)))
    assert not any(np.array_equal(again["targets"][n], whole["targets"][n]) for n in range(8))


def test_held_out_tokens_are_hidden_alike_each_time() -> None:
    windows, stream = masked(is_held_out=True)
    numbers = np.arange(windows.num_samples)
    first, second = (windows.batch(numbers, draws(seed, numbers.astype(np.uint64))) for seed in (1, 2))
    assert np.array_equal(first["inputs"], second["inputs"]) and np.array_equal(first["targets"], second["targets"])
    seen = np.where(first["targets"] >= 0, first["targets"], first["inputs"])
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, stream.reshape(-1, 64).tolist()))
    assert len({tuple(np.flatnonzero(row >= 0)) for row in first["targets"]}) == windows.num_samples


def test_masked_text_has_a_token_more_and_is_prepared_the_same(folder: Path, cache: Path) -> None:
    plain, hidden = options(folder), options(folder, objective="masked")
    assert describe(hidden) == DataShape("masked", 258, 32, num_targets=5)
    source = text.open(hidden, cache)
    assert source.fingerprint == text.open(plain, cache).fingerprint
    assert source.mask == 257 and source.yardsticks() == {}
    batch = read(source.train)
    assert (batch["inputs"] == 257).any() and batch["inputs"].max() == 257
    assert ((batch["targets"] >= 0).sum(axis=1) == round(0.15 * 32)).all()
    with pytest.raises(InputError, match=r"has \d+ tokens held out, fewer than data.sequence_length 5000"):
        text.open(options(folder, objective="masked", sequence_length=5000), cache)


@pytest.mark.parametrize("objective", ["next", "masked"])
def test_packed_documents_are_numbered(folder: Path, cache: Path, objective: str) -> None:
    words = {"objective": objective, "sequence_length": 3000, "held_out": 0.3}
    packed, joined = (text.open(options(folder, documents=d, **words), cache) for d in ("packed", "joined"))
    for part in ("train", "held_out"):
        batch, plain = read(getattr(packed, part)), read(getattr(joined, part))
        documents = batch.pop("documents")
        assert batch.keys() == plain.keys() and all(np.array_equal(batch[name], plain[name]) for name in plain)
        assert documents.dtype == np.int64 and documents.shape == batch["inputs"].shape
        begins = np.diff(documents, axis=1)
        assert set(begins.flatten().tolist()) == {0, 1}
        assert np.array_equal(begins == 1, batch["inputs"][:, 1:] == packed.separator)
