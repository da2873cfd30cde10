"""One per run: holds the lease, reserves the run's resources with Ray, hosts the agent, and keeps the record.

It outlives the terminal that submitted the run: see `dtrain/runtime/entry.py` for its process.
"""

import argparse
import contextlib
import fcntl
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any, Protocol

from dtrain.errors import ClusterError, DtrainError, RetriesExhausted, StorageError, from_kind
from dtrain.plan import AnyPlan, ScriptPlan
from dtrain.runs import ENDED, Record, Run
from dtrain.runs import Attempt as AttemptRecord
from dtrain.runtime import retry
from dtrain.runtime.hosts import AgentHost, EmbeddedHost, PlacedHost
from dtrain.runtime.joining import is_alive, join
from dtrain.runtime.line import AgentLines
from dtrain.runtime.reservation import Reservation, answers, connect
from dtrain.runtime.retry import Failure
from dtrain.settings import convert, to_builtins

LEASE_WAIT_S = 10.0
POLL_S = 0.1
HEAD_CHECK_S = 1.0
HEAD_SILENT_S = 20.0
"""For so long a head on another machine may refuse connections."""
LEAVING_S = 3.0
"""How long a node that said so takes to be gone: one would be given its place again."""


class Away(Protocol):
    """What a driver knows of a storage that its run's folder is carried to."""

    agent_args: dict[str, Any]
    """Storage, id and owner's token, for the agents."""

    def leave_if_lost(self) -> None:
        """End this process when somebody else owns the run."""

    def hurry(self) -> None:
        """Carry what was just written."""


class Driver:
    """Drives one run from its lease to its end."""

    def __init__(
        self, run: Run, arguments: argparse.Namespace, command: list[str], until: int, away: Away | None = None
    ) -> None:
        self._run, self._arguments, self._command, self._until = run, arguments, command, until
        self._away = away
        self._is_told_to_leave = False
        """By the cluster: the run is to go on elsewhere."""
        self._preempted: str | None = None
        """Which nodes are about to go away."""
        self._plan: AnyPlan = run.plan
        self._attempts: list[dict[str, Any]] = []
        self._end: dict[str, Any] | None = None
        self._stop: str | None = None
        self._cluster_lost: str | None = None
        self._next_check = 0.0
        self._head_seen = time.monotonic()
        self._lease = -1
        self._reservation: Reservation | None = None

    def drive(self, ray: Any) -> None:
        """Run to the end; whatever happens is in the record before this returns."""
        self._lease = self._acquire() if self._arguments.lease is None else self._run.adopt(self._arguments.lease)
        signal.signal(signal.SIGTERM, lambda *_: self._leave())
        record = self._run.stored_record()
        if record.state in ENDED:
            return
        self._attempts = [to_builtins(a) for a in record.attempts]
        again = self._arguments.again or (self._arguments.placed and record.driver_pid is not None)
        if again and not self._arguments.again:
            self._run.event("driver-lost", message=f"the driver before this one (pid {record.driver_pid}) is gone")
            self._close_attempt(Failure("agent", "the driver was lost", self._step()), is_failure=False)
        self._update(driver_pid=os.getpid(), state="queued", cause="waiting for resources", ended_at=None)
        if again:
            self._update(submissions=record.submissions + 1)
        marker = self._arguments.folder / "drivers" / str(os.getpid())
        try:
            marker.parent.mkdir(exist_ok=True)
            marker.write_text(str(self._run.path))
            if again:
                self._check_budget()
            if self._arguments.turn is not None:
                threading.Thread(target=self._reserve_behind, args=(self._arguments.turn,), daemon=True).start()
                self._host(None)
            elif self._await_turn():
                ray = ray or join(self._arguments, self._run.id, self._until)
                self._reservation = Reservation(ray, self._plan, self._run.id)
                if self._await_resources(self._reservation):
                    self._host(self._reservation)
        except DtrainError as error:
            self._end = {"state": "failed", "error_kind": error.kind, "error": error.message, "cause": error.message}
        except Exception as error:
            text = traceback.format_exc()
            print(text, file=sys.stderr)
            cause = f"dtrain's driver failed: {type(error).__name__}: {error}"
            self._end = {"state": "failed", "error_kind": "internal", "error": text, "cause": cause}
        finally:
            self._finish()
            if self._reservation is not None and self._cluster_lost is None:
                self._reservation.release()
            with contextlib.suppress(OSError):
                marker.unlink()

    def _check_budget(self) -> None:
        lost = sum(event["event"] == "driver-lost" for event in self._run.events())
        if lost > self._plan.retry.driver:
            raise RetriesExhausted(
                f"retry.driver allows {self._plan.retry.driver}, all used: the driver was lost {lost} times"
            )

    # -- waiting -------------------------------------------------------------------------------------------

    def _acquire(self) -> int:
        deadline = time.monotonic() + LEASE_WAIT_S
        while True:
            try:
                return self._run.acquire()
            except StorageError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _reserve_behind(self, turn: int) -> None:
        """The first run of a cluster that is just starting begins at once, and reserves when Ray is there.

        Nobody can have been before it: it holds the turn, for which all others wait, until its request is made.
        """
        try:
            ray = connect(self._arguments.address, self._arguments.token, self._run.id)
            self._reservation = Reservation(ray, self._plan, self._run.id)
        except Exception as error:
            self._lose_cluster(error.message if isinstance(error, DtrainError) else f"Ray did not start: {error}")
        finally:
            os.close(turn)

    def _await_turn(self) -> bool:
        """Until the first run of the cluster has reserved what it needs; False when asked to stop meanwhile."""
        turn = os.open(
            self._arguments.folder / f"turn-{self._arguments.until}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(turn, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return True
                if self._is_over_before_it_began():
                    return False
                time.sleep(0.05)
        finally:
            os.close(turn)

    def _is_over_before_it_began(self) -> bool:
        self._look_around()
        if self._cluster_lost:
            raise ClusterError(self._cluster_lost)
        if self._stop is None:
            return False
        self._end = {"state": "stopped", "error_kind": "stopped", "cause": f"stopped by {self._stop} while queued"}
        return True

    def _await_resources(self, reservation: Reservation) -> bool:
        told = ""
        while not reservation.is_ready(0.5 if told else 2.0):
            if self._is_over_before_it_began():
                return False
            why = reservation.why_waiting()
            if why != told:
                told = why
                self._update(cause=why)
                self._run.event("waiting", message=why)
        return True

    # -- hosting -------------------------------------------------------------------------------------------

    def _host(self, reservation: Reservation | None) -> None:
        lines = AgentLines(self._address())
        earlier = [_failure_of(a) for a in self._attempts if a["failure"]]
        try:
            while self._end is None:
                lines.begin()
                host = self._make_host(reservation, lines)
                try:
                    lost = self._serve(host, lines)
                finally:
                    host.close()
                if lost is None:
                    return
                if self._preempted is not None:
                    cause, self._preempted = f"stopped for {self._preempted}", None
                    self._close_attempt(Failure("agent", cause, lost.step), is_failure=False)
                    self._update(state="recovering", cause=cause)
                    self._pause(LEAVING_S)
                    continue
                decision = retry.decide(lost, earlier, self._plan.retry)
                earlier.append(lost)
                self._close_attempt(lost)
                self._run.event("failure", message=lost.cause, failure="agent", retry=decision.again)
                if not decision.again:
                    self._end = {"state": "failed", "error_kind": "retries-exhausted", "cause": decision.reason}
                    return
                self._update(state="recovering", cause=lost.cause)
        finally:
            lines.close()

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._stop is None and time.monotonic() < deadline:
            self._look_around()
            time.sleep(POLL_S)

    def _address(self) -> str:
        """Where agents reach this process: on the head's own machine, unless Ray Train places them."""
        if not self._arguments.placed:
            return str(self._arguments.address.rpartition(":")[0])
        from ray.util import get_node_ip_address

        return str(get_node_ip_address())

    def _make_host(self, reservation: Reservation | None, lines: AgentLines) -> AgentHost:
        args: dict[str, Any] = {
            "run": str(self._run.path),
            "attempts": self._attempts,
            "driver": list(lines.address),
            "secret": lines.secret.hex(),
            "host": lines.address[0],
        }
        if self._away is not None:
            args["away"] = self._away.agent_args
        if self._arguments.placed or self._plan.workers.num_nodes > 1:
            assert reservation is not None
            return PlacedHost(args, self._plan, reservation)
        args["driver_command"] = self._command
        args["gpus"] = reservation.gpus() if reservation is not None else []
        return EmbeddedHost(args, self._arguments.folder, self._arguments.until, self._lease)

    def _serve(self, host: AgentHost, lines: AgentLines) -> Failure | None:
        """Relay until the agent has said how it came out (None), or is gone (the failure)."""
        dying: float | None = None
        while True:
            for node, message in lines.heard(host.sentinels(), POLL_S):
                self._note(node, message)
            self._look_around()
            if self._stop_reason is not None and lines.has_leader and not lines.is_stop_told:
                if self._stop is not None:
                    self._update(state="stopping", cause=f"stopping: asked by {self._stop}")
                lines.tell_to_stop(self._stop_reason)
            if self._end is not None and not host.is_alive():
                return None
            if host.is_alive() or lines.is_one_arriving:
                dying = None
                continue
            # Its last message may still be on the way.
            dying = dying or time.monotonic() + 1.0
            if not lines.is_any_open or time.monotonic() > dying:
                return None if self._end is not None else Failure("agent", host.how_it_ended(), self._step())

    def _note(self, node: int, message: dict[str, Any]) -> None:
        """Take in what an agent says."""
        if "event" in message:
            self._run.event(**message["event"])
        elif "preempted" in message:
            self._preempt(f"node {message['preempted']}")
        elif "record" in message:
            changes = message["record"]
            if "attempts" in changes:
                self._attempts = changes["attempts"]
                changes["attempts"] = tuple(convert(a, AttemptRecord) for a in self._attempts)
            if changes.get("state") == "running" and self._run.stored_record().started_at is None:
                changes["started_at"] = time.time()
            if self._stop is not None:
                changes.pop("state", None)
            self._update(**changes)
        elif "end" in message and (self._end is None or node == 0):
            moves = self._preempted is not None and self._stop is None and message["end"]["state"] == "stopped"
            if not moves:
                self._end = message["end"]

    @property
    def _stop_reason(self) -> str | None:
        return self._stop or self._preempted

    def _preempt(self, what: str) -> None:
        """The agents put the state on storage and end, and others go on elsewhere."""
        self._preempted = self._preempted or f"the notice that {what} goes away"
        self._run.event("preempted", message=f"{what} is about to go away: a checkpoint, then on elsewhere")

    # -- looking around --------------------------------------------------------------------------------------

    def _look_around(self) -> None:
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + (HEAD_CHECK_S if self._cluster_lost else 0.2)
        if self._away is not None:
            self._away.leave_if_lost()
        if self._stop is None and (who := self._run.stop_requested) is not None:
            self._stop = who
        if self._cluster_lost is None and self._is_head_gone(now):
            self._lose_cluster(f"the Ray head at {self._arguments.address} is gone")

    def _is_head_gone(self, now: float) -> bool:
        """Known at once of a process of this machine; elsewhere a connection may fail for other reasons."""
        if self._head_is_there():
            self._head_seen = now
            return False
        return not self._arguments.placed or now - self._head_seen > HEAD_SILENT_S

    def _lose_cluster(self, why: str) -> None:
        self._cluster_lost = why
        what = "ending the script" if isinstance(self._plan, ScriptPlan) else "writing a last checkpoint"
        self._run.event("cluster-lost", message=f"{why}: {what}")
        self._stop = self._stop or why

    def _head_is_there(self) -> bool:
        return is_alive(self._until) and (self._until >= 0 or answers(self._arguments.address))

    def _leave(self) -> None:
        self._is_told_to_leave = self._stop is None
        self._stop = self._stop or "the cluster, which is being taken down"

    # -- the record ------------------------------------------------------------------------------------------

    def _step(self) -> int:
        lines = self._run.metrics()[-1:] or [self._run.stored_record().latest]
        return int(lines[0].get("step", 0))

    def _close_attempt(self, failure: Failure, is_failure: bool = True) -> None:
        if self._attempts and self._attempts[-1]["ended_at"] is None:
            self._attempts[-1] |= {
                "ended_at": time.time(),
                "cause": failure.cause,
                "failure": failure.kind if is_failure else None,
                "last_step": failure.step,
            }
            self._update(attempts=tuple(convert(a, AttemptRecord) for a in self._attempts))

    def _update(self, **changes: Any) -> None:
        try:
            self._run.update(**changes)
        except StorageError as error:  # a full disk must not end the run
            print(error.message, file=sys.stderr)
        if self._away is not None and "state" in changes:
            self._away.hurry()

    def _finish(self) -> None:
        end = self._end or {"state": "failed", "error_kind": "internal", "cause": "the driver ended without a result"}
        must_leave = self._is_told_to_leave or self._cluster_lost
        if self._arguments.placed and must_leave and end["state"] == "stopped":
            # Whoever submitted the run sees that it is not over, and that nobody drives it.
            self._update(state="recovering", cause=end["cause"])
            return
        if self._cluster_lost and end["state"] == "stopped":
            cause = f"{self._cluster_lost}; `dtrain resume {self._run.id}` goes on"
            end = {**end, "state": "failed", "error_kind": "cluster", "error": cause, "cause": cause}
        kind = end.get("error_kind")
        changes: dict[str, Any] = {
            "state": end["state"],
            "cause": end["cause"],
            "error_kind": kind,
            "error": end.get("error") or (end["cause"] if kind else None),
            "outcome": end.get("outcome") or {},
            "exit_code": from_kind(kind, "").exit_code if kind else 0,
            "ended_at": time.time(),
        }
        for _ in range(50):  # the one write that must not be lost: wait a little for space
            try:
                final: Record = self._run.update(**changes)
            except StorageError as error:
                print(error.message, file=sys.stderr)
                time.sleep(0.2)
            else:
                print(f"{final.state}: {final.cause}", file=sys.stderr)
                return


def _failure_of(attempt: dict[str, Any]) -> Failure:
    return Failure(attempt["failure"], attempt["cause"] or "", attempt["last_step"] or 0)
