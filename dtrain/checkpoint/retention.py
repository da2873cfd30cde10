"""Which checkpoints go. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dtrain.spec.job import Keep


@dataclass(frozen=True)
class Candidate:
    step: int
    loss: float | None
    """Held-out loss when it was written; None when nothing was measured yet."""


def surplus(candidates: Sequence[Candidate], keep: Keep) -> list[int]:
    """Steps of the valid checkpoints to delete: all but the newest `keep.last` and the `keep.best` of lowest loss."""
    newest = {c.step for c in sorted(candidates, key=lambda c: c.step)[-keep.last :]}
    # NaN has no place in an order: one would leave the others unsorted.
    measured = sorted(
        (c for c in candidates if c.loss is not None and not math.isnan(c.loss)), key=lambda c: (c.loss, -c.step)
    )
    best = {c.step for c in measured[: keep.best]}
    return sorted(c.step for c in candidates if c.step not in newest | best)
