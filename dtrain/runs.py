"""What happened: the run folder, its record, events and metrics, and the lease that gives it one owner.

runs/<run>/
  job.yaml         what was asked          plan.json       what was decided
  run.json         the record: state, cause, attempts, exit code; replaced whole, by the lease's owner only
  events.jsonl     every change of state and its cause, one JSON object a line
  metrics.jsonl    what training measured, one JSON object a line
  logs/            driver.log, agent-0.log, rank-0.log, ...; survive everything
  tensorboard/     event files
  samples/         pictures that the model made
  checkpoints/     step-00000100/, ...
  lease            locked while a driver or its agent lives
  stop             exists once somebody asked the run to stop
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from dtrain.component import Options, suggestion
from dtrain.errors import DtrainError, InputError, Stopped, StorageError
from dtrain.plan import AnyPlan, Plan, ScriptPlan, read_plan

ID_ALPHABET = "23456789abcdefghjkmnpqrstuvwxyz"
State = Literal["queued", "starting", "running", "recovering", "stopping", "succeeded", "failed", "stopped", "lost"]
ENDED: frozenset[str] = frozenset({"succeeded", "failed", "stopped", "lost"})
LEASE_PATIENCE_S = 1.0
"""Longest wait for a lease: whoever asks if a run is owned holds it for an instant."""


class Attempt(Options):
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


class Record(Options):
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
    outcome: dict[str, Any] = Field(default={})
    """What the run came to: final metrics, yardsticks, a sample."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class Run:
    """One run folder. Reading never locks; only the holder of the lease writes the record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lease: int | None = None

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def id(self) -> str:
        return self.path.name

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
        return read_plan((self.path / "plan.json").read_text())

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
        if stored.state in ENDED or stored.driver_pid is None or self._lease is not None or self.is_owned():
            return stored
        stored = self.stored_record()  # its owner may have ended between the two looks
        if stored.state in ENDED:
            return stored
        cause = f"the driver (pid {stored.driver_pid}) is gone; `dtrain resume {self.id}` goes on"
        return stored.model_copy(update={"state": "lost", "cause": cause, "error_kind": "cluster", "exit_code": 5})

    def stored_record(self) -> Record:
        path = self.path / "run.json"
        try:
            return Record.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            raise StorageError(f"{path} is not the record of a run: {error.errors()[0]['msg']}") from None
        except ValueError:
            raise StorageError(f"{path} is not the record of a run: not UTF-8") from None

    def update(self, **changes: Any) -> Record:
        """Change the record and note a change of state as an event."""
        before = self.stored_record()
        after = before.model_copy(update=changes)
        self._write("run.json", after.model_dump_json(indent=2))
        if after.state != before.state:
            self.event("state", state=after.state, before=before.state, cause=after.cause)
        return after

    # -- events and metrics ----------------------------------------------------------------------------

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to events.jsonl; a full disk loses the line, never the run."""
        _append(self.path / "events.jsonl", {"time": round(time.time(), 3), "event": kind, **fields})

    def metric(self, **fields: Any) -> None:
        """Append one line to metrics.jsonl; a full disk loses the line, never the run."""
        _append(self.path / "metrics.jsonl", {"time": round(time.time(), 3), **fields})

    def events(self) -> list[dict[str, Any]]:
        return read_lines(self.path / "events.jsonl")

    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.path / "metrics.jsonl")

    # -- stop ------------------------------------------------------------------------------------------

    def request_stop(self, who: str) -> None:
        """Ask whoever drives the run to stop it after a last checkpoint; asking twice is fine."""
        self._write("stop", who)

    def ask_to_stop(self, who: str) -> None:
        """`request_stop`, which also ends a run that waits for a cluster and that no driver has taken up."""
        self.request_stop(who)
        cause = f"stopped by {who} before it began"
        self.end_undriven("stopped", cause, Stopped(cause))

    @property
    def stop_requested(self) -> str | None:
        try:
            return (self.path / "stop").read_text() or "a stop request"
        except FileNotFoundError:
            return None

    def clear_stop(self) -> None:
        (self.path / "stop").unlink(missing_ok=True)

    # -- between drivers ---------------------------------------------------------------------------------

    def requeue(self, cause: str) -> None:
        """Make a run that has ended ready for another driver.

        Raises `InputError` when it succeeded or is still under way, `StorageError` when somebody took it meanwhile.
        """
        state = self.record.state
        if state == "succeeded":
            raise InputError(f"run {self.id} has succeeded, nothing is left to do; `dtrain submit` starts a new one")
        if state not in ENDED:
            raise InputError(f"run {self.id} is {state}; `dtrain status {self.id} -f` shows it, `dtrain stop` ends it")
        with self.owned():
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
                submissions=self.stored_record().submissions + 1,
            )

    def end_undriven(self, state: State, cause: str, error: DtrainError) -> bool:
        """End a run that no driver has taken up; False when one has, and the run is that driver's to end."""
        if self.stored_record().state != "queued":
            return False
        try:
            with self.owned():
                if self.stored_record().state != "queued":
                    return False
                self.update(
                    state=state,
                    cause=cause,
                    error_kind=error.kind,
                    error=error.message,
                    exit_code=error.exit_code,
                    ended_at=time.time(),
                )
                return True
        except StorageError:
            return False

    # -- the lease ---------------------------------------------------------------------------------------

    def acquire(self) -> int:
        """Become the run's one owner until this process, and whoever inherits the descriptor, has ended.

        Returns the descriptor to hand to the agent. Raises `StorageError` when somebody else owns the run.
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

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Own the run for as long as the block lasts. Raises `StorageError` when somebody else owns it."""
        self.acquire()
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

    def _write(self, name: str, text: str) -> None:
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


def new_name(plan: AnyPlan) -> str:
    """A name for a run of this plan that no run under its storage has at the moment."""
    for _ in range(100):
        name = f"{plan.name}-{''.join(secrets.choice(ID_ALPHABET) for _ in range(4))}"
        if not (Path(plan.storage) / name).exists():
            return name
    raise StorageError(f"{plan.storage}: no free name for a run of {plan.name!r} in 100 tries")


def create(plan: AnyPlan, job_text: str, name: str | None = None) -> Run:
    """Make the folder of a new run under the plan's storage. Raises `StorageError` when that cannot be written."""
    storage = Path(plan.storage)
    run = Run(storage / (name or new_name(plan)))
    record = Record(
        id=run.id,
        name=plan.name,
        created_at=time.time(),
        num_steps=plan.num_steps,
        num_workers=plan.workers.total,
        cause="submitted",
    )
    try:
        run.path.mkdir(parents=True)
        for folder in (run.logs, run.checkpoints, run.tensorboard):
            folder.mkdir()
        run._write("job.yaml", job_text)
        run._write("plan.json", plan.to_json())
        run._write("run.json", record.model_dump_json(indent=2))
    except (OSError, StorageError) as error:
        if not isinstance(error, FileExistsError):
            shutil.rmtree(run.path, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else error.message
        raise StorageError(
            f"{storage}: the run folder cannot be written ({reason});"
            " choose another place with --set cluster.storage=FOLDER"
        ) from error
    run.event("state", state="queued", before=None, cause="submitted")
    return run


def list_runs(storage: Path) -> list[Run]:
    """All runs under `storage`, the oldest first; those whose record cannot be read before all others."""
    if not storage.is_dir():
        return []
    found = [Run(p) for p in storage.absolute().iterdir() if (p / "run.json").is_file()]
    return sorted(found, key=lambda run: (_created_at(run), run.id))


def _created_at(run: Run) -> float:
    try:
        return run.stored_record().created_at
    except StorageError:
        return float("-inf")


def find(storage: Path, word: str | None) -> Run:
    """The run that `word` means: a folder, a whole id, or the start of an id or of its last part; the latest for None.

    Raises `InputError` when there is none, or more than one.
    """
    if word and (Path(word) / "run.json").is_file():
        return Run(Path(word).resolve())
    runs = list_runs(storage)
    if not runs:
        raise InputError(f"{storage}: there are no runs here yet; `dtrain submit JOB` makes one")
    if word is None:
        return runs[-1]
    exact = [r for r in runs if r.id == word]
    matches = exact or [r for r in runs if r.id.startswith(word) or r.id.rsplit("-", 1)[-1].startswith(word)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise InputError(f"{word!r} could be {', '.join(r.id for r in matches)}; type a little more")
    raise InputError(f"{storage}: no run is called {word!r}{suggestion(word, [r.id for r in runs])}")


def delete(run: Run) -> None:
    """Remove a run's folder. Raises `StorageError` while somebody owns it."""
    run.acquire()
    shutil.rmtree(run.path)


def read_lines(path: Path, offset: int = 0) -> list[dict[str, Any]]:
    """The JSON objects of a .jsonl file from byte `offset`; a torn last line (a writer killed in it) is left out."""
    return [value for _, value in iterate_lines(path, offset)]


def iterate_lines(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte offset behind the line, object) for each whole line from `offset`; torn lines are passed over."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    yield offset, value


def last_lines(path: Path, max_bytes: int = 1 << 16) -> list[dict[str, Any]]:
    """The JSON objects in the last `max_bytes` of a .jsonl file, however long it is."""
    try:
        size = path.stat().st_size
    except OSError:
        return []
    return read_lines(path, max(0, size - max_bytes))


def _append(path: Path, value: dict[str, Any]) -> None:
    line = (json.dumps(value, default=str) + "\n").encode()
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line  # a full disk or a kill tore the line before: it must not take this one with it
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
