"""Measuring on held-out data: sums over all workers, never means of means."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from dtrain.data.order import draws
from dtrain.models import Task
from dtrain.training.loading import Wanted


def evaluate(
    task: Task,
    parts: Mapping[str, nn.Module],
    read: Callable[[Iterable[Wanted]], Iterator[dict[str, torch.Tensor]]],
    num_samples: int,
    batch_size: int,
    reader: int,
    num_readers: int,
    beat: Callable[[int], None],
    is_counted: bool = True,
) -> dict[str, float]:
    """Metrics over the first `num_samples` held-out samples, each seen by exactly one reader.

    `read` gives the held-out batches of samples (indices and draws). Of the workers that read the same samples one
    `is_counted`. Deterministic for a given number of readers; every worker returns the same figures.
    """
    for part in parts.values():
        part.eval()
    totals: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        chosen, asked = itertools.tee(_batches(num_samples, batch_size, reader, num_readers))
        batches = read((indices, draws(0, indices.astype(np.uint64))) for indices, _ in asked)
        for number, (_, counts) in enumerate(chosen):
            beat(number)
            samples = next(batches)
            # Workers add up on the device, wherever a task has counted.
            device = next(iter(samples.values())).device
            for name, value in task.evaluate(parts, samples).items():
                # A zero of every name: workers that count nothing must know the names too.
                before = totals.setdefault(name, torch.zeros((), dtype=torch.float64, device=device))
                if counts and is_counted:
                    before += value.double().reshape(())
    for part in parts.values():
        part.train()
    if dist.is_initialized():
        totals = _add_up(totals)
    return task.finish_evaluation({name: float(value) for name, value in totals.items()})


def _batches(num_samples: int, batch_size: int, reader: int, num_readers: int) -> Iterator[tuple[np.ndarray, bool]]:
    """(indices, whether they count): as many batches for every reader, since a sharded model computes together.

    A reader that has run out of samples of its own reads the first one again, and does not count it.
    """
    most = -(-num_samples // num_readers)
    mine = np.arange(reader, num_samples, num_readers, dtype=np.int64)
    for start in range(0, most, batch_size):
        share = mine[start : start + batch_size]
        yield (share, True) if share.size else (np.zeros(1, dtype=np.int64), False)


def _add_up(totals: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sum over workers, which all know the same names."""
    names = sorted(totals)
    values = torch.stack([totals[name] for name in names])
    dist.all_reduce(values)
    return dict(zip(names, values, strict=True))
