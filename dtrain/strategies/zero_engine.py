"""One phase's update by a DeepSpeed engine, and the parts of a task as that engine must see them called."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dtrain.models import Phase, Task
from dtrain.strategies.engine import refuse_unused, set_learning_rate, trained_parameters


class Root(nn.Module):
    """The parts of one phase as the one module that DeepSpeed wraps; called with `chosen` set to one of them."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.chosen = ""

    def forward(self, *args: Any, **words: Any) -> Any:
        return self.parts[self.chosen](*args, **words)


class Called(nn.Module):
    """A part as losses call it: through its root, whose hooks tell stage 3 that a forward pass begins.

    Not through the DeepSpeed engine, which would turn the loop's autocast off. `through` is what is wrapped around
    the root, where it must be called instead.
    """

    def __init__(self, root: Root, name: str, through: nn.Module | None = None) -> None:
        super().__init__()
        self.part = root.parts[name]
        self._name, self._root = name, (root, through or root)  # in a tuple: not children, modes would go in circles

    def forward(self, *args: Any, **words: Any) -> Any:
        root, through = self._root
        root.chosen = self._name
        return through(*args, **words)


class ZeroEngine:
    """Accumulate, clip, step: by DeepSpeed. `deepspeed` wraps the parts that `phase` trains."""

    def __init__(self, deepspeed: Any, task: Task, phase: Phase, parts: Mapping[str, nn.Module]) -> None:
        self.parts = parts
        self._deepspeed, self._phase = deepspeed, phase.name
        self._groups = list(deepspeed.optimizer.optimizer.param_groups)
        self._device = deepspeed.device
        others = [p for name, part in task.parts.items() if name not in phase.parts for p in part.parameters()]
        self._others = [p for p in others if p.requires_grad]
        self._unused = {name for name, _ in trained_parameters(task, phase)}
        # ZeRO takes gradients away while the backward pass runs: each parameter tells once that it had one.
        self._watches = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._unused.discard(name))
            for name, parameter in trained_parameters(task, phase)
        ]

    def begin(self, is_last: bool) -> None:
        self._deepspeed.set_gradient_accumulation_boundary(is_last)
        self._deepspeed.optimizer.clear_backward_seen_flag()  # what a call of the DeepSpeed engine begins with
        for parameter in self._others:
            parameter.requires_grad_(False)

    def backward(self, loss: torch.Tensor) -> None:
        self._deepspeed.optimizer.backward_prologue()  # what its outputs would do: here losses are made of many
        self._deepspeed.backward(loss, scale_wrt_gas=False)
        for parameter in self._others:
            parameter.requires_grad_(True)

    def step(self, learning_rate: float) -> torch.Tensor:
        if self._watches:
            refuse_unused(self._phase, sorted(self._unused))
            for watch in self._watches:
                watch.remove()
            self._watches.clear()
        set_learning_rate(self._groups, learning_rate)
        self._deepspeed.step()
        return torch.as_tensor(self._deepspeed.get_global_grad_norm(), device=self._device)


def called(roots: Sequence[Root], parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """All parts of a task as losses call them; those that no phase trains are called as they are."""
    made = dict(parts)
    for root in roots:
        made |= {name: Called(root, name) for name in root.parts}
    return made
