"""The transformer that translates: an encoder reads the source, a decoder writes while it looks at what was read."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from dtrain.models.networks import stack
from dtrain.models.networks.attention import KeyValues
from dtrain.models.networks.cross_entropy import TokenHead
from dtrain.models.networks.generation import choose
from dtrain.models.networks.norm import lowered
from dtrain.models.networks.stack import Stack

if TYPE_CHECKING:
    from dtrain.models.transformer import Options


class Written:
    """What is kept from one written token to the next: the source as it was read, and all keys and values."""

    def __init__(self, num_layers: int) -> None:
        self.memory: torch.Tensor | None = None
        self.own = [KeyValues() for _ in range(num_layers)]
        self.of_memory = [KeyValues() for _ in range(num_layers)]


class EncoderDecoder(nn.Module):
    """From one text to another (Vaswani et al., "Attention is all you need", 2017; pre-norm, one token matrix)."""

    def __init__(self, options: "Options", vocabulary_size: int, sequence_length: int) -> None:
        super().__init__()
        self.options = options
        self.sequence_length = sequence_length
        padded = options.padded(vocabulary_size)
        self.tokens = nn.Embedding(padded, options.width)
        self.encoder = Stack(options, sequence_length, is_causal=False)
        self.decoder = Stack(options, sequence_length, reads=True)
        self.head = TokenHead(options.width, padded, vocabulary_size)
        if options.tie_weights:
            self.head.weight = self.tokens.weight

    def initialise(self, seed: int) -> None:
        """Fill every parameter and buffer, from `seed` alone."""
        stack.initialise(self, self.options, seed)

    def forward(
        self,
        source: torch.Tensor,
        inputs: torch.Tensor,
        targets: torch.Tensor | None = None,
        smoothing: float = 0.0,
        weights: torch.Tensor | None = None,
        written: Written | None = None,
    ) -> torch.Tensor:
        """For `source` [b, s] and `inputs` [b, t], padded with -1: the logits [b, t, vocabulary].

        With `targets` [b, t] the sum of cross-entropies in nats, each counted by `weights` [b, t]: a scalar in fp32.
        `written` holds what came before `inputs`, and is extended; the source is then read once only.
        """
        mask = (source >= 0)[:, None, None, :]
        # A position must see something: an empty source is one token, whatever it is.
        mask = mask | (torch.arange(source.shape[1], device=source.device) == 0)
        memory = written.memory if written is not None else None
        if memory is None:
            memory = lowered(self.encoder(self.tokens(source.clamp(min=0)), mask=mask))
        if written is None:
            hidden = self.decoder(self.tokens(inputs.clamp(min=0)), memory=memory, memory_mask=mask)
        else:
            written.memory = memory
            stream = self.tokens(inputs.clamp(min=0))
            hidden = self.decoder(stream, None, None, written.own, memory, mask, written.of_memory)
        return self.head(hidden, targets, smoothing, weights)

    @torch.no_grad()
    def generate(
        self,
        source: list[int],
        begin: int,
        length: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
    ) -> list[int]:
        """`length` tokens (at most as many as there are positions) that translate `source`, after the token `begin`.

        Temperature 0 takes the likeliest each time. A source that is longer than there are positions loses its end.
        """
        was_training = self.training
        self.eval()
        device = self.tokens.weight.device
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that all devices draw alike
        read = torch.tensor([source[: self.sequence_length] or [begin]], device=device)
        written = Written(self.options.num_layers)
        made = [begin]
        for _ in range(min(length, self.sequence_length)):
            # Through the module itself: what shards a model gathers its weights when modules are called.
            logits = self(read, torch.tensor([made[-1:]], device=device), written=written)[0, -1].float().cpu()
            made.append(choose(logits, temperature, top_k, generator))
        self.train(was_training)
        return made[1:]
