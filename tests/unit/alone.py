"""Trains a job file in this process: the loop, the data and the strategy that a worker runs, without the worker."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtrain import component
from dtrain.machine import Machine
from dtrain.planning import make_plan
from dtrain.settings import convert
from dtrain.spec.cluster import ClusterSpec
from dtrain.spec.load import load_job
from dtrain.training import loop
from dtrain.training.averaging import Average
from dtrain.training.optim import build_optimizer

JOBS = Path(__file__).parents[2] / "jobs"
ONE_CORE = Machine(num_cores=1, memory_gib=8.0)


class Keeper:
    """Lets training run to its end, and remembers what was reported and shown."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.pictures: np.ndarray | None = None
        self.averaged: Any = None

    def beat(self, step: int, micro: int, place: int) -> None: ...

    def begin_step(self, step: int) -> None: ...

    def end_step(self, step: int) -> bool:
        return False

    def commit(self, step: int, held_out: Mapping[str, float] | None) -> None: ...

    def wants_checkpoint(self, step: int) -> bool:
        return False

    def end_at(self, step: int) -> None: ...

    def show(self, step: int, pictures: np.ndarray) -> None:
        self.pictures = pictures

    def report(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.reports.append({"step": step, **metrics})


def train(job: str, cache: Path, *overrides: str) -> tuple[loop.Training, Keeper, dict[str, float]]:
    """Train `jobs/<job>.yaml` to its end; returns what was trained, its reports, and the last held-out metrics.

    The networks are left in evaluation mode, with the average of their weights where one was kept.
    """
    cluster = convert({"name": "local", "backend": {"name": "local"}, "storage": str(cache)}, ClusterSpec)
    plan = make_plan(load_job(JOBS / f"{job}.yaml", list(overrides)), cluster, ONE_CORE)
    data, model, strategy = (
        component.load(folder, chosen.name)
        for folder, chosen in (("data", plan.data), ("models", plan.model), ("strategies", plan.strategy))
    )
    device = torch.device("cpu")
    task = model.build(plan.model, data.describe(plan.data), plan.train)
    prepared = strategy.prepare(task, plan, device, functools.partial(build_optimizer, plan.optimizer))
    average = Average(prepared, plan.train.ema) if plan.train.ema else None
    source = data.open(plan.data, cache)
    training = loop.Training(plan, task, prepared, source, loop.Place(0, 1, device), average)
    keeper = Keeper()
    outcome = loop.train(training, 0, keeper)
    if average is not None:
        keeper.averaged = average.in_place()  # for good: the weights go back when nobody holds this any more
        keeper.averaged.__enter__()
    for part in task.parts.values():
        part.eval()
    return training, keeper, outcome["metrics"]
