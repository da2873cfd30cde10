"""The task: predict the next byte of text with a small transformer. Change the network, the loss, or both."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrain


def build(data: dtrain.DataShape, train: Any, width: int = 64, num_layers: int = 2) -> dtrain.Task:
    """Called on every worker, torch's generator seeded; `options` in the job are its keyword arguments."""
    return NextByte(Network(data.vocabulary_size, data.sequence_length, width, num_layers))


class Network(nn.Module):
    """From tokens [b, t] to a score for each token that may come next [b, t, vocabulary]."""

    def __init__(self, vocabulary_size: int, length: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocabulary_size, width), nn.Embedding(length, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(block, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary_size)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        future = torch.ones(len(places), len(places), dtype=torch.bool, device=tokens.device).triu(1)
        states = self.layers(self.embed(tokens) + self.positions(places), mask=future, is_causal=True)
        out: Tensor = self.head(states)
        return out


class NextByte(dtrain.Task):
    """What is trained: `parts` are the networks, to be called as they are given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__({"model": network})
        self.network = network

    def loss(self, phase: str, parts: Mapping[str, nn.Module], batch: Mapping[str, Tensor]) -> Tensor:
        """The mean over the micro batch; -1 stands where nothing is to be predicted."""
        return F.cross_entropy(parts["model"](batch["inputs"]).transpose(1, 2), batch["targets"], ignore_index=-1)

    def sample(self, source: Any, request: dtrain.Request) -> dtrain.Sample:
        """Text from the prompt on: shown at the end of a run, and by `dtrain sample`."""
        tokens = source.encode(request.prompt) or [source.separator]
        generator, device = torch.Generator().manual_seed(request.seed), next(self.network.parameters()).device
        with torch.no_grad():
            for _ in range(request.length):
                scores = self.network(torch.tensor([tokens[-64:]], device=device))[0, -1].cpu()
                chances = (scores / max(request.temperature, 1e-3)).softmax(0)
                tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
        return dtrain.Sample(source.decode(tokens))
