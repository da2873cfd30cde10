"""The last layer of models that predict tokens, and its loss without the logits in memory."""

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from dtrain.models.networks.norm import lowered

IGNORED = -1
"""A target with this value is not predicted."""


class TokenHead(nn.Module):
    """A matrix [v, w] of which the first `vocabulary_size` rows stand for tokens.

    The loss is computed in here so that whoever shards the model sees its weight used by the module that holds it.
    """

    def __init__(self, width: int, padded: int, vocabulary_size: int) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.weight = nn.Parameter(torch.empty(padded, width))

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        smoothing: float = 0.0,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """For `hidden` [..., w] the logits [..., vocabulary], or with `targets` [...] the sum of cross-entropies.

        `weights` [...], zero where a target is `IGNORED`, say how much each of them counts.
        """
        if targets is None:
            return F.linear(hidden, self.weight)[..., : self.vocabulary_size]
        hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        weights = None if weights is None else weights.reshape(-1)
        return linear_cross_entropy(hidden, self.weight, targets, self.vocabulary_size, smoothing, weights)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocabulary_size: int,
    smoothing: float = 0.0,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of cross-entropies in nats of softmax(hidden @ weight.T) against `targets`, without keeping the logits.

    hidden [n, w], weight [v, w] of which the first `vocabulary_size` rows count, targets [n] (`IGNORED` ones add
    nothing), each counted by `weights` [n] where they are given. `smoothing` of each target is spread over the whole
    vocabulary (Szegedy et al., 2016). Gradients are made chunk by chunk in the forward pass (the idea of Hsu et al.,
    "Liger Kernel", 2024), so that memory does not grow with n x v; logits are in autocast's format, the softmax in
    fp32.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocabulary_size, smoothing, weights)


class _LinearCrossEntropy(torch.autograd.Function):
    # Logits of a chunk: about what the caches of a core hold, and half a gigabyte on a GPU.
    CPU_CHUNK, GPU_CHUNK = 2**20, 2**28

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        vocabulary_size: int,
        smoothing: float,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        n, v = hidden.shape[0], weight.shape[0]
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        low_hidden, low_weight = lowered(hidden), lowered(weight)
        chunk = _LinearCrossEntropy.CPU_CHUNK if hidden.device.type == "cpu" else _LinearCrossEntropy.GPU_CHUNK
        rows = max(min(chunk // v, n), 1)
        nats = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(low_hidden) if want_hidden else None
        grad_weight = torch.zeros_like(low_weight, dtype=torch.float32) if want_weight else None
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            counted = targets[part] != IGNORED if weights is None else weights[part]
            index = targets[part].clamp(min=0)[:, None]
            logits = F.linear(low_hidden[part], low_weight).float()
            if vocabulary_size < v:
                logits[:, vocabulary_size:] = -math.inf
            log_total = logits.logsumexp(dim=1)
            expected = logits.gather(1, index).squeeze(1)
            if smoothing:
                expected = expected.lerp(logits[:, :vocabulary_size].mean(dim=1), smoothing)
            nats += ((log_total - expected) * counted).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            slope = logits.sub_(log_total[:, None]).exp_()
            slope.scatter_add_(1, index, torch.full_like(index, smoothing - 1, dtype=slope.dtype))
            if smoothing:
                slope[:, :vocabulary_size] -= smoothing / vocabulary_size
            slope *= counted[:, None]
            slope = slope.to(low_weight.dtype)
            if grad_hidden is not None:
                torch.mm(slope, low_weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += slope.t() @ low_hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return nats

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = [
            None if grad is None else (grad * slope).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return grads[0], grads[1], None, None, None, None
