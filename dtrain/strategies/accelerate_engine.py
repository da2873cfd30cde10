"""One phase's update by Accelerate, and the pieces of state that one worker holds where it shards."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from dtrain.checkpoint.pieces import Piece, whole
from dtrain.models import Phase, Task
from dtrain.strategies import sharded
from dtrain.strategies.engine import check_gradients, initialise, set_learning_rate, trained_parameters
from dtrain.strategies.mesh import Mesh


class AccelerateEngine:
    """Accumulate, clip, step: by Accelerate. `model` and `optimizer` are what it made of a phase's."""

    def __init__(
        self,
        accelerator: Any,
        task: Task,
        phase: Phase,
        parts: Mapping[str, nn.Module],
        *,
        model: nn.Module,
        optimizer: Any,
        max_norm: float | None,
    ) -> None:
        self.parts = parts
        self._accelerator, self._model, self._optimizer = accelerator, model, optimizer
        trained = dict(trained_parameters(task, phase))
        self._phase, self._names, self._parameters = phase.name, list(trained), list(trained.values())
        others = [p for name, part in task.parts.items() if name not in phase.parts for p in part.parameters()]
        self._others = [p for p in others if p.requires_grad]
        self._groups = optimizer.optimizer.param_groups
        self._max_norm = max_norm or float("inf")
        self._apart = contextlib.ExitStack()
        self._is_checked = False

    def begin(self, is_last: bool) -> None:
        if not is_last:
            self._apart.enter_context(self._accelerator.no_sync(self._model))
        for parameter in self._others:
            parameter.requires_grad_(False)

    def backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)
        self._apart.close()
        for parameter in self._others:
            parameter.requires_grad_(True)

    def step(self, learning_rate: float) -> torch.Tensor:
        if not self._is_checked:
            self._is_checked = check_gradients(self._phase, self._names, self._parameters)
        norm = self._accelerator.clip_grad_norm_(self._parameters, self._max_norm)
        set_learning_rate(self._groups, learning_rate)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def reshard(roots: Sequence[nn.Module]) -> Callable[[], None]:
    """Forgets the gathered weights of `roots`."""
    return functools.partial(sharded.reshard, list(sharded.sharded_modules(roots)))


def sharded_state(task: Task, optimizers: Mapping[str, torch.optim.Optimizer]) -> list[Piece]:
    """The pieces this worker holds: of sharded tensors its rows, and what all hold alike, written by the first."""
    rank = dist.get_rank()
    shards = sharded.shards_of(task, Mesh.of(dist.get_world_size(), 1, 1), rank)
    state: list[Piece] = []

    def add(name: str, tensor: torch.Tensor, shard: sharded.Shard | None) -> None:
        if not isinstance(tensor, DTensor):
            state.append(whole(name, tensor, rank == 0))
        elif shard is not None and tensor.to_local().numel():
            state.append(shard.piece(name, tensor.to_local().detach()))

    seen: set[int] = set()
    for part, module in task.parts.items():
        for key, tensor in module.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                add(f"model.{part}.{key}", tensor, shards.get(id(tensor)))
    for phase, optimizer in optimizers.items():
        initialise(optimizer)
        for parameter, values in optimizer.state.items():
            shard = shards[id(parameter)]
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    add(f"optimizer.{phase}.{shard.name}.{key}", value, shard)
    return state
