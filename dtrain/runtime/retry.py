"""Try again, or stop? A pure function of the failure, of those before it, and of the budget."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dtrain.spec.job import Retry

FailureKind = Literal["error", "diverged", "memory", "killed", "hung", "exited", "agent"]
FINAL: frozenset[str] = frozenset({"error", "diverged", "memory"})
"""Failures that the same code on the same data would meet again."""
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended."""

    kind: FailureKind
    cause: str
    """One sentence: which rank, what happened, where."""
    step: int
    """Steps completed when it happened."""
    detail: str = ""
    """The user's own traceback, where there is one."""
    error_kind: str = ""
    """`kind` of the `dtrain.errors` class the run ends with if it is not tried again."""
    has_saved: bool = False
    """Whether work was put on storage since the failure before, by a script that may report no steps."""


@dataclass(frozen=True)
class Decision:
    again: bool
    delay_s: float
    reason: str


def decide(failure: Failure, earlier: Sequence[Failure], budget: Retry) -> Decision:
    """What to do after `failure`, given all `earlier` ones of the run (every driver's, every agent's)."""
    if failure.kind in FINAL:
        return Decision(False, 0.0, failure.cause)
    allowed = int(getattr(budget, failure.kind))
    used = Counter(f.kind for f in earlier)[failure.kind]
    if used >= allowed:
        return Decision(False, 0.0, f"retry.{failure.kind} allows {allowed}, all used; last: {failure.cause}")
    stuck, later = 1, failure
    for before in reversed(earlier):
        if before.step < failure.step or later.has_saved:
            break
        stuck, later = stuck + 1, before
    if stuck >= budget.without_progress:
        reason = f"{stuck} failures without a new step (retry.without_progress {budget.without_progress})"
        return Decision(False, 0.0, f"{reason}; last: {failure.cause}")
    delay = 0.0 if stuck == 1 else min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (stuck - 2))
    return Decision(True, delay, f"{failure.kind} {used + 1} of {allowed}")
