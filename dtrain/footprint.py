"""Whether what every worker must hold fits its memory: weights, gradients and optimizer state, by plain arithmetic.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020, section 3.
Activations come on top; what one micro batch may take of the rest is `dtrain.planning`'s to decide.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from dtrain import component
from dtrain.errors import InputError

if TYPE_CHECKING:
    from dtrain.models import ModelSize
    from dtrain.plan import Plan, Workers
    from dtrain.spec.job import JobSpec

TIGHT = 0.75
"""Above this share of a worker's memory little is left for activations, and a warning says so."""
OTHERS: tuple[dict[str, Any], ...] = (
    {"name": "fsdp"},
    {"name": "deepspeed", "stage": 3},
    {"name": "fsdp", "cpu_offload": True},
)
"""Strategies that hold less, the quickest first."""


@dataclass(frozen=True)
class Bytes:
    """What a worker holds on its device for each number of the model, shared out or not."""

    trained: float
    """Weight, gradient and optimizer state of a number that is trained."""
    frozen: float
    """Weight of one that is not."""
    average: float
    """Its place in the moving average, where there is one (`train.ema`)."""


def optimizer_bytes(job: "JobSpec | Plan") -> float:
    """fp32 state of the optimizer for each trained number: Adam's two moments, or SGD's momentum."""
    if job.optimizer.name == "adamw":
        return 8.0
    return 4.0 if job.optimizer.momentum else 0.0


def replicated(job: "JobSpec") -> Bytes:
    """Every worker holds it all: fp32 weight and gradient, and the optimizer's state. With Adam 16 bytes a number."""
    return Bytes(trained=8.0 + optimizer_bytes(job), frozen=4.0, average=4.0)


def bytes_of(job: "JobSpec", workers: "Workers", accumulation: int = 1) -> Bytes:
    """What the job's strategy holds of each number on one worker; a strategy that does not say holds it all."""
    module: Any = component.load("strategies", job.strategy.name)
    if not hasattr(module, "bytes_per_number"):
        return replicated(job)
    held: Bytes = module.bytes_per_number(job.strategy, job, workers, accumulation)
    return held


def state_gib(job: "JobSpec", workers: "Workers", size: "ModelSize", accumulation: int = 1) -> float:
    """What a worker must hold on its device all the time, in GiB; 0 where only building the model can tell."""
    held = bytes_of(job, workers, accumulation)
    average = held.average if job.train.ema else 0.0
    numbers = size.num_parameters * held.trained + size.num_frozen * held.frozen
    return (numbers + (size.num_parameters + size.num_frozen) * average) / 2**30


def check(job: "JobSpec", workers: "Workers", size: "ModelSize", accumulation: int, memory_gib: float) -> list[str]:
    """Warnings for a worker with `memory_gib`; silent where only building the model can tell its size.

    Raises `InputError`, naming a strategy that fits, when weights, gradients and optimizer state alone do not.
    """
    needed = state_gib(job, workers, size, accumulation)
    numbers = size.num_parameters + size.num_frozen
    if needed <= TIGHT * memory_gib:
        return []
    what = (
        f"weights, gradients and optimizer state of {numbers / 1e9:.1f} billion parameters take {needed:.0f} GiB of"
        f" each worker's {memory_gib:.0f} under strategy {job.strategy.name}"
    )
    if needed > memory_gib:
        raise InputError(f"{what}; {_advice(job, workers, size, needed, accumulation, memory_gib)}")
    advice = _advice(job, workers, size, needed, accumulation, TIGHT * memory_gib)
    return [f"{what}, which leaves little for activations; {advice}"]


def _advice(
    job: "JobSpec", workers: "Workers", size: "ModelSize", held_gib: float, accumulation: int, memory_gib: float
) -> str:
    """The next move: the first other strategy with which a worker holds at most `memory_gib`."""
    for settings in OTHERS:
        options = component.with_name(settings["name"], component.load("strategies", settings["name"]).Options)
        other = replace(job, strategy=options(**settings))
        needed = state_gib(other, workers, size, accumulation)
        if needed <= memory_gib and needed < held_gib:
            words = ", ".join(f"{key}: {str(value).lower()}" for key, value in settings.items())
            return f"strategy: {{{words}}} takes {needed:.0f} GiB"
    whole = (size.num_parameters * (8.0 + optimizer_bytes(job)) + size.num_frozen * 4.0) / 2**30
    return f"share it among {math.ceil(whole / memory_gib)} workers or more, or train a smaller model"
