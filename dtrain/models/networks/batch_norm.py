"""Batch normalization over the micro batches of all workers together, on any device.

torch's own `SyncBatchNorm` runs on accelerators only. Sums are taken in two passes, mean first, so that nothing is
lost to cancellation and the result is that of one worker with the whole micro batch up to rounding.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class SynchronisedBatchNorm(_BatchNorm):
    """Takes the place of `nn.BatchNorm1d`, `2d` or `3d`; inputs [b, c, ...]. Gradients flow through all workers."""

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        num_workers = dist.get_world_size() if self.training and dist.is_initialized() else 1
        # torch's own takes weights in the format of its statistics only; ZeRO rounds weights, and not statistics.
        if num_workers == 1 and (not self.affine or self.weight.dtype == torch.float32):
            return super().forward(input)
        dims = [d for d in range(input.dim()) if d != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        values = input.float()
        if not self.training and self.running_mean is not None and self.running_var is not None:
            centred, variance = values - self.running_mean.view(shape), self.running_var
        else:
            count = values.numel() // values.shape[1] * num_workers
            total = _Sum.apply if num_workers > 1 else _alone
            mean = total(values.sum(dims)) / count
            centred = values - mean.view(shape)
            variance = total((centred * centred).sum(dims)) / count
            if self.training and self.track_running_stats and self.running_mean is not None:
                self._remember(mean.detach(), variance.detach(), count)
        made = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            made = made * self.weight.view(shape) + self.bias.view(shape)
        return made.to(input.dtype)

    def _remember(self, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)  # type: ignore[union-attr]
        self.running_var.lerp_(variance * (count / max(count - 1, 1)), share)  # type: ignore[union-attr]


def _alone(value: torch.Tensor) -> torch.Tensor:
    """The sum over one worker."""
    return value


class _Sum(torch.autograd.Function):
    """Sum over workers; what flows back is summed over them too."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 -- as torch calls it
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        total = slope.contiguous().clone()
        dist.all_reduce(total)
        return total


def synchronise(network: nn.Module) -> None:
    """Make every batch norm of `network` one over all workers, in place; names of weights and buffers stay."""
    for name, child in network.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, SynchronisedBatchNorm):
            made = SynchronisedBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            made.train(child.training)
            for key, value in [*child._parameters.items()]:
                made._parameters[key] = value
            for key, buffer in [*child._buffers.items()]:
                made._buffers[key] = buffer
            setattr(network, name, made)
        else:
            synchronise(child)
