"""Optimizers from a job's words, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from dtrain.spec.job import SGD, AdamW, Schedule

if TYPE_CHECKING:
    import torch
    from torch import nn

FUSED_DEVICES = ("cpu", "cuda", "mps")
"""Devices on which torch updates all parameters in one kernel."""


def build_optimizer(
    spec: AdamW | SGD, parameters: "Iterable[tuple[str, nn.Parameter, float]]"
) -> "torch.optim.Optimizer":
    """The optimizer `spec` asks for, over (name, parameter, share of the learning rate), fused where torch has it.

    Matrices (two dimensions and more) are decayed, vectors and scalars (biases, norms) are not. Each group carries
    its `lr_share`.
    """
    import torch

    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for _, parameter, share in parameters:
        decay = spec.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((decay, share), []).append(parameter)
    every = [p for group in groups.values() for p in group]
    fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in every)
    described = [
        {"params": group, "weight_decay": decay, "lr": spec.lr * share, "lr_share": share}
        for (decay, share), group in groups.items()
    ]
    if isinstance(spec, AdamW):
        return torch.optim.AdamW(described, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=fused)
    return torch.optim.SGD(described, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov, fused=fused)


def learning_rate(schedule: Schedule, optimizer_lr: float, step: int, total_steps: int) -> float:
    """The rate of `step` (0 is the first) of `total_steps`, for a peak of `optimizer_lr`.

    Warm-up rises in a line and reaches the peak in its last step; the last step of all has `schedule.final` of the
    peak, except under `constant`. Sources: cosine, Loshchilov and Hutter, "SGDR", 2017 (one cycle); linear, Defazio
    et al., "Optimal linear decay learning rate schedules", 2023; wsd, Hu et al., "MiniCPM", 2024, with the
    1 - sqrt decay of Hägele et al., "Scaling laws and compute-optimal training beyond fixed training durations", 2024.
    """
    if step < schedule.warmup_steps:
        return optimizer_lr * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return optimizer_lr
    after_warmup = max(total_steps - schedule.warmup_steps, 1)
    decay = after_warmup
    if schedule.name == "wsd":
        decay = min(schedule.decay_steps or max(total_steps // 5, 1), after_warmup)
    done = min(max(step + 1 - (total_steps - decay), 0) / decay, 1.0)
    if schedule.name == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    elif schedule.name == "linear":
        left = 1 - done
    else:
        left = 1 - math.sqrt(done)
    return optimizer_lr * (schedule.final + (1 - schedule.final) * left)
