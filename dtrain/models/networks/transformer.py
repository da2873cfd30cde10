"""The transformers of one text: a decoder that predicts the next token, an encoder that fills in hidden ones."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from dtrain.models.networks import stack
from dtrain.models.networks.attention import KeyValues
from dtrain.models.networks.cross_entropy import IGNORED, TokenHead
from dtrain.models.networks.generation import choose
from dtrain.models.networks.norm import Norm, lowered
from dtrain.models.networks.stack import Stack

if TYPE_CHECKING:
    from dtrain.models.transformer import Options


class Transformer(nn.Module):
    """A decoder-only transformer language model (Radford et al., "GPT-2", 2019)."""

    def __init__(self, options: "Options", vocabulary_size: int, sequence_length: int) -> None:
        super().__init__()
        self.options = options
        self.sequence_length = sequence_length
        padded = options.padded(vocabulary_size)
        self.tokens = nn.Embedding(padded, options.width)
        self.decoder = Stack(options, sequence_length)
        self.head = TokenHead(options.width, padded, vocabulary_size)
        if options.tie_weights:
            self.head.weight = self.tokens.weight

    def initialise(self, seed: int) -> None:
        """Fill every parameter and buffer, from `seed` alone."""
        stack.initialise(self, self.options, seed)

    def forward(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        smoothing: float = 0.0,
        caches: list[KeyValues] | None = None,
    ) -> torch.Tensor:
        """For `inputs` [b, t]: the logits [b, t, vocabulary], or with `targets` [b, t] the sum of cross-entropies.

        The sum is in nats over the targets that are not `IGNORED`: a scalar in fp32. Where `documents` [b, t] changes
        along a text, another document begins: it does not see the one before, and its positions count from zero.
        `caches` hold what came before `inputs`, and are extended; the logits are then those of the last position alone.
        """
        places = mask = None
        if documents is not None:
            places, mask = apart(documents, is_causal=True)
        hidden = self.decoder(self.tokens(inputs), places, mask, caches)
        return self.head(hidden if caches is None else hidden[:, -1:], targets, smoothing)

    @torch.no_grad()
    def generate(
        self,
        prompt: list[int],
        length: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        cached: bool = True,
    ) -> list[int]:
        """`length` tokens that follow `prompt` (not empty); temperature 0 takes the likeliest each time.

        The model sees at most `sequence_length` tokens: when they are full, the older half is dropped. `cached=False`
        reads the whole text again for each token and gives the same answer, slowly.
        """
        was_training = self.training
        self.eval()
        device = self.tokens.weight.device
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that all devices draw alike
        seen = prompt[-self.sequence_length :]
        caches: list[KeyValues] | None = None
        made: list[int] = []
        for _ in range(length):
            if len(seen) > self.sequence_length:
                seen = seen[-(self.sequence_length // 2 + 1) :]
                caches = None
            if caches is None or not cached:
                caches, new = [KeyValues() for _ in self.decoder.blocks], seen
            else:
                new = seen[-1:]
            # Through the module itself: what shards a model gathers its weights when modules are called.
            logits = self(torch.tensor([new], device=device), caches=caches)[0, -1].float().cpu()
            made.append(choose(logits, temperature, top_k, generator))
            seen = [*seen, made[-1]]
        self.train(was_training)
        return made


class Encoder(nn.Module):
    """A bidirectional transformer that fills in hidden tokens (Devlin et al., "BERT", 2018; pre-norm, one segment)."""

    def __init__(self, options: "Options", vocabulary_size: int, sequence_length: int) -> None:
        super().__init__()
        self.options = options
        padded = options.padded(vocabulary_size)
        self.tokens = nn.Embedding(padded, options.width)
        self.encoder = Stack(options, sequence_length, is_causal=False)
        self.transform = nn.Linear(options.width, options.width, bias=options.bias)
        self.transform_norm = Norm(options.norm, options.width, options.bias)
        self.head = TokenHead(options.width, padded, vocabulary_size)
        if options.tie_weights:
            self.head.weight = self.tokens.weight

    def initialise(self, seed: int) -> None:
        """Fill every parameter and buffer, from `seed` alone."""
        stack.initialise(self, self.options, seed)

    def forward(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        smoothing: float = 0.0,
        hidden_ones: torch.Tensor | None = None,
        hidden_places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """For `inputs` [b, t]: the logits [b, t, vocabulary], or with `targets` [b, t] the sum of cross-entropies.

        The sum is in nats over the targets that are not `IGNORED`: a scalar in fp32. With `hidden_ones` (bool [b, t])
        instead, the logits at these places, [n, vocabulary]. Tokens of one of `documents` [b, t] see no other's.
        `hidden_places` (int64 [b, n / b], ascending) say where either of them are, where that is known.
        """
        where = None
        if hidden_places is not None:
            rows = torch.arange(len(inputs), device=inputs.device)[:, None]
            where = (hidden_places + rows * inputs.shape[1]).flatten()
        elif targets is not None:
            hidden_ones = targets != IGNORED
        if where is None and hidden_ones is not None:
            # Before anything else: the device tells the processor how many there are, which waits for all it is doing.
            where = hidden_ones.flatten().nonzero()[:, 0]
        places = mask = None
        if documents is not None:
            places, mask = apart(documents, is_causal=False)
        stream = self.encoder(self.tokens(inputs), places, mask)
        if where is not None:
            stream = stream.flatten(0, 1)[where]
        stream = self.transform_norm(F.gelu(self.transform(lowered(stream)), approximate="tanh"))
        return self.head(stream, None if targets is None else targets.flatten()[where], smoothing)


def apart(documents: torch.Tensor, is_causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """For the document of each token (int64 [b, t]): its place in that document [b, t], and what it may look at.

    The latter is a mask (bool [b, 1, t, t]) that ends where the document does, and if `is_causal` at the token itself.
    """
    place = torch.arange(documents.shape[1], device=documents.device)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    first = torch.where(begins, place, 0).cummax(dim=1).values
    mask = first[:, :, None] == first[:, None, :]
    if is_causal:
        mask = mask & (place <= place[:, None])
    return place - first, mask[:, None]
