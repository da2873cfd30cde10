"""Attention of the transformer family: over a text itself, or from one text to another.

Shapes in comments: b samples, t positions, w width, h heads, d = w / h. Queries, keys and values are three matrices
rather than one fused: splitting a model over devices by heads then cuts each of them in rows. How many heads there are
is read off the matrices' results, so that the same lines work with a slice of them.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from dtrain.models.networks.norm import Norm

if TYPE_CHECKING:
    from dtrain.models.transformer import Options

PLAIN_ATTENTION_LENGTH = 512
"""Longest text whose attention weights are held in memory, in bf16 on a CPU."""
Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of rotary positions, [t, d / 2] or [b, 1, t, d / 2]."""


class KeyValues:
    """Keys and values of one attention, [b, h, t, d], for the tokens seen so far."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return 0 if self.keys is None else self.keys.shape[2]


class Attention(nn.Module):
    """Attention over h heads; `is_causal` hides later positions."""

    def __init__(self, options: "Options", is_causal: bool = True) -> None:
        super().__init__()
        width = options.width
        self.head_width = width // options.num_heads
        self.is_causal = is_causal
        self.dropout = options.dropout
        self.query = nn.Linear(width, width, bias=options.bias)
        self.key = nn.Linear(width, width, bias=options.bias)
        self.value = nn.Linear(width, width, bias=options.bias)
        self.output = nn.Linear(width, width, bias=options.bias)
        self.query_norm = Norm("rmsnorm", self.head_width, False) if options.qk_norm else None
        self.key_norm = Norm("rmsnorm", self.head_width, False) if options.qk_norm else None

    def forward(
        self,
        x: torch.Tensor,
        rotation: Rotation | None = None,
        mask: torch.Tensor | None = None,
        cache: KeyValues | None = None,
        memory: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What each position of `x` [b, t, w] takes from `x`, or from `memory` [b, s, w] where that is given.

        `mask` (bool, broadcast to [b, h, t, s]) is true where a position may look, and then says all there is to say.
        """
        b, t, _ = x.shape
        if memory is None or cache is None or cache.keys is None or cache.values is None:
            read = x if memory is None else memory
            query, key, value = self._heads(self.query(x)), self._heads(self.key(read)), self._heads(self.value(read))
            if self.key_norm is not None:
                key = self.key_norm(key)
            if rotation is not None:
                key = rotate(key, *rotation)
            if cache is not None:
                key, value = cache.extend(key, value)
        else:
            query, key, value = self._heads(self.query(x)), cache.keys, cache.values
        if self.query_norm is not None:
            query = self.query_norm(query)
        if rotation is not None:
            query = rotate(query, *rotation)
        # With a filled cache there is one query, the newest, and it may see everything.
        is_causal = self.is_causal and mask is None and key.shape[2] == t
        mixed = attend(query, key, value, is_causal, self.dropout if self.training else 0.0, mask)
        return self.output(mixed.transpose(1, 2).reshape(b, t, -1))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        return x.view(b, t, -1, self.head_width).transpose(1, 2)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    dropout: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention of [b, h, t, d] tensors by torch's kernel, except in bf16 on a CPU.

    There torch's kernel takes two to ten times as long as three plain products while texts are short (measured with 4
    heads of 64 on AVX-512 bf16, causal: 45 ms against 17 ms forward and backward for 16 x 256 tokens; not causal: 49
    against 25 ms, with a mask 52 against 31; 64 x 17 tokens with heads of 16: 14 against 1.3 ms).
    """
    b, h, t, d = query.shape
    s = key.shape[2]
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or max(s, t) > PLAIN_ATTENTION_LENGTH:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, is_causal=is_causal)
    unseen = torch.zeros((1, 1), dtype=query.dtype)
    if is_causal:
        unseen = torch.full((t, s), -math.inf, dtype=query.dtype).triu(1)
    elif mask is not None:
        unseen = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -math.inf)
    unseen = unseen.expand(b, h, t, s).reshape(b * h, t, s)
    query, key, value = (x.reshape(b * h, -1, d) for x in (query, key, value))
    scores = torch.baddbmm(unseen, query, key.transpose(1, 2), alpha=d**-0.5)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout) if dropout else F.softmax(scores, dim=-1)
    return (weights @ value).view(b, h, t, d)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al., "RoFormer", 2021) of x [b, h, t, d]; cos and sin are [t, d / 2].

    Pairs are (i, i + d / 2), as in GPT-NeoX and Llama.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
