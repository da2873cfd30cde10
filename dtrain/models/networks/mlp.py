"""The network of `dtrain/models/mlp.py`."""

import itertools
from typing import TYPE_CHECKING

import torch
from torch import nn

from dtrain.models.networks.initial import he

if TYPE_CHECKING:
    from dtrain.models.mlp import Options

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class Layer(nn.Module):
    """A linear layer, its activation, and dropout."""

    def __init__(self, num_inputs: int, num_outputs: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(num_inputs, num_outputs)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.activation(self.linear(x)))


class MLP(nn.Module):
    """A multilayer perceptron over all numbers of a sample."""

    def __init__(self, options: "Options", num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        sizes = (num_inputs, *options.hidden)
        self.layers = nn.ModuleList(
            Layer(before, after, options.activation, options.dropout) for before, after in itertools.pairwise(sizes)
        )
        self.head = nn.Linear(sizes[-1], num_outputs)
        self._activation = options.activation

    def initialise(self, seed: int) -> None:
        """Fill every parameter, from `seed` alone: He's rule, with the gain of LeCun's for tanh and for the head."""
        he(self, seed, gain=1.0 if self._activation == "tanh" else 2.0**0.5)
        if self._activation != "tanh":
            with torch.no_grad():
                self.head.weight.mul_(0.5**0.5)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """For `inputs` [b, ...]: [b, outputs]."""
        x = inputs.flatten(1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
