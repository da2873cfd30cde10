"""What a worker holds of a training state that DeepSpeed's ZeRO has cut into flat runs, as live pieces.

Stages 1 and 2 lay the parameters of a group end to end and give each worker an equal stretch of that line; stage 3
gives each worker an equal stretch of every parameter. Either way a worker's master weights (fp32) and the optimizer's
numbers beside them are stretches of parameters, row by row, which `dtrain.checkpoint.pieces` turns into rectangles.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dtrain.checkpoint.pieces import Piece, of_range, whole
from dtrain.strategies import engine


@dataclass(frozen=True)
class Run:
    """A stretch of a parameter whose master weights this worker updates."""

    parameter: nn.Parameter
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """Of the stretch in the parameter, counted in numbers, row by row."""
    flat: torch.Tensor
    """The master weights it lies in, with others: what the optimizer updates."""
    at: int
    """Of the stretch in `flat`."""
    count: int
    """Numbers in it; 0 where other workers hold all of the parameter."""

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The stretch in `values`, which lie as `flat` does."""
        return values.detach()[self.at : self.at + self.count]


def runs(zero: Any) -> list[Run]:
    """What this worker holds of each parameter that the ZeRO optimizer `zero` trains, in the optimizer's order."""
    if hasattr(zero, "fp16_groups"):
        return [
            run
            for args in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
            for run in _each(*args)
        ]
    if hasattr(zero, "bf16_groups"):
        parameters = zero.bf16_groups
        flats = zero.fp32_groups_flat_partition
    else:
        parameters = zero.round_robin_bit16_groups
        flats = zero.single_partition_of_fp32_groups
    return [run for args in zip(parameters, flats, strict=True) for run in _line(*args)]


def _line(parameters: list[nn.Parameter], flat: torch.Tensor) -> Iterator[Run]:
    """Stages 1 and 2: this worker's stretch of all parameters laid end to end."""
    begin = dist.get_rank() * flat.numel()
    position = 0
    for parameter in parameters:
        number = parameter.numel()
        low = min(max(begin - position, 0), number)
        high = min(max(begin + flat.numel() - position, 0), number)
        yield Run(parameter, tuple(parameter.shape), low, flat, position + low - begin if high > low else 0, high - low)
        position += number


def _each(parameters: list[nn.Parameter], flat: torch.Tensor) -> Iterator[Run]:
    """Stage 3: this worker's stretch of each parameter, padded to the size that every worker's has."""
    position = 0
    for parameter in parameters:
        partition: int = parameter.partition_numel()  # type: ignore[operator]
        start = min(dist.get_rank() * partition, parameter.ds_numel)
        yield Run(
            parameter, tuple(parameter.ds_shape), start, flat, position, min(partition, parameter.ds_numel - start)
        )
        position += partition


def initialise(optimizer: torch.optim.Optimizer, held: list[Run], groups: Mapping[int, int]) -> None:
    """Make the optimizer's numbers exist before the first step; `groups` tells the group of a parameter, by id.

    DeepSpeed keeps gradients beside the master weights in some set-ups, and in others hands the optimizer its
    parameters in the middle of a step only: both are as before afterwards.
    """
    flats = {id(run.flat): run.flat for run in held}
    before = [(group, group["params"]) for group in optimizer.param_groups]
    gradients = [(flat, flat.grad) for flat in flats.values()]
    group_of = {id(run.flat): groups[id(run.parameter)] for run in held}
    for number, (group, _) in enumerate(before):
        group["params"] = [flat for key, flat in flats.items() if group_of[key] == number]
    engine.initialise(optimizer)
    for group, parameters in before:
        group["params"] = parameters
    for flat, gradient in gradients:
        flat.grad = gradient


@torch.no_grad()
def fill(held: list[Run], exact: Mapping[int, torch.Tensor]) -> None:
    """Set master weights to the numbers of `exact`, whole tensors by the id of their parameter."""
    for run in held:
        values = exact[id(run.parameter)].reshape(-1)[run.start : run.start + run.count]
        run.of(run.flat).copy_(values)


@torch.no_grad()
def publish(zero: Any) -> None:
    """Bring the master weights into the networks of all workers."""
    if not hasattr(zero, "fp16_groups"):
        zero.update_lp_params()
        return
    zero.parameter_offload.partition_all_parameters()
    for number in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(number)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def pieces(
    parts: Mapping[str, nn.Module],
    held: Mapping[str, list[Run]],
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> list[Piece]:
    """Live pieces under the names that `dtrain.strategies.engine.training_state` gives whole tensors.

    `held` and `optimizers` are by phase. What no phase trains is as the networks hold it: buffers, and frozen
    parameters in the format they compute in.
    """
    is_first = dist.get_rank() == 0
    trained = {id(run.parameter): run for all_runs in held.values() for run in all_runs}
    names: dict[int, str] = {}
    state: list[Piece] = []
    for part, module in parts.items():
        for key, tensor in module.state_dict(keep_vars=True).items():
            if id(tensor) in names:
                continue
            name = names[id(tensor)] = f"{part}.{key}"
            if id(tensor) in trained:
                run = trained[id(tensor)]
                state += of_range(f"model.{name}", run.of(run.flat), run.shape, run.start)
            elif hasattr(tensor, "ds_tensor"):
                start = min(dist.get_rank() * tensor.partition_numel(), tensor.ds_numel)
                own = tensor.ds_tensor.detach()[: min(tensor.partition_numel(), tensor.ds_numel - start)]
                state += of_range(f"model.{name}", own, tuple(tensor.ds_shape), start)
            else:
                state.append(whole(f"model.{name}", tensor, is_primary=is_first))
    for phase, all_runs in held.items():
        for run in all_runs:
            for key, values in optimizers[phase].state[run.flat].items():
                if not isinstance(values, torch.Tensor):
                    continue
                name = f"optimizer.{phase}.{names[id(run.parameter)]}.{key}"
                if values.shape == run.flat.shape:
                    state += of_range(name, run.of(values), run.shape, run.start)
                else:  # one number for all that lies in `flat`
                    state.append(whole(name, values, is_primary=is_first))
    return state
