"""Texts and their translations: pairs from aligned files, tokenized once with one vocabulary for both sides."""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta
from msgspec.structs import replace

from dtrain.data import DataShape, catalogues, kept
from dtrain.data.prepared import read_meta
from dtrain.data.tokens import TRAINING_BYTES, BytePairs, TokenizerOptions, check, identity, learn
from dtrain.data.tokens import load as load_tokenizer
from dtrain.data.tokens import resolve as resolve_tokenizer
from dtrain.errors import InputError
from dtrain.settings import Settings

if TYPE_CHECKING:
    import numpy as np

    from dtrain.data.tokens import Tokenizer

FORMAT = 1
"""Raise when the same texts would be prepared differently."""
MESSAGES = "messages"
IGNORED = -1
_SPREAD = 0x5EED
_PAIRS = 4096
_SIDES = ("source", "target")
_LETTERS = re.compile(r"[\W\d_]+")
Pairs = Iterator[tuple[str, str]]


class Options(Settings):
    """Texts and their translations: aligned files of your own, or the messages of this machine's programs."""

    source: str | tuple[str, str] = MESSAGES
    """`messages`, which Linux keeps translated under /usr/share/locale where they are installed, or your own: a `.tsv`
    file with a text and its translation in each line, or two files whose lines belong together."""
    language: Annotated[str, Meta(pattern=r"^[A-Za-z_@]{2,32}\Z")] = "de"
    """Of `messages`: what English is translated to, as the system names it, e.g. de, fr or pt_BR."""
    tokenizer: TokenizerOptions = BytePairs()
    """How text becomes numbers, the same for both sides; pairs are learnt from both."""
    sequence_length: Annotated[int, Meta(ge=4, le=2**16)] = 64
    """Tokens a text may have, one more than that counted for a translation's end; longer pairs are left out."""
    held_out: Annotated[float, Meta(gt=0.0, le=0.5)] = 0.05
    """Share of the pairs that is never trained on; those that differ in signs and figures only stay together."""
    held_out_limit: Annotated[int, Meta(gt=0, le=2**40)] = 4096
    """At most about this many pairs are held out, so that the evaluation over all of them stays quick."""


def describe(options: Options) -> DataShape:
    """Vocabulary and length, without reading the texts."""
    return DataShape("pairs", options.tokenizer.vocabulary_size, options.sequence_length)


def resolve(options: Options, folder: Path) -> Options:
    """The same options with relative paths taken from `folder`."""
    changes: dict[str, Any] = {"tokenizer": resolve_tokenizer(options.tokenizer, folder)}
    if isinstance(options.source, tuple):
        changes["source"] = tuple(str(folder / Path(path).expanduser()) for path in options.source)
    elif options.source != MESSAGES:
        changes["source"] = str(folder / Path(options.source).expanduser())
    return replace(options, **changes)


def prepare(options: Options, cache: Path) -> None:
    """Tokenize the texts into `cache`, unless the same texts were before.

    Raises `InputError` when there are none, or files that do not fit together, `StorageError` when the cache cannot be
    written.
    """
    _prepare(options, cache)


def open(options: Options, cache: Path) -> "TranslationSource":  # noqa: A001
    """The prepared texts, prepared now when they were not yet. Raises what `prepare` raises."""
    folder = kept.find(cache, "translation", _settings(options), _paths(options))
    return TranslationSource(options, folder or _prepare(options, cache))


class TranslationSource:
    """Samples are a text and its translation."""

    def __init__(self, options: Options, folder: Path) -> None:
        self._meta = read_meta(folder)
        self._options, self._folder = options, folder
        self.fingerprint: str = folder.name
        """Changes with the texts or how they are tokenized."""
        self.separator = int(self._meta["separator"])
        """The token that begins what is written, and ends it."""
        words = (options.sequence_length, self.separator, self._meta["dtype"])
        self.train = TextPairs(folder, "train", *words)
        self.held_out = TextPairs(folder, "held_out", *words)

    def yardsticks(self) -> dict[str, dict[str, float]]:
        """There are none."""
        return {}

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`."""
        return [int(token) for token in self._tokenizer.encode([text.encode()])[0]]

    def decode(self, tokens: "Any") -> str:
        """The text of `tokens`; a character that is cut in half becomes U+FFFD."""
        return self._tokenizer.decode(tokens).decode("utf-8", errors="replace")

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        return load_tokenizer(self._options.tokenizer, (self._folder / "tokenizer.json").read_text("utf-8"))


class TextPairs:
    """Pairs of texts one after the other in memory maps."""

    def __init__(self, folder: Path, part: str, length: int, separator: int, dtype: str) -> None:
        import numpy as np

        self._length, self._separator = length, separator
        self._tokens, self._ends = [], []
        for side in _SIDES:
            self._tokens.append(np.memmap(folder / f"{part}_{side}.bin", dtype=dtype, mode="r"))
            self._ends.append(np.memmap(folder / f"{part}_{side}_ends.bin", dtype=np.int64, mode="r"))
        self.num_samples = len(self._ends[0]) - 1

    def batch(self, indices: "np.ndarray", draws: "np.ndarray") -> "dict[str, np.ndarray]":
        """source, inputs and targets, int64 [b, t], -1 behind their ends; inputs begin with the separator and targets
        end with it."""
        import numpy as np

        source, _ = self._side(0, indices)
        written, sizes = self._side(1, indices)
        rows = np.arange(len(indices))
        inputs = np.full_like(written, IGNORED)
        inputs[:, 0], inputs[:, 1:] = self._separator, written[:, :-1]
        written[rows, sizes] = self._separator  # its place is free: a translation is shorter than the length
        return {"source": source, "inputs": inputs, "targets": written}

    def _side(self, side: int, indices: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
        """Tokens, int64 [b, length], -1 behind the text's end; and how many they are, [b]."""
        import numpy as np

        starts = self._ends[side][indices]
        sizes = self._ends[side][indices + 1] - starts
        place = np.arange(self._length)
        inside = place < sizes[:, None]
        offsets = np.where(inside, starts[:, None] + place, 0)
        return np.where(inside, self._tokens[side][offsets].astype(np.int64), IGNORED), sizes


def _prepare(options: Options, cache: Path) -> Path:
    check(options.tokenizer)
    paths = _paths(options)

    def contents() -> list[str]:
        return [kept.sha256(path) for path in paths]

    return kept.keep(cache, "translation", _settings(options), paths, contents, partial(_convert, options, paths))


def _convert(options: Options, paths: list[str], folder: Path) -> dict[str, Any]:
    import numpy as np

    read = partial(_pairs, options, paths)
    num_pairs = sum(1 for _ in read())
    share = min(options.held_out, options.held_out_limit / max(num_pairs, 1))
    is_held = partial(_is_held, share)
    tokenizer = learn(options.tokenizer, _some(read, is_held))
    dtype = np.dtype(np.uint16 if options.tokenizer.vocabulary_size <= 2**16 else np.uint32)
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), "utf-8")
    writers = {
        (part, side): _Writer(folder, f"{part}_{side}", dtype) for part in ("train", "held_out") for side in _SIDES
    }
    num_long = 0
    every = read()
    while some := list(islice(every, _PAIRS)):
        texts = [tokenizer.encode([pair[side].encode() for pair in some]) for side in range(2)]
        for pair, source, target in zip(some, *texts, strict=True):
            if len(source) > options.sequence_length or len(target) >= options.sequence_length:
                num_long += 1
                continue
            part = "held_out" if is_held(pair) else "train"
            writers[part, "source"].write(source)
            writers[part, "target"].write(target)
    nums = {part: writers[part, "source"].close() for part in ("train", "held_out")}
    for part in nums:
        writers[part, "target"].close()
    if not all(nums.values()):
        raise InputError(
            f"data.source has {num_pairs} pairs, {num_long} of them longer than data.sequence_length"
            f" {options.sequence_length}: {nums['train']} are left to train on and {nums['held_out']} held out; give"
            " more pairs, a larger sequence_length or a larger held_out"
        )
    if num_long:
        logging.getLogger(__name__).warning(
            "%d of %d pairs are longer than data.sequence_length %d and left out",
            num_long,
            num_pairs,
            options.sequence_length,
        )
    return {
        "format": FORMAT,
        "dtype": dtype.str,
        "separator": tokenizer.separator,
        "pairs": nums,
        "too_long": num_long,
    }


class _Writer:
    """Texts in one file, and where each ends in another."""

    def __init__(self, folder: Path, name: str, dtype: "np.dtype[Any]") -> None:
        self._dtype, self._ends = dtype, [0]
        self._ends_path = folder / f"{name}_ends.bin"
        self._file = (folder / f"{name}.bin").open("wb")

    def write(self, tokens: "np.ndarray") -> None:
        self._file.write(tokens.astype(self._dtype).tobytes())
        self._ends.append(self._ends[-1] + len(tokens))

    def close(self) -> int:
        """Returns how many texts were written."""
        import numpy as np

        self._file.close()
        np.array(self._ends, dtype=np.int64).tofile(self._ends_path)
        return len(self._ends) - 1


def _some(read: Callable[[], Pairs], is_held: Callable[[tuple[str, str]], bool]) -> Iterator[bytes]:
    """Both sides of the pairs to train on, up to `TRAINING_BYTES`."""
    left = TRAINING_BYTES
    for pair in read():
        if is_held(pair):
            continue
        for text in pair:
            data = text.encode()
            left -= len(data)
            yield data
        if left <= 0:
            return


def _is_held(share: float, pair: tuple[str, str]) -> bool:
    """By the letters of the first text: repetitions, with other signs or figures, stand on the same side."""
    letters = _LETTERS.sub(" ", pair[0]).strip().casefold() or pair[0]
    digest = hashlib.blake2b(letters.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def _pairs(options: Options, paths: list[str]) -> Pairs:
    """All pairs, in the order of the files, without those of which a side is empty."""
    if options.source == MESSAGES:
        yield from catalogues.read(paths)
    elif len(paths) == 2:
        for number, (source, target) in enumerate(zip_longest(*map(_lines, paths)), 1):
            if source is None or target is None:
                short = paths[0] if source is None else paths[1]
                raise InputError(
                    f"data.source: {short} ends at line {number - 1} and the other of {paths[0]} and {paths[1]} goes"
                    " on; the lines of both must belong together"
                )
            if source and target:
                yield source, target
    else:
        for number, line in enumerate(_lines(paths[0]), 1):
            if not line:
                continue
            columns = [column.strip() for column in line.split("\t")]
            if len(columns) < 2:
                raise InputError(
                    f"data.source: {paths[0]}:{number} has no tab; write a text, a tab and its translation in each line"
                )
            if columns[0] and columns[1]:
                yield columns[0], columns[1]


def _lines(path: str) -> Iterator[str]:
    try:
        with Path(path).open("rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    yield line.decode("utf-8").strip(" \r\n")
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"data.source: {path}:{number} is not UTF-8 ({error.reason}); convert it"
                    ) from error
    except OSError as error:
        raise kept.unreadable(path, error) from error


def _paths(options: Options) -> list[str]:
    """The files behind `source`. Raises `InputError` when one is not there."""
    if options.source == MESSAGES:
        return catalogues.find(options.language)
    paths = [options.source] if isinstance(options.source, str) else list(options.source)
    for path in paths:
        if not Path(path).is_file():
            raise InputError(f"data.source: there is no file {path}; correct it, or leave it out for `{MESSAGES}`")
    return paths


def _settings(options: Options) -> list[Any]:
    chosen = {key: getattr(options, key) for key in ("sequence_length", "held_out", "held_out_limit")}
    kind = MESSAGES if options.source == MESSAGES else len(_paths(options))
    return [FORMAT, kind, chosen, identity(options.tokenizer)]
