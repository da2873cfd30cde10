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
    spec: AdamW | SGD, named_parameters: "Iterable[tuple[str, nn.Parameter]]"
) -> "torch.optim.Optimizer":
    """The optimizer `spec` asks for, over the trainable ones of `named_parameters`, fused where torch has it.

    Two groups: matrices (two dimensions and more) are decayed, vectors and scalars (biases, norms) are not.
    """
    import torch

    parameters = [p for _, p in named_parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters)
    if isinstance(spec, AdamW):
        return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=fused)
    return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov, fused=fused)


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
