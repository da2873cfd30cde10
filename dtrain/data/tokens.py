"""Tokenizers: bytes as they are, byte pairs learnt from the corpus, or a model's own from its file.

The first two are lossless for any bytes: text is handed to the `tokenizers` library as Latin-1, one character a byte,
so that no byte sequence is special and the length of a token is the number of bytes it stands for. The last number of
their vocabulary is the separator, which stands between documents and for no byte: no text can contain it; the number
after it hides others, for who asks. A model's own tokenizer is what its makers made it: its text is UTF-8, and its
special tokens have numbers of their own.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from msgspec import Meta
from msgspec.structs import replace

from dtrain.errors import InputError
from dtrain.settings import Settings, one_of, to_builtins

if TYPE_CHECKING:
    import numpy as np

TRAINING_BYTES = 64 * 2**20
"""Byte pairs are learnt from at most this much text."""
_HIGH = "\x80-\xff"  # bytes of characters outside ASCII: letters of some script, for what matters here
_WORDS = (
    rf"[^\r\nA-Za-z0-9{_HIGH}]?[A-Za-z{_HIGH}]+"  # a word with the sign before it: " self", ".self", "_self"
    r"|[0-9]{1,3}"
    rf"| ?[^\sA-Za-z0-9{_HIGH}]+[\r\n]*"  # signs, with the end of the line
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
"""Pairs are never merged across these: the words of GPT-4's tokenizer, over bytes."""


class Bytes(Settings):
    """Every byte is a token."""

    name: Literal["bytes"] = "bytes"

    @property
    def vocabulary_size(self) -> int:
        return 257

    @property
    def size_with_mask(self) -> int:
        return 258


class BytePairs(Settings):
    """Byte-pair encoding (Sennrich et al., 2016) learnt from the training part of the corpus."""

    name: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Meta(ge=257, le=2**20)] = 4096
    """Tokens in the vocabulary: 256 bytes, a separator, and merged pairs."""

    @property
    def vocabulary_size(self) -> int:
        return self.vocab_size

    @property
    def size_with_mask(self) -> int:
        return self.vocab_size + 1


class FromFile(Settings):
    """A model's own tokenizer, for training on what others have trained."""

    name: Literal["file"] = "file"
    path: Annotated[str, Meta(min_length=1, max_length=4096)]
    """Its tokenizer.json."""
    vocab_size: Annotated[int, Meta(ge=2, le=2**24)]
    """Tokens it knows; checked against the file when the text is prepared."""
    separator: Annotated[str, Meta(min_length=1, max_length=256)] = "<|endoftext|>"
    """The token that precedes each document, as the file calls it, e.g. </s> or [SEP]."""
    mask: Annotated[str, Meta(min_length=1, max_length=256)] = "[MASK]"
    """The token that stands for hidden ones, as the file calls it; only `objective: masked` needs it."""

    @property
    def vocabulary_size(self) -> int:
        return self.vocab_size

    @property
    def size_with_mask(self) -> int:
        return self.vocab_size


if TYPE_CHECKING:
    TokenizerOptions = Bytes | BytePairs | FromFile
else:
    TokenizerOptions = one_of(Bytes, BytePairs, FromFile)


class Tokenizer(Protocol):
    """Between bytes and token numbers."""

    separator: int
    """The token that precedes each document and stands for no byte."""
    mask: int | None
    """The token that stands for hidden ones; None where there is none."""

    def encode(self, blocks: Sequence[bytes]) -> "list[np.ndarray]":
        """The tokens (integers, shape [n]) of each block; many blocks at once are spread over threads."""

    def decode(self, tokens: Iterable[int]) -> bytes:
        """The bytes of `tokens`, whatever they are; the separator is none."""

    def lengths(self) -> "np.ndarray":
        """Bytes of each token: uint16, shape [vocabulary]; zeros where a token does not stand for certain bytes."""

    def to_json(self) -> str:
        """What `load` makes the same tokenizer from."""


class ByteTokenizer:
    separator = 256
    mask: int | None = 257

    def encode(self, blocks: Sequence[bytes]) -> "list[np.ndarray]":
        import numpy as np

        return [np.frombuffer(block, dtype=np.uint8) for block in blocks]

    def decode(self, tokens: Iterable[int]) -> bytes:
        return bytes(token for token in tokens if token < 256)

    def lengths(self) -> "np.ndarray":
        import numpy as np

        return np.array([1] * 256 + [0], dtype=np.uint16)

    def to_json(self) -> str:
        return ""


class BytePairTokenizer:
    """Made by `learn` or `load`; `model` is a `tokenizers.Tokenizer`."""

    def __init__(self, model: Any, vocabulary_size: int) -> None:
        import numpy as np

        self._model = model
        self.separator = vocabulary_size - 1
        self.mask: int | None = vocabulary_size
        self._bytes = [b""] * vocabulary_size
        for token, number in model.get_vocab().items():
            self._bytes[number] = token.encode("latin-1")
        self._lengths = np.array([len(b) for b in self._bytes], dtype=np.uint16)

    def encode(self, blocks: Sequence[bytes]) -> "list[np.ndarray]":
        import numpy as np

        found = self._model.encode_batch_fast([block.decode("latin-1") for block in blocks])
        return [np.array(one.ids, dtype=np.uint32) for one in found]

    def decode(self, tokens: Iterable[int]) -> bytes:
        return b"".join(self._bytes[token] for token in tokens if token < len(self._bytes))

    def lengths(self) -> "np.ndarray":
        return self._lengths

    def to_json(self) -> str:
        return str(self._model.to_str())


class FileTokenizer:
    """Made by `learn` or `load`; `model` is a `tokenizers.Tokenizer`."""

    def __init__(self, model: Any, options: FromFile) -> None:
        known = model.get_vocab(with_added_tokens=True)
        size = max(known.values(), default=-1) + 1
        if size != options.vocab_size:
            raise InputError(
                f"data.tokenizer.vocab_size is {options.vocab_size}, and {options.path} knows {size} tokens; set it to"
                f" {size}"
            )
        if options.separator not in known:
            special = sorted(added.content for added in model.get_added_tokens_decoder().values())
            raise InputError(
                f"data.tokenizer.separator: {options.path} has no token {options.separator!r}; its special ones are"
                f" {', '.join(special[:12]) or 'none'}"
            )
        model.encode_special_tokens = True  # what looks like a special token in a text is text
        self._model, self._size = model, size
        self.separator = int(known[options.separator])
        self.mask: int | None = known.get(options.mask)

    def encode(self, blocks: Sequence[bytes]) -> "list[np.ndarray]":
        import numpy as np

        texts = [block.decode("utf-8", errors="replace") for block in blocks]
        found = self._model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, dtype=np.uint32) for one in found]

    def decode(self, tokens: Iterable[int]) -> bytes:
        kept = [int(token) for token in tokens if token != self.separator]
        return str(self._model.decode(kept, skip_special_tokens=False)).encode()

    def lengths(self) -> "np.ndarray":
        import numpy as np

        lengths = np.zeros(self._size, dtype=np.uint16)
        if _is_byte_level(json.loads(self._model.to_str())):
            # Its alphabet has a character for each byte (Radford et al., GPT-2, 2019).
            for token, number in self._model.get_vocab(with_added_tokens=False).items():
                lengths[number] = len(token)
            for number, added in self._model.get_added_tokens_decoder().items():
                lengths[number] = len(added.content.encode())
            lengths[self.separator] = 0
        return lengths

    def to_json(self) -> str:
        return str(self._model.to_str())


def _is_byte_level(described: dict[str, Any]) -> bool:
    decoder = described.get("decoder") or {}
    return any(part.get("type") == "ByteLevel" for part in [decoder, *decoder.get("decoders", [])])


def learn(options: Bytes | BytePairs | FromFile, blocks: Iterable[bytes]) -> Tokenizer:
    """The tokenizer `options` ask for, learnt from `blocks` of text; the same blocks give the same tokenizer.

    Raises `InputError` for a file that is no tokenizer, or another than `options` say.
    """
    if isinstance(options, Bytes):
        return ByteTokenizer()
    if isinstance(options, FromFile):
        return load(options, _read(options).decode("utf-8", errors="replace"))
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Model

    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size - 1,
        initial_alphabet=[chr(byte) for byte in range(256)],
        limit_alphabet=256,
        show_progress=False,
    )
    model.train_from_iterator((block.decode("latin-1") for block in blocks), trainer)
    return BytePairTokenizer(model, options.vocab_size)


def load(options: Bytes | BytePairs | FromFile, text: str) -> Tokenizer:
    """The tokenizer whose `to_json` gave `text`."""
    if isinstance(options, Bytes):
        return ByteTokenizer()
    from tokenizers import Tokenizer as Model

    if isinstance(options, BytePairs):
        return BytePairTokenizer(Model.from_str(text), options.vocab_size)
    try:
        model = Model.from_str(text)
    except Exception as error:  # the library raises no narrower one
        raise InputError(
            f"data.tokenizer.path: {options.path} is no tokenizer.json ({error}); give the one that lies beside the"
            " model's weights"
        ) from None
    return FileTokenizer(model, options)


def check(options: Bytes | BytePairs | FromFile) -> None:
    """Raises `InputError` when what `options` need is not installed."""
    if not isinstance(options, Bytes) and importlib.util.find_spec("tokenizers") is None:
        raise InputError(
            f"data.tokenizer: {options.name} needs the package 'tokenizers'; install dtrain[train], or use tokenizer:"
            " {name: bytes}"
        )


def resolve(options: Bytes | BytePairs | FromFile, folder: Path) -> Bytes | BytePairs | FromFile:
    """The same with a relative path taken from `folder`."""
    if not isinstance(options, FromFile):
        return options
    return replace(options, path=str(folder / Path(options.path).expanduser()))


def identity(options: Bytes | BytePairs | FromFile) -> dict[str, Any]:
    """What makes two tokenizers tokenize alike: the settings, and of a file its contents instead of its path."""
    settings = to_builtins(options)
    if isinstance(options, FromFile):
        settings["path"] = hashlib.sha256(_read(options)).hexdigest()
    return settings


def size_of(path: Path) -> int:
    """Tokens that a tokenizer.json knows, without the library that reads it; 0 for a file that is none."""
    try:
        described = json.loads(path.read_text("utf-8"))
        known = described["model"]["vocab"]
        numbers = known.values() if isinstance(known, dict) else range(len(known))
        return max([*numbers, *(added["id"] for added in described.get("added_tokens", []))], default=-1) + 1
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _read(options: FromFile) -> bytes:
    try:
        return Path(options.path).read_bytes()
    except OSError as error:
        raise InputError(
            f"data.tokenizer.path: {options.path} cannot be read ({error.strerror}); give the tokenizer.json that lies"
            " beside the model's weights"
        ) from None
