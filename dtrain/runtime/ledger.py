"""What an agent has on record: the run's attempts, its events, and the last reading of its metrics."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from dtrain import code
from dtrain.runs import Attempt, Run
from dtrain.runtime.retry import Failure
from dtrain.settings import convert, to_builtins

LATEST_EVERY_S = 5.0
"""Time between two readings that are put into the record of a run in a bucket, for those who list runs."""


class Ledger:
    """Kept by every agent; only the leader's says what happened to the run as a whole."""

    def __init__(
        self,
        run: Run,
        attempts: Sequence[Mapping[str, Any]],
        files: Mapping[str, str],
        tell: Callable[[Mapping[str, Any]], None],
        *,
        is_leader: bool,
        is_away: bool,
    ) -> None:
        """`files` are the user's own, each with its hash as planned; `is_away`: the run's folder is this node's own."""
        self.attempts = [convert(attempt, Attempt) for attempt in attempts]
        self.began = 0.0
        """When the attempt began, seconds since 1970."""
        self._run, self._tell, self._is_leader, self._is_away = run, tell, is_leader, is_away
        self._files = dict(files)
        self._latest: dict[str, Any] = {}
        self._next_latest = 0.0

    def begin(self, number: int, restore: Mapping[str, Any]) -> None:
        """An attempt begins, from `restore` as `Agent._where_from` gives it."""
        source = Path(restore["path"]).name if restore["from"] == "checkpoint" else restore["from"]
        self.began = time.time()
        self.attempts.append(Attempt(number=number, started_at=self.began, from_step=restore["step"], source=source))
        self._look_at_code()
        if source == "script" and number > 1:
            self.event("attempt", f"attempt {number}: the script is started again", attempt=number)
        elif number > 1 or restore["step"]:
            self.event("attempt", f"attempt {number} begins at step {restore['step']}, from {source}", attempt=number)
        state = {"state": "starting", "cause": "workers are being forked"} if number == 1 else {}
        self._tell({"record": {"attempts": [to_builtins(a) for a in self.attempts], **state}})

    def running(self) -> None:
        """All workers of the attempt are ready."""
        latest = self.attempts[-1]
        cause = f"attempt {latest.number}, from {latest.source}"
        if latest.source == "script":
            cause = f"attempt {latest.number} of the script"
        self._tell({"record": {"state": "running", "cause": cause}})

    def end(self, failure: Failure | None, step: int | None = None) -> None:
        """The attempt has ended: by a failure, or after `step` steps."""
        changes: dict[str, Any] = {"ended_at": time.time(), "last_step": failure.step if failure else step}
        if failure is not None:
            changes |= {"cause": failure.cause, "failure": failure.kind}
        self.attempts[-1] = replace(self.attempts[-1], **changes)
        self._tell({"record": {"attempts": [to_builtins(a) for a in self.attempts]}})

    def failures(self) -> list[Failure]:
        """How earlier attempts came to their ends."""
        return [_failure_of(attempt) for attempt in self.attempts if attempt.failure]

    def event(self, event: str, message: str, **fields: Any) -> None:
        """Note what happened to the run as a whole."""
        if self._is_leader:
            self.note(event, message=message, **fields)

    def note(self, event: str, **fields: Any) -> None:
        """Note what happened on this node."""
        if self._is_away:
            self._tell({"event": {"kind": event, "time": round(time.time(), 3), **fields}})
        else:
            self._run.event(event, **fields)

    def take_latest(self, metrics: Mapping[str, Any]) -> None:
        """Keep a reading of the metrics for the record, where those who list runs cannot read them cheaply."""
        if self._is_away and "held_out" not in metrics:
            self._latest = dict(metrics)
            if time.monotonic() >= self._next_latest:
                self.tell_latest()

    def tell_latest(self) -> None:
        if self._latest:
            self._next_latest = time.monotonic() + LATEST_EVERY_S
            self._tell({"record": {"latest": self._latest}})

    def _look_at_code(self) -> None:
        """Workers import the user's files as they are now: say so where that is not what was planned."""
        for path in code.changed(self._files):
            self._files[path] = code.sha256(Path(path))
            what = "has changed" if self._files[path] else "cannot be read any more,"
            self.event("code-changed", f"{path} {what} since the run was submitted or last started; it runs as it is")


def _failure_of(attempt: Attempt) -> Failure:
    kind: Any = attempt.failure
    return Failure(kind, attempt.cause or "", attempt.last_step or 0)
