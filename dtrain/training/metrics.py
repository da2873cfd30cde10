"""What training measures: gathered on the device, read by the host once every few steps."""

import time

import torch
import torch.distributed as dist


class StepMetrics:
    """Means over the steps since the last reading. `add` never waits for the device."""

    def __init__(self, device: torch.device, samples_per_step: int, tokens_per_step: int) -> None:
        self._loss = torch.zeros((), dtype=torch.float32, device=device)
        self._norm: torch.Tensor | None = None
        self._num_losses = 0
        self._num_steps = 0
        self._samples_per_step = samples_per_step
        self._tokens_per_step = tokens_per_step
        self._since = time.monotonic()

    def add(self, loss: torch.Tensor) -> None:
        self._loss += loss.detach()
        self._num_losses += 1

    def end_step(self, norm: torch.Tensor) -> None:
        self._norm = norm
        self._num_steps += 1

    def read(self) -> dict[str, float]:
        """Mean loss over all workers, last gradient norm, and speed; starts the next interval. Waits for the device."""
        values = torch.stack([self._loss / max(1, self._num_losses), _scalar(self._norm, self._loss)])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(values[:1])
            values[0] /= dist.get_world_size()
        loss, norm = values.tolist()
        now = time.monotonic()
        steps_per_s = self._num_steps / max(1e-9, now - self._since)
        result = {
            "loss": loss,
            "grad_norm": norm,
            "steps_per_s": round(steps_per_s, 4),
            "samples_per_s": round(steps_per_s * self._samples_per_step, 2),
            "tokens_per_s": round(steps_per_s * self._tokens_per_step, 1),
        }
        self._loss.zero_()
        self._num_losses = self._num_steps = 0
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
