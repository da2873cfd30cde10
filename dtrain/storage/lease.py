"""Who owns a run whose storage several machines see: one driver at a time, and none that was believed dead.

`<run>/lease.json` names the owner, until when it may be trusted to live, and its token, a number that grows with every
owner and never goes back: the file stays when the lease is given up. The owner renews it three times a period.

**When it may be taken over.** When it was given up; when it has not changed for a whole period by the looker's own
monotonic clock; or when the looker's wall clock is `SKEW_S` past the owner's. So clocks may differ by `SKEW_S`, and run
at about the same speed. Each is a guess that the owner is dead, and a guess may be wrong: a process can sleep for an
hour and wake up.

**Why that does no harm.** What counts is in a few documents, `GUARDED`, that change on condition of their token and
version only (`dtrain.storage.fencing`). A new owner first writes its token into all of them. An older one that wakes
up after that is refused, by name: `Fenced`. What it had written just before stands, as if it had been in time: the new
owner reads it after having claimed it. All else that belongs to a run is either named by a guarded document, as the
files of a checkpoint are, or is for people to read.
"""

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from dtrain.errors import StorageError
from dtrain.storage import Conflict, NotThere, Storage, fencing
from dtrain.storage.fencing import Fenced

PERIOD_S = 30.0
SKEW_S = 60.0
"""Furthest that the wall clocks of two machines are believed to be apart."""
RECORD = "run.json"
COMMITTED = "checkpoints/committed.json"
GUARDED = (RECORD, COMMITTED)
SETTLE_S = 1.0
"""Where a store ignores conditions: until a rival's write, sent at the same moment, is there too."""

LEAVING_S = 5.0
"""Longest wait for a renewal that storage does not answer, when the lease is given up."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Standing:
    """What `lease.json` says."""

    token: int
    owner: str
    until: float
    """Seconds since 1970 by the owner's clock."""
    period_s: float
    mark: str
    """Tells two owners apart that have the same name."""
    version: str

    @property
    def is_released(self) -> bool:
        return self.until == 0.0


def standing(storage: Storage, run_id: str) -> Standing | None:
    """What the lease of a run says; None when it never had one."""
    name = _name(run_id)
    try:
        data, version = storage.read(name)
    except NotThere:
        return None
    try:
        said = json.loads(data)
        return Standing(
            int(said["token"]),
            str(said["owner"]),
            float(said["until"]),
            float(said["period_s"]),
            str(said["mark"]),
            version,
        )
    except (ValueError, KeyError, TypeError):
        raise StorageError(
            f"{storage.uri}/{name} is damaged; when nothing drives the run any more, delete that file and resume it"
        ) from None


def is_owned(storage: Storage, run_id: str, wall: Clock = time.time) -> bool:
    """Whether somebody owns a run, as far as one look can tell: that an owner died is seen `SKEW_S` late."""
    found = standing(storage, run_id)
    return found is not None and not found.is_released and wall() <= found.until + SKEW_S


class Watch:
    """Judges by several looks whether the owner of a run lives; it is told dead within a period."""

    def __init__(
        self, storage: Storage, run_id: str, *, monotonic: Clock = time.monotonic, wall: Clock = time.time
    ) -> None:
        self._storage, self._run_id = storage, run_id
        self._monotonic, self._wall = monotonic, wall
        self._version: str | None = None
        self._seen_at = 0.0
        self.found: Standing | None = None
        """What was seen at the last look."""

    def is_alive(self) -> bool:
        """Look once more. Raises `StorageError` when storage does not answer: that says nothing of the owner."""
        self.found = found = standing(self._storage, self._run_id)
        if found is None or found.is_released or self._wall() > found.until + SKEW_S:
            return False
        now = self._monotonic()
        if found.version != self._version:
            self._version, self._seen_at = found.version, now
        return now - self._seen_at < found.period_s


class Lease:
    """One owner's hold on a run, renewed by a thread of this process; not for use in a forked child of it."""

    def __init__(
        self,
        storage: Storage,
        run_id: str,
        owner: str,
        *,
        period_s: float = PERIOD_S,
        monotonic: Clock = time.monotonic,
        wall: Clock = time.time,
    ) -> None:
        self.run_id, self.owner, self.period_s = run_id, owner, period_s
        self.is_guarded = True
        """Whether the store keeps the conditions of writes."""
        self._storage, self._name = storage, _name(run_id)
        self._monotonic, self._wall = monotonic, wall
        self._mark = secrets.token_hex(8)
        self._token = 0
        self._version = ""
        self._renewed_at = 0.0
        self._lost: str | None = None
        self._lock = threading.Lock()  # of renewing: by the thread, by hand, and giving up
        self._enough = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def token(self) -> int:
        """Grows with every owner; 0 before the lease is held."""
        return self._token

    def acquire(self, patience_s: float = 0.0, *, succeeding: int | None = None, renews: bool = True) -> int:
        """Become the run's owner; returns the token. The guarded documents bear it when this returns.

        A lease that is held by somebody is watched for `patience_s`: to take it from one just killed takes a period.
        `succeeding` is the token of an owner that is known to be dead: its lease is taken at once. With `renews` a
        thread keeps the lease until `release`. Raises `StorageError` naming the owner when it is held.
        """
        watch = Watch(self._storage, self.run_id, monotonic=self._monotonic, wall=self._wall)
        deadline = self._monotonic() + patience_s
        while not self._taken(watch, succeeding):
            left = deadline - self._monotonic()
            if left <= 0 and watch.found is not None:
                raise StorageError(
                    f"run {self.run_id} is already being driven, by {watch.found.owner};"
                    f" `dtrain status {self.run_id}` shows it, `dtrain stop {self.run_id}` ends it"
                )
            time.sleep(max(0.0, min(left, watch.found.period_s / 20 if watch.found else 0.1, 1.0)))
        try:
            self.is_guarded = self._keeps_conditions()
            if not self.is_guarded:
                time.sleep(SETTLE_S)
                self._own()
            self._claim()
        except StorageError:
            self.release()
            raise
        if renews:
            self._enough.clear()
            self._thread = threading.Thread(target=self._keep, name="dtrain-lease", daemon=True)
            self._thread.start()
        return self._token

    def renew(self) -> None:
        """Say once more that this owner lives. Raises `Fenced` when another has the run, `StorageError` otherwise."""
        with self._lock:
            if self._lost:
                raise Fenced(self._lost)
            for is_last in (False, True):
                begun = self._monotonic()
                if not self.is_guarded:
                    self._own()  # the store would let an owner that was succeeded take the run back
                try:
                    self._version = self._storage.write(self._name, self._text(), if_version=self._version)
                except Conflict:
                    self._own()
                    if is_last:
                        raise
                    continue
                self._renewed_at = begun
                return

    def check(self) -> None:
        """Raise unless this owner may believe that the run is its own; asks nobody, so it costs nothing.

        Raises `Fenced` when another owner is known: the end. Raises another `StorageError` when the lease could not be
        renewed for a whole period: somebody may have the run by now. Nothing that counts is written twice even so, and
        going on with what counts for nothing, and asking again, is safe.
        """
        if self._lost:
            raise Fenced(self._lost)
        silent_s = self._monotonic() - self._renewed_at
        if silent_s >= self.period_s:
            raise StorageError(
                f"{self._storage.uri} has not taken a sign of life of run {self.run_id} for {silent_s:.0f} s:"
                " another driver may take the run over"
            )

    def fenced_write(self, name: str, document: bytes | Mapping[str, Any]) -> None:
        """Replace a guarded document of the run (`run.json`), a JSON object. Raises `Fenced`."""
        value = json.loads(document) if isinstance(document, bytes) else dict(document)
        try:
            fencing.change(self._storage, f"{self.run_id}/{name}", self._token, lambda _: value)
        except Fenced as error:
            self._lost = self._lost or error.message
            raise

    def stop_renewing(self) -> None:
        """Let the lease run out by itself, or be taken by a successor that knows its token."""
        self._enough.set()
        if self._thread is not None:
            self._thread.join(timeout=LEAVING_S)
        self._thread = None

    def release(self) -> None:
        """Give the run up: the next owner need not wait. Where storage refuses, the lease runs out instead."""
        self.stop_renewing()
        if not self._lock.acquire(timeout=LEAVING_S):
            return
        try:
            if self._token and not self._lost:
                with contextlib.suppress(StorageError):
                    if not self.is_guarded:
                        self._own()
                    self._storage.write(self._name, self._text(until=0.0), if_version=self._version)
                self._lost = self._lost or f"run {self.run_id} was given up by {self.owner}"
        finally:
            self._lock.release()

    # -- parts of the above --------------------------------------------------------------------------------------

    def _taken(self, watch: Watch, succeeding: int | None) -> bool:
        """One try to become the owner."""
        if watch.is_alive() and (watch.found is None or watch.found.token != succeeding):
            return False
        found = watch.found
        # A lease that somebody deleted says nothing of its owners, and what they wrote refuses a lower token.
        self._token = (found.token if found else self._highest()) + 1
        begun = self._monotonic()
        try:
            self._version = self._storage.write(
                self._name, self._text(), if_absent=found is None, if_version=found.version if found else None
            )
        except Conflict:
            self._token = 0
            return False
        self._renewed_at, self._lost = begun, None
        return True

    def _highest(self) -> int:
        """The greatest token that any guarded document bears."""
        tokens = [0]
        for name in GUARDED:
            with contextlib.suppress(NotThere):
                tokens.append(fencing.read(self._storage, f"{self.run_id}/{name}").get(fencing.TOKEN, 0))
        return max(tokens)

    def _keeps_conditions(self) -> bool:
        """Whether the store refuses to write what is there already. Should it not, it was the same text."""
        try:
            self._version = self._storage.write(self._name, self._text(), if_absent=True)
        except Conflict:
            return True
        return False

    def _own(self) -> None:
        """See that the lease is still this owner's, and at which version. Raises `Fenced`."""
        found = standing(self._storage, self.run_id)
        if found is not None and (found.token, found.mark) == (self._token, self._mark):
            self._version = found.version
            return
        if found is None:
            self._lost = f"run {self.run_id} was deleted from {self._storage.uri}"
        else:
            self._lost = f"run {self.run_id} belongs to {found.owner} now (owner {found.token}; this was {self._token})"
        raise Fenced(self._lost)

    def _claim(self) -> None:
        """Put this owner's token on all that is guarded: from here on nothing of an older owner is accepted."""
        for name in GUARDED:
            fencing.change(
                self._storage,
                f"{self.run_id}/{name}",
                self._token,
                lambda document: document,
                makes=name == COMMITTED,  # a first one of an older owner's would count
            )

    def _keep(self) -> None:
        wait_s = self.period_s / 3
        while not self._enough.wait(wait_s):
            try:
                self.renew()
                wait_s = self.period_s / 3
            except Fenced:
                return
            except StorageError:
                wait_s = self.period_s / 10  # `check` says it once it matters

    def _text(self, until: float | None = None) -> bytes:
        said = {
            "token": self._token,
            "owner": self.owner,
            "until": round(self._wall() + self.period_s, 3) if until is None else until,
            "period_s": self.period_s,
            "mark": self._mark,
        }
        return json.dumps(said, indent=2).encode()


def _name(run_id: str) -> str:
    return f"{run_id}/lease.json"
