"""Transformer language models: a decoder that predicts the next token."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from dtrain import component
from dtrain.data import DataShape
from dtrain.errors import InputError
from dtrain.models import ModelSize, Request, Sample, Task

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dtrain.models.networks.transformer import Transformer
    from dtrain.spec.job import Train


class Options(component.Options):
    """A decoder-only transformer that predicts the next token; the defaults are GPT-2's."""

    num_layers: PositiveInt = Field(default=12, le=1024)
    """Blocks, each of attention and an MLP."""
    num_heads: PositiveInt = Field(default=12, le=1024)
    """Attention heads of a block; must divide `width`."""
    width: PositiveInt = Field(default=768, le=2**17)
    """Numbers a position is described by, from block to block."""
    mlp_ratio: PositiveFloat = Field(default=4.0, le=64.0)
    """Hidden width of an MLP, as a multiple of `width`."""
    activation: Literal["gelu", "relu2", "swiglu"] = "gelu"
    """Inside an MLP: gelu, squared relu, or silu gating a second matrix (then 8/3 is the usual `mlp_ratio`)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalization before attention and MLP, and at the end."""
    positions: Literal["learned", "rope"] = "learned"
    """How the model knows positions: a learned vector for each, or rotation of queries and keys."""
    rope_base: PositiveFloat = 10000.0
    """Base of the wavelengths of `positions: rope`."""
    qk_norm: bool = False
    """Normalize queries and keys, which keeps large learning rates stable."""
    bias: bool = True
    """Add a bias in linear layers and layer norms."""
    tie_weights: bool = True
    """Use one matrix to read tokens in and to predict them."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of numbers dropped while training: of embeddings, of attention weights, and of what a block adds."""
    init_std: PositiveFloat = Field(default=0.02, le=1.0)
    """Standard deviation of the weights at the start; those that add to the stream get it over sqrt(2 x layers)."""
    pad_vocabulary_to: PositiveInt = Field(default=64, le=4096)
    """The vocabulary is padded to a multiple of this, which is faster on GPUs; padding is never predicted."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "Options":
        if self.width % self.num_heads:
            near = [h for h in range(1, self.width + 1) if self.width % h == 0]
            nearest = min(near, key=lambda h: abs(h - self.num_heads))
            raise ValueError(f"num_heads {self.num_heads} does not divide width {self.width}; nearest: {nearest}")
        if self.positions == "rope" and self.width // self.num_heads % 2:
            raise ValueError(
                f"rope needs an even head width, and width {self.width} / num_heads {self.num_heads} is "
                f"{self.width // self.num_heads}; choose another num_heads, or positions: learned"
            )
        return self

    @property
    def hidden(self) -> int:
        """Hidden width of an MLP."""
        return max(round(self.width * self.mlp_ratio), 1)

    def padded(self, vocabulary_size: int) -> int:
        """Rows of the token matrix."""
        return math.ceil(vocabulary_size / self.pad_vocabulary_to) * self.pad_vocabulary_to


def describe(options: Options, data: DataShape) -> ModelSize:
    """Parameters, floating point operations and activations of one sample.

    Operations are 6 a token for each parameter that multiplies, plus 12 x layers x width x length for attention,
    as if it were not causal (Chowdhery et al., "PaLM", 2022, appendix B). Raises `InputError` for other than tokens.
    """
    _check(data)
    w, hidden, length = options.width, options.hidden, data.sequence_length
    bias = int(options.bias)
    norm = w * (1 + int(options.bias and options.norm == "layernorm"))
    attention = 4 * (w * w + bias * w) + (2 * (w // options.num_heads) if options.qk_norm else 0)
    num_up = 2 if options.activation == "swiglu" else 1
    mlp = num_up * (w * hidden + bias * hidden) + (hidden * w + bias * w)
    layers = options.num_layers * (attention + mlp + 2 * norm) + norm
    vocabulary = options.padded(data.vocabulary_size) * w
    positions = length * w if options.positions == "learned" else 0
    # Kept for backward in a layer: both norms' inputs and outputs, q, k, v (rotated and normalized anew), mixed.
    kept = 8 + 2 * int(options.positions == "rope") + 2 * int(options.qk_norm)
    layer_numbers = kept * w + (2 * num_up) * hidden
    return ModelSize(
        num_parameters=layers + positions + vocabulary * (1 if options.tie_weights else 2),
        flops_per_sample=length * (6 * (layers + vocabulary) + 12 * options.num_layers * w * length),
        activation_bytes_per_sample=4 * length * (options.num_layers * layer_numbers + 4 * w),
    )


def build(options: Options, data: DataShape, train: "Train") -> "LanguageModel":
    """The task of predicting the next token, with weights that are a function of `train.seed` alone."""
    import torch

    from dtrain.models.networks.transformer import Transformer

    _check(data)
    with torch.device("meta"):
        network = Transformer(options, data.vocabulary_size, data.sequence_length)
    network.to_empty(device="cpu")
    network.initialise(train.seed)
    return LanguageModel(network)


def _check(data: DataShape) -> None:
    if data.kind != "tokens":
        raise InputError(f"model transformer learns from tokens, not from {data.kind}; use data: {{name: text}}")


class LanguageModel(Task):
    """The task: one network, one phase, mean cross-entropy of the next token."""

    def __init__(self, network: "Transformer") -> None:
        super().__init__({"model": network})
        self._network = network

    def loss(self, phase: str, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """Mean nats a target of `batch`: inputs and targets, both [b, t]."""
        del phase
        targets = batch["targets"]
        return parts["model"](batch["inputs"], targets, batch.get("documents")) / (targets >= 0).sum()

    def evaluate(
        self, parts: "Mapping[str, nn.Module]", batch: "Mapping[str, torch.Tensor]"
    ) -> "dict[str, torch.Tensor]":
        """Nats, targets and, where the data knows them, bytes of text of one held-out batch."""
        targets = batch["targets"]
        sums = {
            "nats": parts["model"](batch["inputs"], targets, batch.get("documents")),
            "targets": (targets >= 0).sum(),
        }
        if "target_bytes" in batch:
            sums["bytes"] = batch["target_bytes"].sum()
        return sums

    def finish_evaluation(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Mean nats a target, perplexity, and bits a byte of text."""
        loss = sums["nats"] / sums["targets"]
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if sums.get("bytes"):
            metrics["bits_per_byte"] = sums["nats"] / math.log(2) / sums["bytes"]
        return metrics

    def blocks(self) -> "list[nn.Module]":
        """The blocks."""
        return list(self._network.decoder.blocks)

    def tensor_parallel(self) -> dict[str, str]:
        """Heads and hidden numbers are split; see `dtrain/models/networks/stack.py`."""
        from dtrain.models.networks.stack import TENSOR_PARALLEL

        return TENSOR_PARALLEL

    def sample(self, source: Any, request: Request) -> Sample:
        """The prompt and the text of up to `length` tokens after it; ends early where the model ends its document."""
        tokens = source.encode(request.prompt)
        made = self._network.generate(
            tokens or [source.separator], request.length, request.temperature, request.top_k, request.seed
        )
        if source.separator in made:
            made = made[: made.index(source.separator)]
        return Sample(source.decode([*tokens, *made]))
