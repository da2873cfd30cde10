"""Samples from one stream of tokens: windows of equal length, to predict what comes next or what is hidden.

A separator precedes each document in the stream. A dataset asked for `documents` tells in which one each token of a
window stands.
"""

from typing import TYPE_CHECKING, Any

from dtrain.data.order import draws as drawn
from dtrain.data.order import permute
from dtrain.errors import InputError

if TYPE_CHECKING:
    import numpy as np

IGNORED = -1
"""A target with this value is not predicted."""
MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Of the hidden tokens: how many show the mask, and how many another token; the others show themselves (Devlin et al.,
"BERT", 2018)."""
_SPREAD = 0x5EED


class Windows:
    """Training samples: each token but the first is a target once."""

    def __init__(self, tokens: "np.ndarray", length: int, separator: int | None = None) -> None:
        """`separator` is given when a batch shall hold `documents`."""
        self._tokens = tokens
        self._length = length
        self._separator = separator
        self.num_samples = (len(tokens) - 1) // length

    def batch(self, indices: "np.ndarray", draws: "np.ndarray") -> "dict[str, np.ndarray]":
        """inputs and targets, int64 [b, t]."""
        import numpy as np

        offsets = indices[:, None] * self._length + np.arange(self._length)
        inputs = self._tokens[offsets].astype(np.int64)
        targets = self._tokens[offsets + 1].astype(np.int64)
        return {"inputs": inputs, "targets": targets, **_documents(inputs, self._separator)}


class HeldOutWindows:
    """Held-out samples: over all of them each token but the first is a target exactly once.

    A window shares its first `context` tokens with the one before, which predicted them. Samples are numbered in a
    fixed shuffled order, so that the first few of them are a fair choice.
    """

    def __init__(
        self, tokens: "np.ndarray", length: int, context: int, lengths: "np.ndarray", separator: int | None = None
    ) -> None:
        """`lengths` are the bytes of each token; `separator` is given when a batch shall hold `documents`."""
        self._tokens = tokens
        self._length = length
        self._context = context
        self._lengths = lengths
        self._separator = separator
        self.num_samples = 1 + max(-(-(len(tokens) - 1 - length) // (length - context)), 0)

    def batch(self, indices: "np.ndarray", draws: "np.ndarray") -> "dict[str, np.ndarray]":
        """inputs and targets, int64 [b, t], targets -1 where nothing is to be predicted; target_bytes, int64 [b]."""
        import numpy as np

        window = permute(_SPREAD, np.zeros_like(indices), indices, self.num_samples)
        offsets = window[:, None] * (self._length - self._context) + np.arange(self._length)
        last = len(self._tokens) - 1
        inputs = self._tokens[np.minimum(offsets, last)].astype(np.int64)
        targets = self._tokens[np.minimum(offsets + 1, last)].astype(np.int64)
        seen_before = (window[:, None] > 0) & (np.arange(self._length) < self._context)
        counted = (offsets < last) & ~seen_before
        return {
            "inputs": inputs,
            "targets": np.where(counted, targets, IGNORED),
            "target_bytes": np.where(counted, self._lengths[targets], 0).sum(axis=1, dtype=np.int64),
            **_documents(inputs, self._separator),
        }


class MaskedWindows:
    """Samples some of whose tokens are hidden: round(share x length) of each, chosen by its draw, separators last.

    Held-out ones are hidden the same way each time; they are numbered in a fixed shuffled order. Tokens after the last
    whole window are left out.
    """

    def __init__(
        self,
        tokens: "np.ndarray",
        length: int,
        share: float,
        separator: int,
        *,
        is_held_out: bool = False,
        has_documents: bool = False,
        mask: int | None = None,
        num_tokens: int | None = None,
    ) -> None:
        """`mask` is the token after `separator` by default, and random tokens are below `num_tokens`, or `separator`.

        Raises `InputError` when there is less than one window.
        """
        self._tokens = tokens
        self._length = length
        self._separator = separator
        self._mask, self._num_tokens = mask, num_tokens
        self._num_hidden = num_hidden(share, length)
        self._is_held_out = is_held_out
        self._has_documents = has_documents
        self.num_samples = len(tokens) // length
        if self.num_samples == 0:
            raise InputError(
                f"data.source has {len(tokens)} tokens {'held out' if is_held_out else 'to train on'}, fewer than"
                f" data.sequence_length {length}; give more text, hold out more, or lower sequence_length"
            )

    def batch(self, indices: "np.ndarray", draws: "np.ndarray") -> "dict[str, np.ndarray]":
        """inputs and targets, int64 [b, t]: targets are the hidden tokens, -1 elsewhere; their places, int64 [b, n]."""
        import numpy as np

        if self._is_held_out:
            indices = permute(_SPREAD, np.zeros_like(indices), indices, self.num_samples)
            draws = drawn(_SPREAD, indices.astype(np.uint64))
        tokens = self._tokens[indices[:, None] * self._length + np.arange(self._length)].astype(np.int64)
        inputs, targets = hide(tokens, self._num_hidden, self._separator, draws, self._mask, self._num_tokens)
        separator = self._separator if self._has_documents else None
        places = np.nonzero(targets != IGNORED)[1].reshape(len(targets), self._num_hidden)
        return {"inputs": inputs, "targets": targets, "places": places, **_documents(tokens, separator)}


def num_hidden(share: float, length: int) -> int:
    """Tokens to hide of `length`; at least one."""
    return max(round(share * length), 1)


def hide(
    tokens: "np.ndarray",
    count: int,
    separator: int,
    draws: "np.ndarray",
    mask: int | None = None,
    num_tokens: int | None = None,
) -> "tuple[np.ndarray, np.ndarray]":
    """(inputs, targets) of `tokens` [b, t], of which `count` a row are hidden, chosen by `draws` (uint64 [b])."""
    import numpy as np

    mask = separator + 1 if mask is None else mask
    b, t = tokens.shape
    # One number a token: its upper bits order the tokens, and the last ones say where it stands, so that none is equal.
    order = drawn(0, draws[:, None] + np.arange(t, dtype=np.uint64))
    low = np.uint64(2 ** max((t - 1).bit_length(), 1) - 1)
    order = (order & ~low) | np.arange(t, dtype=np.uint64)
    order[tokens == separator] |= np.uint64(0xFFFFFFFF00000000)
    order.partition(count - 1, axis=1)
    places = (order[:, :count] & low).astype(np.int64)
    rows = np.arange(b)[:, None]
    hidden = tokens[rows, places]
    chance = drawn(1, draws[:, None] + places.view(np.uint64))
    # 32 bits for what is shown, 32 for which token: a vocabulary is far smaller than 2**32.
    shown = (chance >> np.uint64(32)) * 2.0**-32
    others = ((chance & np.uint64(0xFFFFFFFF)) * np.uint64(num_tokens or separator) >> np.uint64(32)).astype(np.int64)
    inputs, targets = tokens.copy(), np.full_like(tokens, IGNORED)
    inputs[rows, places] = np.where(
        shown < MASKED_SHARE, mask, np.where(shown < MASKED_SHARE + RANDOM_SHARE, others, hidden)
    )
    targets[rows, places] = hidden
    return inputs, targets


def _documents(tokens: "np.ndarray", separator: int | None) -> dict[str, Any]:
    """The number within its window of the document that each token belongs to, where that is asked for."""
    import numpy as np

    return {} if separator is None else {"documents": np.cumsum(tokens == separator, axis=1, dtype=np.int64)}
