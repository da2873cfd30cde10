"""Choosing the next token."""

import math

import torch
import torch.nn.functional as F  # noqa: N812


def choose(logits: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token from `logits` [vocabulary]: softmax at `temperature`, among the `top_k` likeliest."""
    if temperature <= 0:
        return int(logits.argmax())
    if top_k is not None and top_k < logits.shape[-1]:
        least = torch.topk(logits, top_k).values[-1]
        logits = logits.masked_fill(logits < least, -math.inf)
    return int(torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator))
