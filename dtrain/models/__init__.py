"""What is trained. A model is one file here, found by its name, with three things in it:

- `Options`: its settings (`dtrain.component.Options`);
- `describe(options, data) -> ModelSize`: its arithmetic, without torch;
- `build(options, data, train) -> Task`: the networks and how they learn.

The networks themselves, which need torch to be defined, live in `dtrain/models/networks/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class ModelSize:
    """What planning must know of a model before torch is loaded."""

    num_parameters: int
    """Trainable numbers, tied weights counted once."""
    flops_per_sample: int
    """Floating point operations of forward and backward for one sample (backward counted as twice forward)."""
    activation_bytes_per_sample: int
    """Estimate of the memory one sample needs between forward and backward, in fp32."""


@dataclass(frozen=True)
class Phase:
    """One update: which parts it trains. A GAN has two phases, most models one."""

    name: str
    parts: tuple[str, ...]


class Task(Protocol):
    """What the loop trains: networks (parts), updates (phases) and a loss for each of them.

    `parts` given to a method are the same networks as the attribute, wrapped by the strategy: call those.
    A batch maps names to tensors whose first dimension is the micro batch, already on the device.
    """

    parts: dict[str, "nn.Module"]
    phases: tuple[Phase, ...]

    def loss(self, phase: str, parts: Mapping[str, "nn.Module"], batch: Mapping[str, "torch.Tensor"]) -> "torch.Tensor":
        """Mean loss of the micro batch for one phase: a scalar with a gradient."""

    def evaluate(
        self, parts: Mapping[str, "nn.Module"], batch: Mapping[str, "torch.Tensor"]
    ) -> dict[str, "torch.Tensor"]:
        """Sums (never means) over one held-out micro batch: scalars that add up over batches and workers."""

    def finish_evaluation(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn the sums over all held-out samples into metrics; `loss` must be among them, lower is better."""

    def compile_units(self) -> list["nn.Module"]:
        """The blocks that `compile: true` compiles one by one, and that activation checkpointing recomputes."""

    def sample(self, data: Any, prompt: str, length: int, temperature: float, seed: int) -> str:
        """A readable sample of what the model makes of `prompt`, or raises `InputError` when it has none to give."""
