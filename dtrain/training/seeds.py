"""Random numbers without state to save: every generator is re-seeded from (seed, step, micro batch, worker).

A resumed worker therefore draws what it would have drawn, whatever came before.
"""

_MASK = 2**64 - 1


def sample_seed(seed: int, step: int, micro: int, worker: int) -> int:
    """A seed in [0, 2**63) for one worker's micro batch, mixed by splitmix64 (Steele, Lea and Flood, 2014)."""
    state = _mix(seed)
    for word in (step, micro, worker):
        state = _mix(state ^ (word & _MASK))
    return state >> 1


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, numpy and torch, on every device torch has started. Takes microseconds."""
    import random

    import numpy as np

    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    seed_torch(seed)


def seed_torch(seed: int) -> None:
    """Seed torch's generators only: what the loop calls before every micro batch."""
    import torch

    torch.default_generator.manual_seed(seed)
    # torch.manual_seed would queue a call and a stack trace for each backend that is not in use.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
