"""What strategies share: the plain update, restructuring of a model before it is wrapped, and the state to keep."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dtrain.checkpoint.pieces import Piece, whole
from dtrain.errors import TrainingError
from dtrain.models import Phase, Task
from dtrain.models.networks.batch_norm import synchronise
from dtrain.plan import Plan
from dtrain.strategies import MakeOptimizer
from dtrain.strategies.loss_scale import LossScale

Norm = Callable[[list[torch.Tensor]], torch.Tensor]
"""From gradients to the norm of all of them together: a scalar, the same on every worker."""
COMPILED_APART = 6
"""How often a block may be compiled: with gradients, without them, in evaluation, each with another size of batch."""


class OptimizerEngine:
    """Accumulate, clip, step: for strategies whose parameters are ordinary tensors on every worker."""

    def __init__(
        self,
        task: Task,
        phase: Phase,
        bare: Mapping[str, nn.Module],
        wrapped: Mapping[str, nn.Module],
        plan: Plan,
        make_optimizer: MakeOptimizer,
    ) -> None:
        self.parts: Mapping[str, nn.Module] = {name: (wrapped if name in phase.parts else bare)[name] for name in bare}
        trained = dict(trained_parameters(task, phase))
        self.optimizer = make_optimizer((n, p, task.learning_rate_share(phase, n)) for n, p in trained.items())
        self.scale = loss_scale(plan, next(iter(trained.values())).device)
        self._phase, self._names, self._parameters = phase.name, list(trained), list(trained.values())
        self._is_checked = False
        others = [p for name in bare if name not in phase.parts for p in bare[name].parameters()]
        self._others = [p for p in others if p.requires_grad]
        self._synchronised = [m for m in self.parts.values() if isinstance(m, DistributedDataParallel)]
        self._max_norm = plan.train.clip_grad_norm

    def begin(self, is_last: bool) -> None:
        for module in self._synchronised:
            # A static graph is learnt in the first backward pass, which must exchange gradients for it.
            is_learning = module.static_graph and not self._is_checked
            module.require_backward_grad_sync = is_last or is_learning
        for parameter in self._others:
            parameter.requires_grad_(False)

    def backward(self, loss: torch.Tensor) -> None:
        (loss if self.scale is None else self.scale.raised(loss)).backward()
        for parameter in self._others:
            parameter.requires_grad_(True)

    def step(self, learning_rate: float) -> torch.Tensor:
        if not self._is_checked:
            self._is_checked = check_gradients(self._phase, self._names, self._parameters)
        return update(
            self.optimizer, self._parameters, learning_rate, self._max_norm, nn.utils.get_total_norm, self.scale
        )


def update(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    learning_rate: float,
    max_norm: float | None,
    norm_of: Norm,
    scale: LossScale | None,
) -> torch.Tensor:
    """Clip, step, and clear the gradients of `parameters`; returns their norm before clipping.

    That is 0 where a step is skipped because an fp16 gradient overflowed.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    with torch.no_grad():
        if scale is not None:
            scale.lower(gradients)
        norm = norm_of(gradients)
    if scale is not None and not scale.accepts(norm):
        optimizer.zero_grad(set_to_none=True)
        return torch.zeros_like(norm)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    set_learning_rate(optimizer.param_groups, learning_rate)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def loss_scale(plan: Plan, device: torch.device) -> LossScale | None:
    """One for fp16; other formats need none."""
    return LossScale(device) if plan.train.precision == "fp16" else None


def in_bf16(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket of DDP's gradients in bf16. By its own name torch's hook is refused on every device but two."""
    return bf16_compress_hook(group, bucket)


def trained_parameters(task: Task, phase: Phase) -> Iterator[tuple[str, nn.Parameter]]:
    """What `phase` trains, as (`<part>.<name>`, parameter); tied ones once, frozen ones not at all."""
    for name in phase.parts:
        for key, parameter in task.parts[name].named_parameters():
            if parameter.requires_grad:
                yield f"{name}.{key}", parameter


def check_gradients(phase: str, names: Sequence[str], parameters: Sequence[nn.Parameter]) -> bool:
    """Whether every parameter has a gradient: True. Raises `TrainingError` with the names of those that have none."""
    refuse_unused(phase, [name for name, parameter in zip(names, parameters, strict=True) if parameter.grad is None])
    return True


def refuse_unused(phase: str, unused: Sequence[str]) -> None:
    """Raises `TrainingError` where `unused` names any parameters that a phase trains without using them."""
    if unused:
        shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
        raise TrainingError(
            f"the loss of phase {phase!r} does not depend on {shown}; use them, freeze them (requires_grad=False), or"
            " leave them out of the phase's parts"
        )


def set_learning_rate(groups: list[dict[str, object]], learning_rate: float) -> None:
    """Give each group of an optimizer its share of the rate."""
    for group in groups:
        group["lr"] = learning_rate * group["lr_share"]  # type: ignore[operator]


def restructure(task: Task, plan: Plan) -> None:
    """Batch norm over all workers, activation checkpointing and compilation, before any wrapper sees the model.

    And how convolutions are computed: where every batch has the same shapes, cuDNN tries its algorithms once and keeps
    the quickest. A user's own model or data may have other shapes in every step, each of which would be tried anew.
    """
    if plan.workers.device == "cuda" and "custom" not in (plan.model.name, plan.data.name):  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    if plan.workers.total > 1:
        for part in task.parts.values():
            synchronise(part)
    blocks = task.blocks()
    if plan.train.compile and blocks:
        # All blocks share the code of their class, and each shape, in training and out of it, is compiled apart: torch
        # would give up after eight.
        from torch._dynamo import config

        config.recompile_limit = max(config.recompile_limit, COMPILED_APART * len(blocks))
    recomputed = {"none": 0, "selective": 2, "full": 1}[plan.train.activation_checkpointing]
    for number, block in enumerate(blocks):
        if recomputed and number % recomputed == 0:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        if plan.train.compile:
            block.compile()


def training_state(parts: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]) -> list[Piece]:
    """Live tensors of parts and optimizers under stable names: `model.<part>.<name>`, `optimizer.<phase>.<name>.<key>`.

    Tied tensors appear once. Learning rates and random numbers are functions of the step and need no keeping.
    """
    state: list[Piece] = []
    names: dict[int, str] = {}
    for part, module in parts.items():
        for key, tensor in module.state_dict(keep_vars=True).items():
            if id(tensor) not in names:
                names[id(tensor)] = f"{part}.{key}"
                state.append(whole(f"model.{part}.{key}", tensor))
    for phase, optimizer in optimizers.items():
        initialise(optimizer)
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    state.append(whole(f"optimizer.{phase}.{names[id(parameter)]}.{key}", value))
    return state


def initialise(optimizer: torch.optim.Optimizer) -> None:
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
