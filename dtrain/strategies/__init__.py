"""How parts are spread over workers. A strategy is one file here, found by its name, with three things in it:

- `Options`: its settings (a `dtrain.settings.Settings`);
- `check(options, job, workers, size) -> None`: raises `InputError` for what it cannot do, at plan time, naming the
  alternative;
- `prepare(task, plan, device, make_optimizer) -> Prepared`: spreads the parts, and makes one engine a phase.

A fourth is needed only where neighbouring workers compute each of their samples together: `sharing(options) -> int`,
how many do; they read the same samples. A fifth where a worker holds less than the whole training state:
`bytes_per_number(options, job, workers, accumulation) -> dtrain.footprint.Bytes`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dtrain.checkpoint.pieces import Piece

MODEL = "model."
"""What the names of the networks' own tensors begin with."""
MakeOptimizer = Callable[[Iterable[tuple[str, Any, float]]], Any]
"""From (name, parameter, share of the learning rate) to a torch optimizer with the plan's settings."""


class Engine(Protocol):
    """One phase's update: what happens between a loss and new weights."""

    parts: "Mapping[str, nn.Module]"
    """All parts of the task as this phase's loss is computed with them: those it does not train keep their weights
    and gradients."""

    def begin(self, is_last: bool) -> None:
        """Called before the forward pass of a micro batch; gradients are exchanged after the last one only."""

    def backward(self, loss: "torch.Tensor") -> None:
        """Add the gradient of one micro batch's mean loss, already divided by the number of micro batches."""

    def step(self, learning_rate: float) -> "torch.Tensor":
        """Clip, update the weights, clear the gradients; returns the gradient norm before clipping, on the device."""


def nothing() -> None:
    """What most strategies do when their state was changed."""


@dataclass(frozen=True)
class Prepared:
    """A task made ready for its workers."""

    evaluation_parts: "Mapping[str, nn.Module]"
    """The same weights for evaluation."""
    engines: Mapping[str, Engine]
    """One a phase."""
    state: "Sequence[Piece]"
    """Everything that must survive, as live tensors under names that depend neither on the strategy nor on the number
    of workers: `model.<part>.<name>`, `optimizer.<phase>.<part>.<name>.<key>`."""
    is_replicated: bool
    """Whether every worker holds the whole state: then any one survivor can restore all others."""
    refresh: Callable[[], None] = nothing
    """Called after the tensors of `state` were changed in place from outside (restored, averaged)."""

    def keeping(self, is_kept: Callable[[str], bool]) -> "Prepared":
        """The same without the state of networks that `is_kept` (of `<part>.<name>`) lets go."""
        kept = [p for p in self.state if not p.name.startswith(MODEL) or is_kept(p.name.removeprefix(MODEL))]
        return replace(self, state=kept)
