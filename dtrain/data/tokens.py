"""Tokenizers: bytes as they are, or byte pairs learnt from the corpus. Both are lossless for any bytes.

Text is handed to the `tokenizers` library as Latin-1, one character a byte, so that no byte sequence is special and
the length of a token is the number of bytes it stands for. The last number of a vocabulary is the separator, which
stands between documents and for no byte: no text can contain it.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from dtrain.component import Options as BaseOptions
from dtrain.errors import InputError

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


class Bytes(BaseOptions):
    """Every byte is a token."""

    name: Literal["bytes"] = "bytes"

    @property
    def vocabulary_size(self) -> int:
        return 257


class BytePairs(BaseOptions):
    """Byte-pair encoding (Sennrich et al., 2016) learnt from the training part of the corpus."""

    name: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=257, le=2**20)] = 4096
    """Tokens in the vocabulary: 256 bytes, a separator, and merged pairs."""

    @property
    def vocabulary_size(self) -> int:
        return self.vocab_size


TokenizerOptions = Annotated[Bytes | BytePairs, Field(discriminator="name")]


class Tokenizer(Protocol):
    """Between bytes and token numbers; `separator` is the number that stands for no byte."""

    separator: int

    def encode(self, blocks: Sequence[bytes]) -> "list[np.ndarray]":
        """The tokens (integers, shape [n]) of each block; many blocks at once are spread over threads."""

    def decode(self, tokens: Iterable[int]) -> bytes:
        """The bytes of `tokens`, whatever they are; the separator is none."""

    def lengths(self) -> "np.ndarray":
        """Bytes of each token: uint16, shape [vocabulary]."""

    def to_json(self) -> str:
        """What `load` makes the same tokenizer from."""


class ByteTokenizer:
    separator = 256

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


def learn(options: Bytes | BytePairs, blocks: Iterable[bytes]) -> Tokenizer:
    """The tokenizer `options` ask for, learnt from `blocks` of text; the same blocks give the same tokenizer."""
    if isinstance(options, Bytes):
        return ByteTokenizer()
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


def load(options: Bytes | BytePairs, text: str) -> Tokenizer:
    """The tokenizer whose `to_json` gave `text`."""
    if isinstance(options, Bytes):
        return ByteTokenizer()
    from tokenizers import Tokenizer as Model

    return BytePairTokenizer(Model.from_str(text), options.vocab_size)


def check(options: Bytes | BytePairs) -> None:
    """Raises `InputError` when what `options` need is not installed."""
    import importlib.util

    if isinstance(options, BytePairs) and importlib.util.find_spec("tokenizers") is None:
        raise InputError(
            "data.tokenizer: bpe needs the package 'tokenizers'; install dtrain[train], or use tokenizer: {name: bytes}"
        )
