"""What a run says of itself: its record, and the attempts in it."""

from typing import Any, Literal

from dtrain.settings import Settings

State = Literal["queued", "starting", "running", "recovering", "stopping", "succeeded", "failed", "stopped", "lost"]
ENDED: frozenset[str] = frozenset({"succeeded", "failed", "stopped", "lost"})


class Attempt(Settings):
    """One try of a run: from the start of its workers to the first failure, or the end."""

    number: int
    started_at: float
    from_step: int
    """Steps already done when it began."""
    source: str
    """Where its state came from: `scratch`, `snapshot`, or the name of a checkpoint."""
    ended_at: float | None = None
    last_step: int | None = None
    cause: str | None = None
    """Why it ended, in one sentence; empty for the attempt that is running."""
    failure: str | None = None
    """Class of the failure (`killed`, `hung`, `exited`, `agent`, ...); empty for one that ended well."""


class Record(Settings):
    """What a run says of itself. Times are seconds since 1970."""

    id: str
    name: str
    state: State = "queued"
    cause: str = ""
    """Why it is in this state, in one sentence."""
    error_kind: str | None = None
    """`kind` of the `dtrain.errors` class that ended it."""
    error: str | None = None
    """The whole error text, the user's own traceback included."""
    exit_code: int | None = None
    created_at: float
    started_at: float | None = None
    """First time its workers started."""
    ended_at: float | None = None
    num_steps: int
    """Steps of the whole run; 0 where only its script knows."""
    num_workers: int
    submissions: int = 1
    """How often a driver was started for it."""
    attempts: tuple[Attempt, ...] = ()
    driver_pid: int | None = None
    token: int = 0
    """Which owner wrote this, where storage is remote (`dtrain.storage.lease`)."""
    latest: dict[str, Any] = {}
    """The last training metrics, where they are not beside the record: of a run in a bucket."""
    outcome: dict[str, Any] = {}
    """What the run came to: final metrics, yardsticks, a sample."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED
