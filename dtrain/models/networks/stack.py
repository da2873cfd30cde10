"""The stack of blocks that every network of the transformer family is built around.

Pre-norm throughout (Radford et al., "GPT-2", 2019): each layer reads the stream through a norm and adds to it.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from dtrain.models.networks.attention import Attention, KeyValues, Rotation
from dtrain.models.networks.norm import Norm, lowered

if TYPE_CHECKING:
    from dtrain.models.transformer import Options

ADDING = ("attention.output.weight", "reading.output.weight", "mlp.down.weight")
"""Matrices whose results are added to the stream."""
TENSOR_PARALLEL = {
    "*.blocks.*.attention.query": "column",
    "*.blocks.*.attention.key": "column",
    "*.blocks.*.attention.value": "column",
    "*.blocks.*.attention.query_norm": "shared",
    "*.blocks.*.attention.key_norm": "shared",
    "*.blocks.*.attention.output": "row",
    "*.blocks.*.reading.query": "column",
    "*.blocks.*.reading.key": "column",
    "*.blocks.*.reading.value": "column",
    "*.blocks.*.reading.query_norm": "shared",
    "*.blocks.*.reading.key_norm": "shared",
    "*.blocks.*.reading.output": "row",
    "*.blocks.*.mlp.up": "column",
    "*.blocks.*.mlp.gate": "column",
    "*.blocks.*.mlp.down": "row",
}
"""How a block is split over devices, as `Task.tensor_parallel` says it (Shoeybi et al., "Megatron-LM", 2019)."""


class MLP(nn.Module):
    """The part of a block that looks at one position at a time."""

    def __init__(self, options: "Options") -> None:
        super().__init__()
        hidden = options.hidden
        self.activation = options.activation
        self.up = nn.Linear(options.width, hidden, bias=options.bias)
        self.gate = nn.Linear(options.width, hidden, bias=options.bias) if options.activation == "swiglu" else None
        self.down = nn.Linear(hidden, options.width, bias=options.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        if self.gate is not None:
            y = F.silu(self.gate(x)) * y
        elif self.activation == "relu2":
            y = F.relu(y).square()
        else:
            y = F.gelu(y, approximate="tanh")
        return self.down(y)


class Block(nn.Module):
    """One layer: attention, in a decoder that translates reading the source, then MLP, each added to the stream."""

    def __init__(self, options: "Options", is_causal: bool = True, reads: bool = False) -> None:
        super().__init__()
        self.attention_norm = Norm(options.norm, options.width, options.bias)
        self.attention = Attention(options, is_causal)
        self.reading_norm = Norm(options.norm, options.width, options.bias) if reads else None
        self.reading = Attention(options, is_causal=False) if reads else None
        self.mlp_norm = Norm(options.norm, options.width, options.bias)
        self.mlp = MLP(options)
        self.dropout = nn.Dropout(options.dropout) if options.dropout else nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        rotation: Rotation | None = None,
        mask: torch.Tensor | None = None,
        cache: KeyValues | None = None,
        memory: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        memory_cache: KeyValues | None = None,
    ) -> torch.Tensor:
        x = x + self.dropout(self.attention(lowered(self.attention_norm(x)), rotation, mask, cache))
        if self.reading is not None and self.reading_norm is not None:
            read = self.reading(lowered(self.reading_norm(x)), None, memory_mask, memory_cache, memory)
            x = x + self.dropout(read)
        return x + self.dropout(self.mlp(lowered(self.mlp_norm(x))))


class Stack(nn.Module):
    """Blocks over a stream [b, t, w] that is told its positions, of which there are `length`; and a last norm."""

    def __init__(self, options: "Options", length: int, is_causal: bool = True, reads: bool = False) -> None:
        super().__init__()
        self.options = options
        self.length = length
        self.positions = nn.Embedding(length, options.width) if options.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(options, is_causal, reads) for _ in range(options.num_layers))
        self.final_norm = Norm(options.norm, options.width, options.bias)
        if options.positions == "rope":
            half = options.width // options.num_heads // 2
            self.register_buffer("cos", torch.empty(length, half), persistent=False)
            self.register_buffer("sin", torch.empty(length, half), persistent=False)
        self.dropout = nn.Dropout(options.dropout) if options.dropout else nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        places: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        caches: list[KeyValues] | None = None,
        memory: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        memory_caches: list[KeyValues] | None = None,
    ) -> torch.Tensor:
        """The stream after the last norm.

        `places` (int64 [b, t]) are the positions where they do not count up from what the caches hold.
        """
        if places is None:
            start = caches[0].length if caches else 0
            places = torch.arange(start, start + x.shape[1], device=x.device)
        if self.positions is not None:
            x = x + self.positions(places)
        x = self.dropout(x)
        rotation = self._rotation(places)
        for number, block in enumerate(self.blocks):
            cache = caches[number] if caches else None
            memory_cache = memory_caches[number] if memory_caches else None
            x = block(x, rotation, mask, cache, memory, memory_mask, memory_cache)
        return self.final_norm(x)

    def _rotation(self, places: torch.Tensor) -> Rotation | None:
        if self.options.positions != "rope":
            return None
        cos, sin = self.cos[places], self.sin[places]
        return (cos, sin) if places.ndim == 1 else (cos[:, None], sin[:, None])

    @torch.no_grad()
    def initialise(self) -> None:
        """Fill the buffers."""
        if self.options.positions == "rope":
            half = self.options.width // self.options.num_heads // 2
            frequency = self.options.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
            angle = torch.arange(self.length, dtype=torch.float64)[:, None] * frequency
            self.cos.copy_(angle.cos())
            self.sin.copy_(angle.sin())


@torch.no_grad()
def initialise(network: nn.Module, options: "Options", seed: int) -> None:
    """Fill every parameter and buffer of `network`, from `seed` alone.

    GPT-2's rule: normal with standard deviation `init_std`, divided by sqrt(2 x layers) where a layer adds to the
    stream, zero for biases, one for norms.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        elif name.endswith(ADDING):
            parameter.normal_(0.0, options.init_std / math.sqrt(2 * options.num_layers), generator=generator)
        else:
            parameter.normal_(0.0, options.init_std, generator=generator)
    for module in network.modules():
        if isinstance(module, Stack):
            module.initialise()
