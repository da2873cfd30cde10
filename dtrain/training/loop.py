"""The one training loop. It knows a task's parts, phases and losses, and nothing else about what it trains."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from dtrain.data import Source
from dtrain.data.order import step_indices
from dtrain.errors import TrainingError
from dtrain.models import Task
from dtrain.plan import Plan
from dtrain.strategies import Prepared
from dtrain.training.evaluate import evaluate
from dtrain.training.metrics import StepMetrics
from dtrain.training.optim import learning_rate
from dtrain.training.seeds import sample_seed, seed_torch

STARTING, DATA, FORWARD, BACKWARD, UPDATE, SNAPSHOT, EVALUATE, END = range(8)
"""Places in a step; a watchdog names them to people."""


class DivergedError(TrainingError):
    """The loss is NaN or infinite."""

    kind = "diverged"


class Keeper(Protocol):
    """Who looks after the loop: told where it is, asked whether to go on."""

    def beat(self, step: int, micro: int, place: int) -> None:
        """A sign of life: `step` steps are done, and this is where the next one is."""

    def begin_step(self, step: int) -> None:
        """Before step number `step` (counted from 1)."""

    def end_step(self, step: int) -> bool:
        """Step `step` is done and its state may be copied; True when the loop must leave now."""

    def commit(self, step: int, held_out: Mapping[str, float] | None) -> None:
        """What was measured at `step` is known: a checkpoint that waits for it may be written."""

    def wants_checkpoint(self, step: int) -> bool:
        """Whether a checkpoint is written after `step`."""

    def report(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Metrics to record (worker 0 records)."""


@dataclass(frozen=True)
class Place:
    """Which worker this is."""

    worker: int
    num_workers: int
    device: torch.device


def train(
    plan: Plan, task: Task, prepared: Prepared, source: Source, place: Place, start: int, keeper: Keeper
) -> dict[str, Any]:
    """Train from `start` steps done to the end, or until the keeper says leave.

    Returns the outcome: steps done, and at the end of the last step the metrics over all held-out data, the
    yardsticks and a sample. Raises `DivergedError` when the loss is not a number.
    """
    batch, train, every = plan.batch, plan.train, plan.evaluate.every_steps or plan.train.steps
    accumulation, scale = batch.accumulation, 1.0 / batch.accumulation
    metrics = StepMetrics(place.device, batch.global_size, plan.arithmetic.tokens_per_step)
    autocast = torch.autocast(place.device.type, torch.bfloat16, enabled=train.precision == "bf16")
    to_device = _Mover(place.device)
    measure = functools.partial(_measure, plan, task, prepared, source, place, to_device, autocast, keeper)
    step, leave = start, False
    if step == train.steps:
        keeper.end_step(step)  # an attempt that begins at the end has the last evaluation left to do
    while step < train.steps and not leave:
        keeper.begin_step(step + 1)
        rate = learning_rate(plan.schedule, plan.optimizer.lr, step, train.steps)  # type: ignore[union-attr]
        indices = step_indices(
            step,
            seed=train.seed,
            num_samples=source.train.num_samples,
            global_size=batch.global_size,
            micro=batch.micro,
            accumulation=accumulation,
            num_workers=place.num_workers,
            worker=place.worker,
        )
        for phase in task.phases:
            engine = prepared.engines[phase.name]
            for micro in range(accumulation):
                keeper.beat(step, micro, DATA)
                samples = to_device(source.train.batch(indices[micro]))
                keeper.beat(step, micro, FORWARD)
                seed_torch(sample_seed(train.seed, step, micro, place.worker))
                engine.begin(micro + 1 == accumulation)
                with autocast:
                    loss = task.loss(phase.name, prepared.parts, samples)
                keeper.beat(step, micro, BACKWARD)
                engine.backward(loss * scale if accumulation > 1 else loss)
                metrics.add(loss)
            keeper.beat(step, accumulation, UPDATE)
            norm = engine.step(rate)
        step += 1
        metrics.end_step(norm)
        leave = keeper.end_step(step)
        if step % train.log_every_steps == 0 or step == train.steps or leave or keeper.wants_checkpoint(step):
            values = metrics.read()
            if not math.isfinite(values["loss"]):
                raise DivergedError(
                    f"the loss is {values['loss']} after step {step}; lower optimizer.lr (now {plan.optimizer.lr}),"  # type: ignore[union-attr]
                    " raise schedule.warmup_steps, or look at the data"
                )
            keeper.report(step, {"learning_rate": rate, **values})
        if step == train.steps:
            break
        if step % every == 0:
            paused = metrics.pause()
            keeper.commit(step, measure(step, plan.evaluate.samples))
            metrics.resume(paused)
        else:
            keeper.commit(step, None)
    if step < train.steps:
        return {"steps": step}
    held_out = measure(step, source.held_out.num_samples)
    keeper.commit(step, held_out)
    keeper.beat(step, 0, END)
    return {"steps": step, "metrics": held_out, **_showpiece(plan, task, source, place)}


def _measure(
    plan: Plan,
    task: Task,
    prepared: Prepared,
    source: Source,
    place: Place,
    to_device: "_Mover",
    autocast: torch.autocast,
    keeper: Keeper,
    step: int,
    num_samples: int,
) -> dict[str, float]:
    """Evaluate in the precision of training, and report it."""
    with autocast:
        held_out = evaluate(
            task,
            prepared.evaluation_parts,
            source.held_out,
            num_samples,
            plan.batch.micro,
            place.worker,
            place.num_workers,
            to_device,
            functools.partial(_beat_evaluating, keeper, step),
        )
    keeper.report(step, {"held_out": held_out})
    return held_out


def _beat_evaluating(keeper: Keeper, step: int, number: int) -> None:
    keeper.beat(step, number, EVALUATE)


def _showpiece(plan: Plan, task: Task, source: Source, place: Place) -> dict[str, Any]:
    """What a person wants to see at the end: yardsticks to hold the metrics against, and a sample."""
    if place.worker != 0:
        return {}
    from dtrain.training.sample import showpiece

    return {"yardsticks": source.yardsticks(), "sample": showpiece(task, source, plan.train.seed)}


class _Mover:
    """Arrays to tensors on the device; on GPUs through pinned memory, so that the copy overlaps with computing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self._device.type == "cpu":
            return tensors
        return {name: t.pin_memory().to(self._device, non_blocking=True) for name, t in tensors.items()}
