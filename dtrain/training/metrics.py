"""What training measures: gathered on the device, read by the host once every few steps."""

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist


class StepMetrics:
    """Means over the steps since the last reading. `add` never waits for the device."""

    def __init__(
        self, device: torch.device, phases: Sequence[str], samples_per_step: int, tokens_per_step: int
    ) -> None:
        self._losses = {phase: torch.zeros((), dtype=torch.float32, device=device) for phase in phases}
        self._norm: torch.Tensor | None = None
        self._num_losses = dict.fromkeys(phases, 0)
        self._num_steps = 0
        self._samples_per_step = samples_per_step
        self._tokens_per_step = tokens_per_step
        self._since = time.monotonic()

    def add(self, phase: str, loss: torch.Tensor) -> None:
        self._losses[phase] += loss.detach().reshape(())
        self._num_losses[phase] += 1

    def end_step(self, norm: torch.Tensor) -> None:
        self._norm = norm
        self._num_steps += 1

    def read(self) -> dict[str, float]:
        """Mean loss over all workers, last gradient norm, and speed; starts the next interval. Waits for the device.

        Of a task with several phases `loss` is the sum over them, and `loss_<phase>` that of each.
        """
        means = [total / max(1, self._num_losses[phase]) for phase, total in self._losses.items()]
        values = torch.stack([*means, _scalar(self._norm, means[0])])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(values[:-1])
            values[:-1] /= dist.get_world_size()
        *losses, norm = values.tolist()
        now = time.monotonic()
        steps_per_s = self._num_steps / max(1e-9, now - self._since)
        result = {
            "loss": sum(losses),
            "grad_norm": norm,
            "steps_per_s": round(steps_per_s, 4),
            "samples_per_s": round(steps_per_s * self._samples_per_step, 2),
            "tokens_per_s": round(steps_per_s * self._tokens_per_step, 1),
        }
        if len(losses) > 1:
            result |= {f"loss_{phase}": loss for phase, loss in zip(self._losses, losses, strict=True)}
        for phase, total in self._losses.items():
            total.zero_()
            self._num_losses[phase] = 0
        self._num_steps = 0
        self._since = now
        return result

    def pause(self) -> float:
        """The clock before something that is not training."""
        return time.monotonic()

    def resume(self, paused_at: float) -> None:
        """Leave the time since `paused_at` out of the speed."""
        self._since += time.monotonic() - paused_at


def _scalar(value: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if value is None else value.detach().to(like.dtype).reshape(())
