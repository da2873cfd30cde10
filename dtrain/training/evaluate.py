"""Measuring on held-out data: sums over all workers, never means of means."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from dtrain.data import Dataset
from dtrain.data.order import draws
from dtrain.models import Task
from dtrain.training.feed import read


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
        for number, (indices, counts) in enumerate(
            _batches(min(num_samples, held_out.num_samples), batch_size, worker, num_workers)
        ):
            beat(number)
            samples = to_device(read(held_out, indices, draws(0, indices.astype(np.uint64))))
            for name, value in task.evaluate(parts, samples).items():
                # A zero of every name: workers that count nothing must know the names too.
                before = totals.setdefault(name, torch.zeros((), dtype=torch.float64, device=value.device))
                if counts:
                    before += value.double()
    for part in parts.values():
        part.train()
    if dist.is_initialized() and num_workers > 1:
        totals = _add_up(totals)
    return task.finish_evaluation({name: float(value) for name, value in totals.items()})


def _batches(num_samples: int, batch_size: int, worker: int, num_workers: int) -> Iterator[tuple[np.ndarray, bool]]:
    """(indices, whether they count): as many batches for every worker, since a sharded model computes together.

    A worker that has run out of samples of its own reads the first one again, and does not count it.
    """
    most = -(-num_samples // num_workers)
    mine = np.arange(worker, num_samples, num_workers, dtype=np.int64)
    for start in range(0, most, batch_size):
        share = mine[start : start + batch_size]
        yield (share, True) if share.size else (np.zeros(1, dtype=np.int64), False)


def _add_up(totals: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sum over workers, which all know the same names."""
    names = sorted(totals)
    values = torch.stack([totals[name] for name in names])
    dist.all_reduce(values)
    return dict(zip(names, values, strict=True))
