"""Random numbers that belong to a sample: made from its draw alone, the same however a run is spread."""

import math

import torch

MULTIPLIERS = (-4658895280553007687, -7723592293110705685)
"""Of splitmix64 (Steele, Lea and Flood, 2014), as signed numbers: 0xBF58476D1CE4E5B9, 0x94D049BB133111EB."""
INCREMENT = -7046029254386353131
"""2**64 over the golden ratio, as a signed number: 0x9E3779B97F4A7C15."""


def uniform(draws: torch.Tensor, *shape: int, stream: int = 0) -> torch.Tensor:
    """Numbers in [0, 1), fp32 [b, *shape], for `draws` (int64 [b]); another `stream` gives others."""
    count = math.prod(shape)
    counter = torch.arange(1, count + 1, device=draws.device) * INCREMENT
    offset = (stream * INCREMENT + 2**63) % 2**64 - 2**63  # as int64 wraps around
    mixed = _mix(_mix(draws + offset)[:, None] + counter)
    return (_shift(mixed, 40).to(torch.float32) * 2.0**-24).view(draws.shape[0], *shape)


def normal(draws: torch.Tensor, *shape: int, stream: int = 0) -> torch.Tensor:
    """Standard normal numbers, fp32 [b, *shape] (Box and Muller, 1958)."""
    count = math.prod(shape)
    pairs = uniform(draws, 2, count, stream=stream)
    radius = (-2.0 * torch.log1p(-pairs[:, 0])).sqrt()
    return (radius * torch.cos(2.0 * math.pi * pairs[:, 1])).view(draws.shape[0], *shape)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * MULTIPLIERS[0]
    x = (x ^ _shift(x, 27)) * MULTIPLIERS[1]
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, zeros coming in, as of an unsigned number."""
    return (x >> by) & ((1 << (64 - by)) - 1)
