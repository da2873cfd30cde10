"""Is a rank stuck, and which one? Pure: functions of what the ranks last said and of the clock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SLOWEST_OF_USUAL = 20.0
"""A rank is stuck when it is silent for this many times its usual time between two signs of life."""
SHORTEST_TIMEOUT_S = 10.0
PHASES = ("starting", "reading data", "forward", "backward", "updating", "snapshot", "evaluating", "ending")


@dataclass(frozen=True)
class Beat:
    """A rank's last sign of life."""

    time: float
    """Monotonic clock, seconds."""
    step: int
    micro: int
    phase: int
    """Index into `PHASES`."""

    @property
    def place(self) -> str:
        return f"{PHASES[self.phase]} in step {self.step + 1}"


def timeout(usual_s: float | None, hang_timeout_s: float, start_timeout_s: float) -> float:
    """Seconds of silence that mean a hang, given the usual seconds of a step (None before the first is done)."""
    if usual_s is None:
        return start_timeout_s
    return min(hang_timeout_s, max(SHORTEST_TIMEOUT_S, SLOWEST_OF_USUAL * usual_s))


def is_hung(beats: Sequence[Beat], now: float, timeout_s: float) -> bool:
    """Ranks wait for each other, so all fall silent when one does: hung when even the liveliest is silent."""
    return bool(beats) and now - max(beat.time for beat in beats) > timeout_s


def culprits(beats: Mapping[int, Beat]) -> list[int]:
    """The ranks that the others wait for: those that have come least far."""
    if not beats:
        return []
    furthest = {rank: (beat.step, beat.micro, beat.phase) for rank, beat in beats.items()}
    least = min(furthest.values())
    return sorted(rank for rank, place in furthest.items() if place == least)
