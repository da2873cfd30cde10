"""One per run: holds the lease, reserves the run's resources with Ray, hosts the agent, and keeps the record.

A Ray job of its own, in its own session: it outlives the terminal that submitted it. On the embedded cluster a
driver waits, already connected, for the next run, so that a submit does not pay for an interpreter and `ray.init`.

    python -m dtrain.runtime --run FOLDER ...              drive this run
    python -m dtrain.runtime --wait ...                    wait in the cluster's folder for the next one

On other clusters `dtrain.runtime.remote` starts it: there somebody submits the run again when its driver is lost, so
one that has to leave, leaves the run under way.
"""

import argparse
import contextlib
import fcntl
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any, Protocol

from dtrain.errors import ClusterError, DtrainError, RetriesExhausted, StorageError, from_kind
from dtrain.plan import AnyPlan, ScriptPlan
from dtrain.runs import ENDED, Record, Run
from dtrain.runs import Attempt as AttemptRecord
from dtrain.runtime import retry
from dtrain.runtime.hosts import AgentHost, EmbeddedHost, PlacedHost
from dtrain.runtime.joining import await_run, is_alive, join, watch
from dtrain.runtime.reservation import Reservation, answers, connect
from dtrain.runtime.retry import Failure
from dtrain.runtime.zygote import Zygote

LEASE_WAIT_S = 10.0
POLL_S = 0.1
HEAD_CHECK_S = 1.0
HEAD_SILENT_S = 20.0
"""For so long a head on another machine may refuse connections."""
LEAVING_S = 3.0
"""How long a node that said so takes to be gone: one would be given its place again."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = arguments_of(argv)
    command = [sys.executable, "-m", "dtrain.runtime", *_common(arguments)]
    waiting_command = [*command, "--wait"]
    until = watch(arguments.until)
    ray: Any = None
    run_path = arguments.run
    try:
        if arguments.wait:
            ray = join(arguments, "waiting for a run", until)
            Zygote.connect(arguments.folder, arguments.until).close()
            run_path = await_run(arguments.folder, until)
            if run_path is None:
                return 0
        with open(Path(run_path) / "logs" / "driver.log", "ab", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        driver = Driver(Run(Path(run_path)), arguments, [*command, "--run", str(run_path)], until)
        driver.drive(ray)
        return 0
    except DtrainError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    finally:
        if arguments.spare and not (arguments.wait and run_path is None) and is_alive(until):
            log_file = _log(arguments)
            subprocess.Popen(
                waiting_command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file, start_new_session=True
            )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # Ray's own shutdown takes a second, and longer when its head is gone


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
        self._agents: dict[int, Connection] = {}
        self._store: list[Any] | None = None
        self._end: dict[str, Any] | None = None
        self._stop: str | None = None
        self._is_stop_sent = False
        self._cluster_lost: str | None = None
        self._next_check = 0.0
        self._head_seen = time.monotonic()
        self._new: list[Connection] = []
        self._lease = -1
        self._reservation: Reservation | None = None

    def drive(self, ray: Any) -> None:
        """Run to the end; whatever happens is in the record before this returns."""
        self._lease = self._acquire() if self._arguments.lease is None else self._run.adopt(self._arguments.lease)
        signal.signal(signal.SIGTERM, lambda *_: self._leave())
        record = self._run.stored_record()
        if record.state in ENDED:
            return
        self._attempts = [a.model_dump() for a in record.attempts]
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
        secret = secrets.token_bytes(32)
        listener = Listener((self._address(), 0), backlog=64, authkey=secret)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        earlier = [_failure_of(a) for a in self._attempts if a["failure"]]
        try:
            while self._end is None:
                host = self._make_host(reservation, listener.address, secret)
                try:
                    lost = self._serve(host)
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
            listener.close()

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

    def _make_host(self, reservation: Reservation | None, address: Any, secret: bytes) -> AgentHost:
        args = {
            "run": str(self._run.path),
            "attempts": self._attempts,
            "driver": list(address),
            "secret": secret.hex(),
            "host": address[0],
        }
        self._agents, self._store, self._is_stop_sent = {}, None, False
        if self._away is not None:
            args["away"] = self._away.agent_args
        if self._arguments.placed or self._plan.workers.num_nodes > 1:
            assert reservation is not None
            return PlacedHost(args, self._plan, reservation)
        args["driver_command"] = self._command
        args["gpus"] = reservation.gpus() if reservation is not None else []
        return EmbeddedHost(args, self._arguments.folder, self._arguments.until, self._lease)

    def _serve(self, host: AgentHost) -> Failure | None:
        """Relay until the agent has said how it came out (None), or is gone (the failure)."""
        dying: float | None = None
        while True:
            for agent in self._new[:]:
                self._new.remove(agent)
                self._agents[-id(agent)] = agent
            ready = wait([*self._agents.values(), *host.sentinels()], timeout=POLL_S)
            for key, agent in list(self._agents.items()):
                if agent in ready:
                    self._read(key, agent)
            self._look_around()
            if self._stop_reason is not None and 0 in self._agents and not self._is_stop_sent:
                self._is_stop_sent = True
                if self._stop is not None:
                    self._update(state="stopping", cause=f"stopping: asked by {self._stop}")
                for agent in self._agents.values():
                    self._send_stop(agent)
            if self._end is not None and not host.is_alive():
                return None
            if host.is_alive() or self._new:
                dying = None
                continue
            # Its last message may still be on the way.
            dying = dying or time.monotonic() + 1.0
            if not self._agents or time.monotonic() > dying:
                return None if self._end is not None else Failure("agent", host.how_it_ended(), self._step())

    def _read(self, key: int, agent: Connection) -> None:
        try:
            message = agent.recv()
        except (EOFError, OSError):
            self._agents.pop(key, None)
            return
        if "hello" in message:
            self._agents.pop(key, None)
            self._agents[message["hello"]] = agent
            if self._store is not None and message["hello"] != 0:
                agent.send({"store": self._store})
            if self._is_stop_sent:
                self._send_stop(agent)
        elif "store" in message:
            self._store = list(message["store"])
            for node, follower in self._agents.items():
                if node > 0:
                    follower.send({"store": self._store})
        elif "event" in message:
            self._run.event(**message["event"])
        elif "preempted" in message:
            self._preempt(f"node {message['preempted']}")
        elif "record" in message:
            changes = message["record"]
            if "attempts" in changes:
                self._attempts = changes["attempts"]
                changes["attempts"] = tuple(AttemptRecord.model_validate(a) for a in self._attempts)
            if changes.get("state") == "running" and self._run.stored_record().started_at is None:
                changes["started_at"] = time.time()
            if self._stop is not None:
                changes.pop("state", None)
            self._update(**changes)
        elif "end" in message and (self._end is None or key == 0):
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

    def _send_stop(self, agent: Connection) -> None:
        with contextlib.suppress(OSError):
            agent.send({"stop": self._stop_reason})

    def _accept(self, listener: Listener) -> None:
        while True:
            try:
                self._new.append(listener.accept())
            except OSError:
                return  # closed
            except Exception as error:  # somebody without the secret
                print(f"a connection was refused: {error}", file=sys.stderr)

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
            self._update(attempts=tuple(AttemptRecord.model_validate(a) for a in self._attempts))

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


def _log(arguments: argparse.Namespace) -> Any:
    return open(arguments.folder / "drivers.log", "ab")


def _failure_of(attempt: dict[str, Any]) -> Failure:
    return Failure(attempt["failure"], attempt["cause"] or "", attempt["last_step"] or 0)


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Drive a run.")
    parser.add_argument("--run", type=Path, help="the run folder")
    parser.add_argument("--wait", action="store_true", help="wait for a run to be handed over")
    parser.add_argument("--address", required=True, help="host:port of the Ray head")
    parser.add_argument("--token", type=Path, help="file with Ray's authentication token")
    parser.add_argument("--folder", type=Path, required=True, help="folder of sockets on this node")
    parser.add_argument("--until", type=int, default=0, help="process not to outlive")
    parser.add_argument("--again", action="store_true", help="the run's driver before this one was lost")
    parser.add_argument("--placed", action="store_true", help="let Ray Train place the agents, also of one node")
    parser.add_argument("--lease", type=int, help="descriptor of the run's lease, inherited")
    parser.add_argument("--turn", type=int, help="descriptor of the lock that lets this run begin before Ray is up")
    parser.add_argument("--spare", action="store_true", help="leave a waiting driver behind")
    return parser.parse_args(argv)


def _common(arguments: argparse.Namespace) -> list[str]:
    words = ["--address", arguments.address, "--folder", str(arguments.folder), "--until", str(arguments.until)]
    words += ["--token", str(arguments.token)] if arguments.token else []
    return words + (["--spare"] if arguments.spare else [])
