"""The one training loop. It knows a task's parts, phases and losses, and nothing else about what it trains."""

import contextlib
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dtrain.data import Source
from dtrain.data.order import Order
from dtrain.errors import TrainingError
from dtrain.models import Task
from dtrain.plan import Plan
from dtrain.strategies import Prepared
from dtrain.training.averaging import Average
from dtrain.training.evaluate import evaluate
from dtrain.training.feed import Feed
from dtrain.training.loading import Loaders
from dtrain.training.metrics import StepMetrics
from dtrain.training.optim import learning_rate
from dtrain.training.patience import Patience
from dtrain.training.seeds import sample_seed, seed_torch

if TYPE_CHECKING:
    import numpy as np

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

    def end_at(self, step: int) -> None:
        """Training ends after `step`, earlier than planned."""

    def show(self, step: int, pictures: "np.ndarray") -> None:
        """Pictures that the model made at `step`: uint8 [count, height, width, channels] (worker 0 shows them)."""

    def report(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Metrics to record (worker 0 records)."""


@dataclass(frozen=True)
class Place:
    """Which worker this is."""

    worker: int
    num_workers: int
    device: torch.device
    sharing: int = 1
    """Neighbouring workers that compute each of their samples together, and so read the same."""

    @property
    def reader(self) -> int:
        return self.worker // self.sharing

    @property
    def num_readers(self) -> int:
        """Workers, or groups of them, that read samples of their own."""
        return self.num_workers // self.sharing

    @property
    def counts(self) -> bool:
        """Whether what this worker measures is added up: of those that share their samples the first."""
        return self.worker % self.sharing == 0


@dataclass(frozen=True)
class Training:
    """All that a worker trains with."""

    plan: Plan
    task: Task
    prepared: Prepared
    source: Source
    place: Place
    average: Average | None = None
    patience: Patience | None = None
    loaders: Loaders | None = None


def train(training: Training, start: int, keeper: Keeper) -> dict[str, Any]:
    """Train from `start` steps done to the end, or until the keeper says leave.

    Returns the outcome: steps done, and at the end of the last step the metrics over all held-out data, the
    yardsticks and a sample. Raises `DivergedError` when the loss is not a number, `TrainingError` for a task whose
    loss or gradients cannot be trained with.
    """
    plan, task, prepared, place = training.plan, training.task, training.prepared, training.place
    batch, options, every = plan.batch, plan.train, plan.evaluate.every_steps or plan.train.steps
    accumulation, scale = batch.accumulation, 1.0 / batch.accumulation
    metrics = StepMetrics(
        place.device, [phase.name for phase in task.phases], batch.global_size, plan.arithmetic.tokens_per_step
    )
    autocast = precision_of(plan, place.device)
    order = Order(
        seed=options.seed,
        num_samples=training.source.train.num_samples,
        global_size=batch.global_size,
        micro=batch.micro,
        accumulation=accumulation,
        num_workers=place.num_readers,
        worker=place.reader,
    )
    feed = Feed(training.source, order, place.device, training.loaders, passes=len(task.phases))
    measure = functools.partial(_measure, training, feed, autocast, keeper)
    end = functools.partial(_end, training, keeper)
    step, leave, is_new = start, False, True
    if training.patience is not None and 0 < start < options.steps and start % every == 0:
        # What ended the attempt before may have come between this evaluation and its being remembered.
        _consider(training.patience, start, measure(start, plan.evaluate.samples))
    last = end()
    if step == last:
        keeper.end_step(step)  # an attempt that begins at the end has the last evaluation left to do
    while step < last and not leave:
        keeper.begin_step(step + 1)
        rate = learning_rate(plan.schedule, plan.optimizer.lr, step, options.steps)  # type: ignore[union-attr]
        for phase in task.phases:
            engine = prepared.engines[phase.name]
            for micro in range(accumulation):
                keeper.beat(step, micro, DATA)
                samples = feed.micro_batch(step, micro)
                keeper.beat(step, micro, FORWARD)
                seed_torch(sample_seed(options.seed, step, micro, place.reader))
                engine.begin(micro + 1 == accumulation)
                with autocast:
                    loss = task.loss(phase.name, engine.parts, samples)
                if is_new:
                    _check_loss(task, phase.name, loss)
                keeper.beat(step, micro, BACKWARD)
                engine.backward(loss * scale if accumulation > 1 else loss)
                metrics.add(phase.name, loss)
            keeper.beat(step, accumulation, UPDATE)
            norm = engine.step(rate)
        step, is_new = step + 1, False
        if training.average is not None:
            training.average.update(step)
        metrics.end_step(norm)
        leave = keeper.end_step(step)
        if step % options.log_every_steps == 0 or step == last or leave or keeper.wants_checkpoint(step):
            values = metrics.read()
            if not math.isfinite(values["loss"]):
                raise DivergedError(
                    f"the loss is {values['loss']} after step {step}; lower optimizer.lr (now {plan.optimizer.lr}),"  # type: ignore[union-attr]
                    " raise schedule.warmup_steps, or look at the data"
                )
            keeper.report(step, {"learning_rate": rate, **values})
        if step == last:
            break
        if step % every == 0:
            paused = metrics.pause()
            held_out = measure(step, plan.evaluate.samples)
            keeper.commit(step, held_out)
            if task.shows_progress:
                _made(training, step, keeper)
            if training.patience is not None:
                _consider(training.patience, step, held_out)
                last = end()
            metrics.resume(paused)
        else:
            keeper.commit(step, None)
    if step < last:
        return {"steps": step}
    held_out = measure(step, training.source.held_out.num_samples)
    keeper.commit(step, held_out)
    keeper.beat(step, 0, END)
    return {"steps": step, "metrics": held_out, **_showpiece(training, step, keeper)}


def precision_of(plan: Plan, device: torch.device) -> torch.autocast:
    """In what format forward passes compute."""
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(plan.train.precision)
    return torch.autocast(device.type, low or torch.bfloat16, enabled=low is not None)


def _consider(patience: Patience, step: int, held_out: Mapping[str, float]) -> None:
    patience.consider(step, held_out["loss"])


def _end(training: Training, keeper: Keeper) -> int:
    """The step after which training ends, as far as is known."""
    last = training.plan.train.steps
    if training.patience is not None and training.patience.last_step < last:
        last = int(training.patience.last_step)
        keeper.end_at(last)
    return last


def _check_loss(task: Task, phase: str, loss: Any) -> None:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        given = (
            f"a tensor of shape {list(loss.shape)}{'' if loss.requires_grad else ' without a gradient'}"
            if isinstance(loss, torch.Tensor)
            else f"a {type(loss).__name__}"
        )
        raise TrainingError(
            f"{type(task).__name__}.loss gave {given} in phase {phase!r}; it must give a scalar tensor with a gradient,"
            " the mean over the micro batch"
        )


def _measure(
    training: Training, feed: Feed, autocast: torch.autocast, keeper: Keeper, step: int, num_samples: int
) -> dict[str, float]:
    """Evaluate in the precision of training, with the average of the weights where there is one, and report it."""
    place = training.place
    averaged = training.average.in_place() if training.average is not None else contextlib.nullcontext()
    with averaged, autocast:
        held_out = evaluate(
            training.task,
            training.prepared.evaluation_parts,
            feed.held_out,
            min(num_samples, training.source.held_out.num_samples),
            training.plan.batch.micro,
            place.reader,
            place.num_readers,
            functools.partial(_beat_evaluating, keeper, step),
            place.counts,
        )
    keeper.report(step, {"held_out": held_out})
    return held_out


def _beat_evaluating(keeper: Keeper, step: int, number: int) -> None:
    keeper.beat(step, number, EVALUATE)


def _showpiece(training: Training, step: int, keeper: Keeper) -> dict[str, Any]:
    """What a person wants to see at the end: yardsticks to hold the metrics against, and a sample."""
    text = _made(training, step, keeper)
    return {"yardsticks": training.source.yardsticks(), "sample": text} if training.place.worker == 0 else {}


def _made(training: Training, step: int, keeper: Keeper) -> str | None:
    """Let the task make its sample, and show it if it is one to look at; text is returned."""
    if training.prepared.is_replicated and training.place.worker != 0:
        return None
    from dtrain.training.sample import showpiece

    averaged = training.average.in_place() if training.average is not None else contextlib.nullcontext()
    with averaged:
        made = showpiece(training.task, training.source, training.plan.train.seed)
    if made is not None and made.pictures is not None:
        keeper.show(step, made.pictures)
    return (made.text or None) if made is not None else None
