"""One run folder: paths, record, events, and the lease that gives it one owner."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from dtrain.errors import DtrainError, InputError, Stopped, StorageError
from dtrain.plan import Plan, ScriptPlan, read_plan
from dtrain.runs import lines
from dtrain.runs.record import ENDED, Record, State
from dtrain.settings import from_kept, to_json
from dtrain.storage import NotThere

LEASE_PATIENCE_S = 1.0
"""Longest wait for a lease: whoever asks if a run is owned holds it for an instant."""


class Run:
    """One run folder. Reading never locks; only the holder of the lease writes the record."""

    poll_s = 0.0
    """Least time between two looks of somebody who follows it: what storage bears."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lease: int | None = None

    def __repr__(self) -> str:
        return f"Run({self.where!r})"

    @property
    def path(self) -> Path:
        return self._path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def where(self) -> str:
        """The folder, or the URI, as a person would write it."""
        return str(self.path.absolute())

    def refresh(self, *names: str) -> None:
        """Bring files of `path`, or folders (`logs/`), up to date with storage; nothing to do where that is it."""

    def fetch_checkpoint(self, name: str) -> None:
        """Bring a whole checkpoint to `path`; nothing to do where it is there."""

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def plan(self) -> Plan | ScriptPlan:
        return read_plan(self._read("plan.json"), f"{self.where}/plan.json")

    @property
    def task_plan(self) -> Plan:
        """The plan of a run that trains a task. Raises `InputError` when it runs a script."""
        plan = self.plan
        if isinstance(plan, ScriptPlan):
            raise InputError(f"run {self.id} runs {plan.entrypoint.script}, and only that script knows its model")
        return plan

    # -- the record ----------------------------------------------------------------------------------

    @property
    def record(self) -> Record:
        """The record as it stands; `lost` when it says the run is under way and nobody holds its lease."""
        stored = self.stored_record()
        if stored.state in ENDED or stored.driver_pid is None or self.is_mine or self.is_owned():
            return stored
        stored = self.stored_record()  # its owner may have ended between the two looks
        if stored.state in ENDED:
            return stored
        cause = f"the driver (pid {stored.driver_pid}) is gone; `dtrain resume {self.id}` goes on"
        return replace(stored, state="lost", cause=cause, error_kind="cluster", exit_code=5)

    def latest(self, record: Record) -> dict[str, Any]:
        """The newest training metrics, empty before there are any; in the record where that is all one has."""
        found = reversed(lines.last_lines(self.path / "metrics.jsonl"))
        return next((line for line in found if "held_out" not in line), record.latest)

    def stored_record(self) -> Record:
        return self._parsed(self._read("run.json"))

    def _parsed(self, data: bytes) -> Record:
        return from_kept(data, Record, f"{self.where}/run.json")

    def update(self, **changes: Any) -> Record:
        """Change the record and note a change of state as an event."""
        before = self.stored_record()
        after = replace(before, **changes)
        self.write("run.json", to_json(after))
        if after.state != before.state:
            self.event("state", state=after.state, before=before.state, cause=after.cause)
        return after

    # -- events and metrics ----------------------------------------------------------------------------

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to events.jsonl; a full disk loses the line, never the run."""
        self._append("events.jsonl", {"time": round(time.time(), 3), "event": kind, **fields})

    def metric(self, **fields: Any) -> None:
        """Append one line to metrics.jsonl; a full disk loses the line, never the run."""
        self._append("metrics.jsonl", {"time": round(time.time(), 3), **fields})

    def events(self) -> list[dict[str, Any]]:
        self.refresh("events.jsonl")
        return lines.read_lines(self.path / "events.jsonl")

    def metrics(self) -> list[dict[str, Any]]:
        self.refresh("metrics.jsonl")
        return lines.read_lines(self.path / "metrics.jsonl")

    # -- stop ------------------------------------------------------------------------------------------

    def request_stop(self, who: str) -> None:
        """Ask whoever drives the run to stop it after a last checkpoint; asking twice is fine."""
        self.write("stop", who)

    def ask_to_stop(self, who: str) -> None:
        """`request_stop`, which also ends a run that waits for a cluster and that no driver has taken up."""
        self.request_stop(who)
        cause = f"stopped by {who} before it began"
        self.end_undriven("stopped", cause, Stopped(cause))

    @property
    def stop_requested(self) -> str | None:
        with contextlib.suppress(NotThere):
            return self._read("stop").decode() or "a stop request"
        return None

    def clear_stop(self) -> None:
        (self.path / "stop").unlink(missing_ok=True)

    # -- between drivers ---------------------------------------------------------------------------------

    def requeue(self, cause: str) -> None:
        """Make a run that has ended ready for another driver.

        Raises `InputError` when it succeeded or is still under way, `StorageError` when somebody took it meanwhile.
        """
        seen = self.record
        state = seen.state
        if state == "succeeded":
            raise InputError(f"run {self.id} has succeeded, nothing is left to do; `dtrain submit` starts a new one")
        if state not in ENDED:
            raise InputError(f"run {self.id} is {state}; `dtrain status {self.id} -f` shows it, `dtrain stop` ends it")
        with self.owned():
            stored = self.stored_record()
            if (stored.submissions, stored.driver_pid) != (seen.submissions, seen.driver_pid):
                raise StorageError(f"somebody else resumed run {self.id} meanwhile; `dtrain status {self.id}` shows it")
            self.clear_stop()
            self.update(
                state="queued",
                cause=cause,
                error_kind=None,
                error=None,
                exit_code=None,
                ended_at=None,
                driver_pid=None,
                outcome={},
                submissions=stored.submissions + 1,
            )

    def end_undriven(self, state: State, cause: str, error: DtrainError) -> bool:
        """End a run that no driver has taken up; False when one has, and the run is that driver's to end."""
        if self.stored_record().state != "queued":
            return False
        try:
            with self.owned():
                if self.stored_record().state != "queued":
                    return False
                self._end(state, cause, error)
                return True
        except StorageError:
            return False

    def put_back(self, why: str, seen: Record) -> bool:
        """Make a run under way, whose driver is known to be dead, ready for another one.

        `seen` is the record that this was judged by: False when the run has ended since, or somebody else has put it
        back. Raises `StorageError` when a driver has it all the same.
        """
        with self.owned(seen):
            record = self.stored_record()
            if record.ended or (record.submissions, record.driver_pid) != (seen.submissions, seen.driver_pid):
                return False
            attempts = list(record.attempts)
            if attempts and attempts[-1].ended_at is None:
                facts = {"ended_at": time.time(), "cause": why, "last_step": self.latest(record).get("step")}
                attempts[-1] = replace(attempts[-1], **facts)
            self.event("driver-lost", message=f"{why}: the run is handed over again")
            self.update(
                state="queued",
                cause=f"handed over again: {why}",
                driver_pid=None,
                submissions=record.submissions + 1,
                attempts=tuple(attempts),
            )
            return True

    def end_dead(self, error: DtrainError) -> None:
        """End a run under way whose driver is known to be dead. Raises `StorageError` when one has it all the same."""
        with self.owned(self.stored_record()):
            if not self.stored_record().ended:
                self._end("stopped" if isinstance(error, Stopped) else "failed", error.message, error)

    def _end(self, state: State, cause: str, error: DtrainError) -> None:
        self.update(
            state=state,
            cause=cause,
            error_kind=error.kind,
            error=error.message,
            exit_code=error.exit_code,
            ended_at=time.time(),
        )

    # -- the lease ---------------------------------------------------------------------------------------

    def acquire(self, dead: Record | None = None) -> int:
        """Become the run's one owner until this process, and whoever inherits the descriptor, has ended.

        Returns the descriptor to hand to the agent. That the owner who wrote the record `dead` is known to be dead
        changes nothing here: it holds no lock. Raises `StorageError` when somebody else owns the run.
        """
        descriptor = os.open(self.path / "lease", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + LEASE_PATIENCE_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() < deadline:
                    time.sleep(0.01)
                    continue
                os.close(descriptor)
                message = f"run {self.id} is already being driven; `dtrain status {self.id}` shows it"
                raise StorageError(message) from None
            self._lease = descriptor
            return descriptor

    def release(self) -> None:
        """Give the lease up; whoever inherited the descriptor keeps it."""
        if self._lease is not None:
            os.close(self._lease)
            self._lease = None

    @property
    def is_mine(self) -> bool:
        """Whether this very object holds the lease."""
        return self._lease is not None

    @contextlib.contextmanager
    def owned(self, dead: Record | None = None) -> Iterator[None]:
        """Own the run for as long as the block lasts. Raises `StorageError` when somebody else owns it."""
        self.acquire(dead)
        try:
            yield
        finally:
            self.release()

    def adopt(self, descriptor: int) -> int:
        """Own the run by a lease that was inherited."""
        self._lease = descriptor
        os.set_inheritable(descriptor, False)
        return descriptor

    def is_owned(self) -> bool:
        try:
            descriptor = os.open(self.path / "lease", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    # -- files -------------------------------------------------------------------------------------------

    def _read(self, name: str) -> bytes:
        """A small file whole. Raises `NotThere` when there is none, `StorageError` when it cannot be read."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError as error:
            raise NotThere(f"{self.path / name} cannot be read: {error.strerror}") from None
        except OSError as error:
            raise StorageError(f"{self.path / name} cannot be read: {error.strerror}") from None

    def _append(self, name: str, value: dict[str, Any]) -> None:
        lines.append(self.path / name, value)

    def write(self, name: str, text: str) -> None:
        """Replace a small file whole: a reader sees the old text or the new, never half of one."""
        temporary = self.path / f".{name}.{os.getpid()}"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise StorageError(f"{self.path / name} cannot be written: {error.strerror}") from error
