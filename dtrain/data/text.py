"""Text from files: tokenized once, kept by the hash of its contents, read by memory map."""

import gzip
import hashlib
import json
import lzma
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta
from msgspec.structs import replace

from dtrain.data import Dataset, DataShape, corpus
from dtrain.data.prepared import fault, prepared, read_meta, write_whole
from dtrain.data.tokens import TRAINING_BYTES, BytePairs, FromFile, TokenizerOptions, check, identity, learn
from dtrain.data.tokens import load as load_tokenizer
from dtrain.data.tokens import resolve as resolve_tokenizer
from dtrain.data.windows import HeldOutWindows, MaskedWindows, Windows, num_hidden
from dtrain.errors import InputError
from dtrain.settings import PositiveInt, Settings

if TYPE_CHECKING:
    import numpy as np

    from dtrain.data.tokens import Tokenizer

FORMAT = 2
"""Raise when the same text would be prepared differently."""
_BATCH_BYTES = 8 * 2**20


class Options(Settings):
    """Text from files, or the sources and documentation of the Python standard library."""

    source: str | Annotated[tuple[str, ...], Meta(min_length=1)] = corpus.PYTHON_STDLIB
    """`python-stdlib`, which every Python brings along, or your own: a file, a folder, a glob, or a list of them."""
    tokenizer: TokenizerOptions = BytePairs()
    """How text becomes numbers."""
    sequence_length: Annotated[PositiveInt, Meta(le=2**20)] = 256
    """Tokens a sample trains on: how far back the model can look."""
    objective: Literal["next", "masked"] = "next"
    """What is predicted: the next token, or tokens that are hidden (for an encoder)."""
    mask_share: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.15
    """Share of the tokens of a sample that `objective: masked` hides."""
    documents: Literal["joined", "packed"] = "joined"
    """Whether a token sees those of other documents before it in its sample: `packed` documents share a sample but see
    nothing of each other."""
    held_out: Annotated[float, Meta(gt=0.0, le=0.5)] = 0.05
    """Share of the text that is never trained on, taken in whole folders or files where there are enough of them."""
    held_out_limit: PositiveInt = 512_000
    """At most this many bytes are held out, so that the evaluation over all of them stays quick."""
    held_out_context: Annotated[float, Meta(ge=0.0, le=0.9)] = 0.5
    """Share of a held-out window that only gives context and was predicted in the window before; 0 is quickest."""


def describe(options: Options) -> DataShape:
    """Vocabulary and length, without reading the text."""
    # The mask comes after the separator, so that what is prepared is the same for both objectives.
    if options.objective == "masked":
        num_targets = num_hidden(options.mask_share, options.sequence_length)
        vocabulary_size = options.tokenizer.size_with_mask
        return DataShape("masked", vocabulary_size, options.sequence_length, num_targets=num_targets)
    return DataShape("tokens", options.tokenizer.vocabulary_size, options.sequence_length)


def resolve(options: Options, folder: Path) -> Options:
    """The same options with relative paths taken from `folder`."""
    options = replace(options, tokenizer=resolve_tokenizer(options.tokenizer, folder))
    if options.source == corpus.PYTHON_STDLIB:
        return options
    paths = [options.source] if isinstance(options.source, str) else options.source
    return replace(options, source=tuple(str(folder / Path(path).expanduser()) for path in paths))


def prepare(options: Options, cache: Path) -> None:
    """Tokenize the text into `cache`, unless the same text was before.

    Raises `InputError` when there is no text or too little, `StorageError` when the cache cannot be written.
    """
    _prepare(options, cache)


def open(options: Options, cache: Path) -> "TextSource":  # noqa: A001
    """The prepared text, prepared now when it was not yet. Raises what `prepare` raises."""
    folder = _noted(cache, _states(corpus.find(options.source)), options)
    if folder is None or fault(folder, sizes_only=True):
        folder = _prepare(options, cache)
    return TextSource(options, folder)


class TextSource:
    """Samples are windows of `sequence_length` tokens of one stream, in which a separator precedes each document."""

    train: Dataset
    held_out: Dataset

    def __init__(self, options: Options, folder: Path) -> None:
        import numpy as np

        self._meta = read_meta(folder)
        self._folder = folder
        self._options = options
        self.fingerprint: str = folder.name
        """Changes with the text or how it is tokenized."""
        self.separator = int(self._meta["separator"])
        """The token that precedes each document."""
        self.mask: int | None = self._meta["mask"] if options.objective == "masked" else None
        """The token that stands for hidden ones, where there are some."""
        if options.objective == "masked" and self.mask is None:
            raise InputError(
                "data.objective: masked needs a token that stands for hidden ones, and data.tokenizer has none of the"
                " name that its `mask` gives; set it to the name in its file"
            )
        length = options.sequence_length
        train, held_out = (_tokens(folder / name, self._meta["dtype"]) for name in ("train.bin", "held_out.bin"))
        if len(train) <= length:
            raise InputError(
                f"data.source has {len(train)} tokens to train on, and data.sequence_length {length} needs at least"
                f" {length + 1}; give more text, or a sequence_length of at most {max(len(train) - 1, 1)}"
            )
        lengths = np.fromfile(folder / "token_bytes.bin", dtype=np.uint16)
        is_packed = options.documents == "packed"
        if options.objective == "masked":
            window: Any = partial(
                MaskedWindows,
                length=length,
                share=options.mask_share,
                separator=self.separator,
                has_documents=is_packed,
                mask=self.mask,
                num_tokens=options.tokenizer.vocab_size if isinstance(options.tokenizer, FromFile) else None,
            )
            self.train = window(train)
            self.held_out = window(held_out, is_held_out=True)
        else:
            separator = self.separator if is_packed else None
            context = int(length * options.held_out_context)
            self.train = Windows(train, length, separator)
            self.held_out = HeldOutWindows(held_out, length, context, lengths, separator)

    @property
    def held_out_bytes(self) -> int:
        """Bytes of text that an evaluation over all held-out samples predicts."""
        return int(self._meta["held_out_bytes"])

    def yardsticks(self) -> dict[str, dict[str, float]]:
        """Bits a byte of well-known compressors on the held-out text, compressed whole; nothing for hidden tokens."""
        return {} if self.mask is not None else {"bits_per_byte": dict(self._meta["bits_per_byte"])}

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`."""
        return [int(token) for token in self._tokenizer.encode([text.encode()])[0]]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; a character that is cut in half becomes U+FFFD."""
        return self._tokenizer.decode(tokens).decode("utf-8", errors="replace")

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        return load_tokenizer(self._options.tokenizer, (self._folder / "tokenizer.json").read_text("utf-8"))


def _tokens(path: Path, dtype: str) -> "np.ndarray":
    import numpy as np

    return np.memmap(path, dtype=dtype, mode="r")


def _prepare(options: Options, cache: Path) -> Path:
    check(options.tokenizer)
    files = corpus.find(options.source)
    # The states are taken before the contents are read: a file that changes meanwhile is then read again next time.
    states = _states(files)
    known = _noted(cache, states, options)
    if known is not None and fault(known) is None:
        return known
    files = corpus.read(files)
    if not files:
        raise InputError(f"data.source: every file of {options.source!r} is empty; give it some text")
    key = _digest(_settings(options), [(file.name, file.sha256) for file in files])
    folder = prepared(cache, f"text-{key}", lambda making: _convert(options, files, making))
    write_whole(_note(cache, states, options), key)
    return folder


def _convert(options: Options, files: Sequence[corpus.File], folder: Path) -> dict[str, Any]:
    import numpy as np

    split = corpus.split(files, options.held_out, options.held_out_limit)
    tokenizer = learn(options.tokenizer, _some(split.train))
    dtype = np.uint16 if options.tokenizer.vocabulary_size <= 2**16 else np.uint32
    for name, pieces in (("train", split.train), ("held_out", split.held_out)):
        with (folder / f"{name}.bin").open("wb") as out:
            for batch in _batches(pieces):
                for (is_first, _), tokens in zip(batch, tokenizer.encode([block for _, block in batch]), strict=True):
                    if is_first:
                        out.write(np.array([tokenizer.separator], dtype=dtype).tobytes())
                    out.write(tokens.astype(dtype).tobytes())
    tokenizer.lengths().tofile(folder / "token_bytes.bin")
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), "utf-8")
    text = b"".join(block for piece in split.held_out for block in piece.blocks())
    packed = {
        "gzip -9": len(gzip.compress(text, 9, mtime=0)),
        "xz -9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {
        "format": FORMAT,
        "dtype": np.dtype(dtype).str,
        "separator": tokenizer.separator,
        "mask": tokenizer.mask,
        "train_bytes": sum(piece.size for piece in split.train),
        "held_out_bytes": len(text),
        "held_out_by": split.by,
        "held_out_files": [piece.file.name for piece in split.held_out],
        "bits_per_byte": {name: 8 * size / len(text) for name, size in packed.items()},
    }


def _some(pieces: Sequence[corpus.Piece]) -> Iterator[bytes]:
    """Blocks of text up to `TRAINING_BYTES`, of a choice of the pieces when there are more."""
    left = TRAINING_BYTES
    if sum(piece.size for piece in pieces) > left:
        pieces = sorted(pieces, key=lambda piece: piece.file.sha256)
    for piece in pieces:
        for block in piece.blocks():
            if left <= 0:
                return
            left -= len(block)
            yield block


def _batches(pieces: Sequence[corpus.Piece]) -> Iterator[list[tuple[bool, bytes]]]:
    """All blocks in order, each with whether its document begins with it, in lists of bounded size."""
    batch: list[tuple[bool, bytes]] = []
    size = 0
    for piece in pieces:
        for number, block in enumerate(piece.blocks(2**16)):
            batch.append((number == 0, block))
            size += len(block)
            if size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _settings(options: Options) -> list[Any]:
    return [FORMAT, identity(options.tokenizer), options.held_out, options.held_out_limit]


def _states(files: Sequence[corpus.File]) -> list[Any]:
    """What tells without reading that files are as they were: path, inode, size and time of change."""
    try:
        found = [(file.path, os.stat(file.path)) for file in files]
    except OSError as error:
        raise InputError(
            f"data.source: cannot read {error.filename}: {error.strerror}; make it readable or leave it out"
        ) from error
    return [(path, state.st_ino, state.st_size, state.st_mtime_ns) for path, state in found]


def _note(cache: Path, states: list[Any], options: Options) -> Path:
    return cache / f"text-{_digest(_settings(options), states)}.seen"


def _noted(cache: Path, states: list[Any], options: Options) -> Path | None:
    """The folder that files in these states were prepared in, as `prepare` noted; None when it did not."""
    try:
        return cache / f"text-{_note(cache, states, options).read_text()}"
    except OSError:
        return None


def _digest(*words: Any) -> str:
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode(errors="surrogateescape")).hexdigest()[:24]
