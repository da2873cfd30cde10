"""How parts are spread over workers. A strategy is one file here, found by its name, with three things in it:

- `Options`: its settings (`dtrain.component.Options`);
- `check(options, job, workers) -> None`: raises `InputError` for what it cannot do, at plan time;
- `prepare(task, plan, device, make_optimizer) -> Prepared`: wraps the parts, and makes one engine a phase.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

MakeOptimizer = Callable[[Iterable[tuple[str, Any]]], Any]
"""From (name, parameter) pairs to a torch optimizer with the plan's settings."""


class Engine(Protocol):
    """One phase's update: what happens between a loss and new weights."""

    def begin(self, is_last: bool) -> None:
        """Called before the forward pass of a micro batch; gradients are exchanged after the last one only."""

    def backward(self, loss: "torch.Tensor") -> None:
        """Add the gradient of one micro batch's mean loss, already divided by the number of micro batches."""

    def step(self, learning_rate: float) -> "torch.Tensor":
        """Clip, update the weights, clear the gradients; returns the gradient norm before clipping, on the device."""


@dataclass(frozen=True)
class Prepared:
    """A task made ready for its workers."""

    parts: "Mapping[str, nn.Module]"
    """What losses are computed with."""
    evaluation_parts: "Mapping[str, nn.Module]"
    """The same weights for evaluation, where workers need not keep in step."""
    engines: Mapping[str, Engine]
    """One a phase."""
    state: "dict[str, torch.Tensor]"
    """Everything that must survive, as live tensors under names that do not depend on the number of workers."""
    is_replicated: bool
    """Whether every worker holds the whole state: then any one survivor can restore all others."""
