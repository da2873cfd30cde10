"""The update of weights that are sharded with FSDP2, and the pieces of state that one worker holds of them.

The optimizer works on each worker's own shards as plain tensors: what AdamW and SGD do to a number depends on no other
number, so nothing is exchanged for it, and DTensor's dispatch is not paid for. The one thing that needs all shards is
the norm of the gradients.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dtrain.checkpoint.pieces import Piece, whole
from dtrain.models import Phase, Task
from dtrain.plan import Plan
from dtrain.strategies import MakeOptimizer
from dtrain.strategies.engine import check_gradients, initialise, loss_scale, trained_parameters, update
from dtrain.strategies.mesh import Mesh, cut


@dataclass(frozen=True)
class Shard:
    """What one worker holds of one parameter."""

    name: str
    """`<part>.<name>`."""
    sharded: nn.Parameter
    """The DTensor that FSDP gives gradients to."""
    local: nn.Parameter
    """The same memory as a plain tensor, which the optimizer knows."""
    at: tuple[int, ...]
    is_primary: bool

    def piece(self, name: str, tensor: torch.Tensor) -> Piece:
        return Piece(name, tensor, tuple(self.sharded.shape), self.at, self.is_primary)


def shards_of(task: Task, mesh: Mesh, worker: int) -> dict[int, Shard]:
    """By the identity of the sharded parameter; a tied one once, under its first name."""
    place = mesh.place(worker)
    found: dict[int, Shard] = {}
    for part, module in task.parts.items():
        for key, parameter in module.named_parameters():
            if id(parameter) in found:
                continue
            # Dimensions of a mesh come in the order of `Mesh`: (replica,) shard (, tensor).
            is_split = len(parameter.placements) - int(mesh.replicas > 1) == 2
            tensor_dimension = (
                parameter.placements[-1].dim if is_split and parameter.placements[-1].is_shard() else None
            )
            at, size = cut(parameter.shape, mesh, place, tensor_dimension)
            local = parameter.to_local().detach()
            assert local.shape == size, f"{part}.{key}: {tuple(local.shape)} is held where {size} was reckoned"
            is_primary = place.replica == 0 and (tensor_dimension is not None or place.tensor == 0)
            held = nn.Parameter(local, requires_grad=parameter.requires_grad)
            found[id(parameter)] = Shard(f"{part}.{key}", parameter, held, at, is_primary)
    return found


class ShardedEngine:
    """Accumulate, clip, step: each worker its own shards.

    `shared` are the names of parameters whose gradients are summed over `tensor_group`.
    """

    def __init__(
        self,
        task: Task,
        phase: Phase,
        shards: Mapping[int, Shard],
        plan: Plan,
        make_optimizer: MakeOptimizer,
        *,
        device: torch.device,
        is_reduced_last: bool,
        shared: Sequence[str],
        tensor_group: dist.ProcessGroup | None,
    ) -> None:
        self.parts: Mapping[str, nn.Module] = task.parts
        self._shards = [shards[id(parameter)] for _, parameter in trained_parameters(task, phase)]
        self._locals = [shard.local for shard in self._shards]
        self.optimizer = make_optimizer(
            (s.name, s.local, task.learning_rate_share(phase, s.name)) for s in self._shards
        )
        self.scale = loss_scale(plan, device)
        self._phase, self._max_norm, self._device = phase.name, plan.train.clip_grad_norm, device
        self._is_checked = False
        others = [part for name, part in task.parts.items() if name not in phase.parts]
        self._idle = [p for part in others for p in part.parameters() if p.requires_grad]
        self._idle_modules = list(sharded_modules(others))
        self._roots = [part for name, part in task.parts.items() if name in phase.parts]
        self._is_reduced_last, self._is_synchronised = is_reduced_last, True
        self._norm_of = functools.partial(_norm, [s.local for s in self._shards if s.is_primary], device)
        self._shared = [shard for shard in self._shards if shard.name in set(shared)]
        self._tensor_group = tensor_group

    def begin(self, is_last: bool) -> None:
        wanted = is_last or not self._is_reduced_last
        if wanted != self._is_synchronised:
            self._is_synchronised = wanted
            for root in self._roots:
                root.set_requires_gradient_sync(wanted)
        # FSDP learns in its first pass what is trained, in any phase: gradients that come of it are dropped by `step`.
        if self._is_checked:
            self._train_idle(False)

    def backward(self, loss: torch.Tensor) -> None:
        (loss if self.scale is None else self.scale.raised(loss)).backward()
        if self._is_checked:
            self._train_idle(True)

    def _train_idle(self, is_trained: bool) -> None:
        """Whether parts that this phase does not train get gradients; their weights hear of it when gathered anew."""
        for parameter in self._idle:
            parameter.requires_grad_(is_trained)
        reshard(self._idle_modules)

    def step(self, learning_rate: float) -> torch.Tensor:
        if not self._is_checked:
            self._is_checked = check_gradients(
                self._phase, [s.name for s in self._shards], [s.sharded for s in self._shards]
            )
        for shard in self._shards:
            shard.local.grad = None if shard.sharded.grad is None else shard.sharded.grad.to_local()
            shard.sharded.grad = None
        for parameter in self._idle:
            parameter.grad = None
        for shard in self._shared:
            gradient: torch.Tensor = shard.local.grad  # type: ignore[assignment]
            summed = gradient.to(self._device)  # offloaded ones lie where NCCL cannot reach them
            dist.all_reduce(summed, group=self._tensor_group)
            gradient.copy_(summed)
        norm = update(self.optimizer, self._locals, learning_rate, self._max_norm, self._norm_of, self.scale)
        return norm.to(self._device)


def _norm(counting: Sequence[nn.Parameter], device: torch.device, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Of the gradients on all workers: each number is counted by the one that writes it, who has it in `counting`."""
    del gradients
    counted = [p.grad for p in counting if p.grad is not None and p.grad.numel()]
    square = torch.zeros((), device=device)
    if counted:
        square = torch.stack(torch._foreach_norm(counted)).square().sum().to(device)
    dist.all_reduce(square)
    return square.sqrt()


def sharded_modules(roots: Sequence[nn.Module]) -> Iterator[FSDPModule]:
    for root in roots:
        for module in root.modules():
            if isinstance(module, FSDPModule):
                yield module


def reshard(modules: Sequence[FSDPModule]) -> None:
    """Forget the gathered weights: what is computed next gathers them as they are then."""
    for module in modules:
        module.reshard()


def state_of(
    task: Task, shards: Mapping[int, Shard], engines: Mapping[str, ShardedEngine], is_first: bool
) -> list[Piece]:
    """The pieces this worker holds: its shards, and what all hold alike, written by the first."""
    state: list[Piece] = []
    names: set[int] = set()
    for part, module in task.parts.items():
        for key, tensor in module.state_dict(keep_vars=True).items():
            if id(tensor) in names:
                continue
            names.add(id(tensor))
            if isinstance(tensor, DTensor):
                state += _held(shards[id(tensor)], f"model.{part}.{key}", shards[id(tensor)].local)
            else:
                state.append(whole(f"model.{part}.{key}", tensor, is_first))
    held = {id(shard.local): shard for shard in shards.values()}
    for phase, engine in engines.items():
        initialise(engine.optimizer)
        for parameter, values in engine.optimizer.state.items():
            shard = held[id(parameter)]
            for key, value in values.items():
                name = f"optimizer.{phase}.{shard.name}.{key}"
                if not isinstance(value, torch.Tensor):
                    continue
                if value.shape == shard.local.shape:
                    state += _held(shard, name, value)
                else:
                    state.append(whole(name, value, is_first))
        if engine.scale is not None:
            state.append(engine.scale.piece(phase, is_first))
    return state


def _held(shard: Shard, name: str, tensor: torch.Tensor) -> list[Piece]:
    """Nothing where the tensor has fewer rows than there are workers to cut it for."""
    return [shard.piece(name, tensor)] if tensor.numel() else []


def with_gathered_roots(
    task: Task, sample: Callable[..., object], autocast: AbstractContextManager[object]
) -> Callable[..., object]:
    """`sample`, which may call any method of a part: what a part holds outside of its blocks is gathered for it.

    Blocks gather themselves when they are called; those gathered in a low format compute under `autocast`.
    """
    roots = [part for part in task.parts.values() if isinstance(part, FSDPModule)]

    @functools.wraps(sample)
    def gathered(*args: object, **words: object) -> object:
        for root in roots:
            root.unshard()
        try:
            with autocast:
                return sample(*args, **words)
        finally:
            reshard(list(sharded_modules(roots)))  # type: ignore[arg-type]

    return gathered
