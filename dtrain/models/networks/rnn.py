"""Recurrent networks: a stack of layers, and what it is used for: predicting tokens, and predicting a series.

Each layer is a module of its own with one of torch's recurrent cells in it, so that it can be sharded by itself.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dtrain.errors import TrainingError
from dtrain.models.networks.cross_entropy import TokenHead
from dtrain.models.networks.generation import choose

if TYPE_CHECKING:
    from dtrain.data import DataShape
    from dtrain.models.rnn import Options

CELLS: dict[str, type[nn.RNNBase]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
State = Any
"""What a layer remembers: [directions, b, w], of LSTM two of them."""


class Layer(nn.Module):
    """One recurrent layer, in one direction or both."""

    def __init__(self, options: "Options", num_inputs: int) -> None:
        super().__init__()
        cell = CELLS[options.cell]
        self.cell = cell(num_inputs, options.width, batch_first=True, bidirectional=options.bidirectional)
        self.dropout = nn.Dropout(options.dropout) if options.dropout else nn.Identity()

    def forward(self, x: torch.Tensor, state: State = None) -> tuple[torch.Tensor, State]:
        """[b, t, f] to [b, t, w] (2 w for both directions), and the state after the last time step."""
        made, state = self.cell(x, state)
        return self.dropout(made), state


class Stack(nn.Module):
    """Layers, each reading what the one before made."""

    def __init__(self, options: "Options", num_inputs: int) -> None:
        super().__init__()
        sizes = [num_inputs] + [options.made] * (options.num_layers - 1)
        self.layers = nn.ModuleList(Layer(options, size) for size in sizes)

    def forward(self, x: torch.Tensor, states: list[State] | None = None) -> tuple[torch.Tensor, list[State]]:
        """[b, t, f] to [b, t, w] (2 w for both directions), and the states after the last time step."""
        after = []
        for number, layer in enumerate(self.layers):
            x, state = layer(x, None if states is None else states[number])
            after.append(state)
        return x, after


class TokenNetwork(nn.Module):
    """A recurrent language model (Mikolov et al., 2010)."""

    def __init__(self, options: "Options", data: "DataShape") -> None:
        super().__init__()
        self.tokens = nn.Embedding(data.vocabulary_size, options.width)
        self.stack = Stack(options, options.width)
        self.head = TokenHead(options.width, data.vocabulary_size, data.vocabulary_size)
        if options.tie_weights:
            self.head.weight = self.tokens.weight

    def forward(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        smoothing: float = 0.0,
        states: list[State] | None = None,
    ) -> torch.Tensor:
        """For `inputs` [b, t]: the logits [b, t, vocabulary], or with `targets` [b, t] the sum of cross-entropies.

        `states` is what came before, and becomes what came until now; an empty list for the beginning.
        """
        if documents is not None:
            raise TrainingError(
                "model rnn reads a sample from end to end; use data.documents: joined, or a transformer"
            )
        hidden, after = self.stack(self.tokens(inputs), states or None)
        if states is not None:
            states[:] = after
        return self.head(hidden, targets, smoothing)

    @torch.no_grad()
    def generate(
        self, prompt: list[int], length: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0
    ) -> list[int]:
        """`length` tokens that follow `prompt` (not empty); temperature 0 takes the likeliest each time."""
        was_training = self.training
        self.eval()
        device = self.tokens.weight.device
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that all devices draw alike
        states: list[State] = []
        new, made = prompt, []
        for _ in range(length):
            # Through the module itself: what shards a model gathers its weights when modules are called.
            logits = self(torch.tensor([new], device=device), states=states)[0, -1].float().cpu()
            new = [choose(logits, temperature, top_k, generator)]
            made += new
        self.train(was_training)
        return made


class SeriesNetwork(nn.Module):
    """Reads a stretch of time and predicts the next values of one column."""

    def __init__(self, options: "Options", data: "DataShape") -> None:
        super().__init__()
        self.width = options.width
        self.stack = Stack(options, data.num_features)
        self.head = nn.Linear(options.made, data.horizon)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[b, t, f] to [b, horizon]."""
        made, _ = self.stack(inputs)
        # Each direction where it has read all.
        ends = torch.cat([made[:, -1, : self.width], made[:, 0, self.width :]], dim=1)
        return self.head(ends)


@torch.no_grad()
def initialise(network: nn.Module, options: "Options", seed: int) -> None:
    """Fill every parameter, from `seed` alone: uniform within 1 / sqrt(width), as torch's cells begin.

    The forget gates of LSTM begin open, so that it remembers (Jozefowicz et al., "An empirical exploration of
    recurrent network architectures", 2015).
    """
    generator = torch.Generator().manual_seed(seed)
    bound = 1.0 / math.sqrt(options.width)
    for name, parameter in network.named_parameters():
        parameter.uniform_(-bound, bound, generator=generator)
        if options.cell == "lstm" and ".cell.bias_ih" in name:
            parameter[options.width : 2 * options.width] += 1.0
