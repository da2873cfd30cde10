"""Is a rank stuck, and which one? Pure: functions of what the ranks last said and of the clock."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

SLOWEST_OF_USUAL = 20.0
"""A rank is stuck when it is silent for this many times its usual time between two signs of life."""
SHORTEST_TIMEOUT_S = 10.0
LONGEST_OF_SCRIPT = 5.0
"""A script is stuck when it reports nothing for this many times its longest silence between two reports."""
PHASES = ("starting", "reading data", "forward", "backward", "updating", "snapshot", "evaluating", "ending", "script")
IN_WORDS = {
    "forward": "in the forward pass of",
    "backward": "in the backward pass of",
    "snapshot": "taking a snapshot in",
}
"""Behind `was killed` or `hung`; the others are read with `in`."""
EVALUATING = PHASES.index("evaluating")
ENDING = PHASES.index("ending")
SCRIPT = PHASES.index("script")
"""All that is known of a script: it has reported."""


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
        phase = PHASES[self.phase]
        return f"{IN_WORDS.get(phase, f'{phase} in')} step {self.step + 1}"


def timeout(usual_s: float | None, hang_timeout_s: float, start_timeout_s: float) -> float:
    """Seconds of silence that mean a hang, given the usual seconds of a step (None before the first is done)."""
    if usual_s is None:
        return start_timeout_s
    return min(hang_timeout_s, max(SHORTEST_TIMEOUT_S, SLOWEST_OF_USUAL * usual_s))


def takes_any_time(phases: Iterable[int], *, is_compiled: bool) -> bool:
    """Whether ranks are where nobody knows how long it takes, so that they are given as long as for a start.

    That is at the last sample, and where a model is compiled for evaluation: in the middle of a run, and once more for
    a last batch of another size.
    """
    return any(phase == ENDING or (is_compiled and phase == EVALUATING) for phase in phases)


def script_timeout(longest_silence_s: float | None, hang_timeout_s: float, start_timeout_s: float) -> float:
    """The same for a script, given its longest silence between two reports (None before there were two).

    What happens between two reports is the script's affair and may take any time: the limit only grows.
    """
    if longest_silence_s is None:
        return max(hang_timeout_s, start_timeout_s)
    return max(hang_timeout_s, LONGEST_OF_SCRIPT * longest_silence_s)


class Silence:
    """How long a script was silent between its reports, and how long a rank of it has been stopped."""

    def __init__(self) -> None:
        self.heard: float | None = None
        """Time of the latest report."""
        self.longest_s: float | None = None
        self._stopped_since: float | None = None

    def hear(self, latest: float | None, num_reports: int) -> None:
        """Take note of the time of the latest report, None when there is none, and of how many there were."""
        if num_reports > 1:  # all of them may have come between two looks
            self.longest_s = self.longest_s or 0.0
        if latest is not None and self.heard is not None and latest > self.heard:
            self.longest_s = max(self.longest_s or 0.0, latest - self.heard)
        self.heard = latest

    def stopped_for(self, is_stopped: bool, now: float) -> float:
        """Seconds for which a rank was found stopped at every look."""
        if not is_stopped:
            self._stopped_since = None
            return 0.0
        self._stopped_since = now if self._stopped_since is None else self._stopped_since
        return now - self._stopped_since


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
