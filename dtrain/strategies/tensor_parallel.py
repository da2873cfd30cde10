"""Splits linear layers over the workers of a tensor group, as a task's `tensor_parallel` says, through torch's DTensor.

Source: Shoeybi et al., "Megatron-LM", 2019. What goes into a column and comes out of a row is whole on every worker of
the group; in between each has a slice.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from dtrain.errors import InputError
from dtrain.models import Task

COLUMN, ROW, SHARED = "column", "row", "shared"


def split(task: Task, mesh: DeviceMesh) -> list[str]:
    """Split the layers of `task` over `mesh` (one dimension); names of the parameters that are shared.

    A shared parameter is whole on every worker, which uses it on a slice: its gradient is the sum over the group.
    Raises `InputError` for a task that does not say how it is split, or a layer that does not come out even.
    """
    patterns = task.tensor_parallel()
    shared: list[str] = []
    found = 0
    for part, module in task.parts.items():
        styles: dict[str, ParallelStyle] = {}
        for name, child in module.named_modules():
            how = _kind(patterns, f"{part}.{name}")
            if how == SHARED:
                shared += [f"{part}.{name}.{key}" for key, _ in child.named_parameters()]
            elif how is not None:
                _check(child, f"{part}.{name}", how, mesh.size())
                styles[name] = ColwiseParallel() if how == COLUMN else RowwiseParallel()
        found += len(styles)
        if styles:
            # Every worker has made the same weights: each takes its slice of its own, and nothing is sent.
            parallelize_module(module, mesh, styles, src_data_rank=None)
    if not found:
        raise InputError(
            f"strategy.tensor_parallel: {type(task).__name__} does not say how its layers are split"
            " (Task.tensor_parallel); use tensor_parallel: 1, which shards the weights over all workers"
        )
    return shared


def _kind(patterns: Mapping[str, str], name: str) -> str | None:
    return next((how for pattern, how in patterns.items() if fnmatchcase(name, pattern)), None)


def _check(module: nn.Module, name: str, how: str, size: int) -> None:
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    cut = weight.shape[0 if how == COLUMN else 1]
    if cut % size:
        raise InputError(
            f"strategy.tensor_parallel {size} does not divide the {cut} {'outputs' if how == COLUMN else 'inputs'} of"
            f" {name}; choose another width, or another tensor_parallel"
        )
