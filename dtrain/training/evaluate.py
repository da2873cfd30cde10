"""Measuring on held-out data: sums over all workers, never means of means."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from dtrain.data import Dataset
from dtrain.models import Task


def evaluate(
    task: Task,
    parts: Mapping[str, nn.Module],
    held_out: Dataset,
    num_samples: int,
    batch_size: int,
    worker: int,
    num_workers: int,
    to_device: Callable[[dict[str, np.ndarray]], dict[str, torch.Tensor]],
    beat: Callable[[int], None],
) -> dict[str, float]:
    """Metrics over the first `num_samples` held-out samples, each seen by exactly one worker.

    Deterministic for a given number of workers; every worker returns the same figures.
    """
    for part in parts.values():
        part.eval()
    totals: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for number, indices in enumerate(
            _batches(min(num_samples, held_out.num_samples), batch_size, worker, num_workers)
        ):
            beat(number)
            for name, value in task.evaluate(parts, to_device(held_out.batch(indices))).items():
                totals[name] = (
                    totals.get(name, torch.zeros((), dtype=torch.float64, device=value.device)) + value.double()
                )
    for part in parts.values():
        part.train()
    if dist.is_initialized() and num_workers > 1:
        totals = _add_up(totals)
    return task.finish_evaluation({name: float(value) for name, value in totals.items()})


def _batches(num_samples: int, batch_size: int, worker: int, num_workers: int) -> Iterator[np.ndarray]:
    mine = np.arange(worker, num_samples, num_workers, dtype=np.int64)
    for start in range(0, len(mine), batch_size):
        yield mine[start : start + batch_size]


def _add_up(totals: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sum over workers; one that had no sample knows no names, so the names are agreed on first."""
    gathered: list[list[str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, sorted(totals))
    names = sorted({name for part in gathered if part for name in part})
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    values = torch.stack([totals.get(name, torch.zeros((), dtype=torch.float64)).to(device) for name in names])
    dist.all_reduce(values)
    return dict(zip(names, values, strict=True))
