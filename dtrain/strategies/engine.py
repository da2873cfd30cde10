"""What strategies share: the plain update, restructuring of a model before it is wrapped, and the state to keep."""

import functools
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dtrain.models import Phase, Task
from dtrain.plan import Plan
from dtrain.strategies import MakeOptimizer


class OptimizerEngine:
    """Accumulate, clip, step: for strategies whose parameters are ordinary tensors on every worker."""

    def __init__(
        self,
        phase: Phase,
        bare: Mapping[str, nn.Module],
        wrapped: Mapping[str, nn.Module],
        plan: Plan,
        make_optimizer: MakeOptimizer,
    ) -> None:
        named = [(f"{name}.{key}", p) for name in phase.parts for key, p in bare[name].named_parameters()]
        self.optimizer = make_optimizer(named)
        self._parameters = [p for _, p in named if p.requires_grad]
        self._synchronised = [
            wrapped[name] for name in phase.parts if isinstance(wrapped[name], DistributedDataParallel)
        ]
        self._max_norm = plan.train.clip_grad_norm or float("inf")
        self._groups = self.optimizer.param_groups

    def begin(self, is_last: bool) -> None:
        for module in self._synchronised:
            module.require_backward_grad_sync = is_last

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> torch.Tensor:
        norm = nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        for group in self._groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def restructure(task: Task, plan: Plan) -> None:
    """Activation checkpointing and compilation, block by block, before any wrapper sees the model."""
    for unit in task.compile_units():
        if plan.train.activation_checkpointing == "full":
            unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False)  # type: ignore[method-assign]
        if plan.train.compile:
            unit.compile()


def training_state(
    parts: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> dict[str, torch.Tensor]:
    """Live tensors of parts and optimizers under stable names: `model.<part>.<name>`, `optimizer.<phase>.<name>.<key>`.

    Tied tensors appear once. Learning rates and random numbers are functions of the step and need no keeping.
    """
    state: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}
    seen: set[int] = set()
    for part, module in parts.items():
        for key, tensor in module.state_dict(keep_vars=True).items():
            names.setdefault(id(tensor), f"{part}.{key}")
            if id(tensor) not in seen:
                seen.add(id(tensor))
                state[f"model.{part}.{key}"] = tensor
    for phase, optimizer in optimizers.items():
        _initialise(optimizer)
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    state[f"optimizer.{phase}.{names[id(parameter)]}.{key}"] = value
    return state


def _initialise(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's state exist before the first step, so that a snapshot can be restored into it.

    A step with zero gradients and zero learning rate moves nothing; its traces are then set to zero.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for values in optimizer.state.values():
        for value in values.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
