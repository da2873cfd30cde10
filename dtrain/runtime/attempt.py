"""One try of a run on one node: fork the ranks, watch them, and when one is lost, save what can be saved."""

import contextlib
import math
import os
import re
import select
import selectors
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.checkpoint.snapshot import held_step
from dtrain.messages import pair, receive, send
from dtrain.plan import AnyPlan, Plan, ScriptPlan
from dtrain.runtime import watchdog
from dtrain.runtime.control import Control
from dtrain.runtime.rendezvous import Agreement
from dtrain.runtime.retry import Failure, FailureKind
from dtrain.runtime.zygote import Child, Zygote

GRACE_S = 2.0
"""How long survivors get to notice that another rank is gone."""
RESCUE_S = 60.0
LEAVE_S = 30.0
"""How long a script gets to end by itself when the run is to stop; as long as `torchrun` gives it."""
WRITER_S = 1.0
STACKS_S = 0.3
"""How long a hung rank gets to write down where it is."""
WATCH_EVERY_S = 0.25
TURN_S = 0.05
NOTICE_S = 2.0
"""How long before it happens the agents of all nodes are told when to stop."""


@dataclass
class Rank:
    number: int
    """Over all nodes."""
    local: int
    child: Child
    channel: socket.socket
    is_ready: bool = False
    done: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    rescued: int | None = None
    is_gone: bool = False
    settled_at: float = 0.0
    """When it was first known to be gone or to have failed."""

    @property
    def is_settled(self) -> bool:
        """Nothing more is to be expected of it without being asked."""
        return self.is_gone or self.error is not None or self.done is not None


@dataclass(frozen=True)
class Report:
    """How an attempt ended on this node."""

    outcome: dict[str, Any] | None
    """What the ranks came to; None when the attempt failed."""
    failures: list[Failure] = field(default_factory=list)
    snapshot_step: int | None = None
    step: int = 0
    """Steps completed by the rank that came furthest."""


@dataclass(frozen=True)
class Node:
    """What stays the same over the attempts of one agent."""

    run_path: Path
    plan: AnyPlan
    number: int
    zygote: Zygote
    selector: selectors.BaseSelector
    snapshot_path: Path
    control_path: Path
    store_host: str
    store_port: int
    agreement: Agreement
    gpus: tuple[str, ...] = ()
    """Those of this node that are the run's, as CUDA numbers them; empty where the run may see all."""


class Attempt:
    """The ranks of one attempt."""

    def __init__(
        self,
        node: Node,
        generation: int,
        restore: Mapping[str, Any],
        writing_step: Callable[[], int],
        on_message: Callable[[dict[str, Any]], None],
    ) -> None:
        self._node, self._generation = node, generation
        self._on_message = on_message
        self.control = Control.create(node.control_path, node.plan.workers.per_node)
        self.control.writing_step = writing_step()
        self._writing_step = writing_step
        self._started = time.monotonic()
        self._first_step_at: float | None = None
        self._first_step = int(restore["step"])
        self._next_watch = 0.0
        self._is_script = isinstance(node.plan, ScriptPlan)
        self._is_compiled = isinstance(node.plan, Plan) and node.plan.train.compile
        self._silence = watchdog.Silence()
        self._leave_by = float("inf")
        self.ranks = [self._fork(local, restore) for local in range(node.plan.workers.per_node)]

    # -- watching ------------------------------------------------------------------------------------------

    def watch(self, turn: Callable[[float], None], wants_stop: Callable[[], bool]) -> Report:
        """Serve events with `turn` until all ranks are done or the attempt has failed; no rank is left alive."""
        try:
            while True:
                turn(TURN_S)
                if self._is_spread:
                    if self._leaves_unready(wants_stop()):
                        return Report({"steps": self._first_step}, step=self._first_step)
                elif wants_stop() and not self.control.stop:
                    self.control.stop = 1
                    self._leave_by = time.monotonic() + LEAVE_S
                    for rank in self.ranks if self._is_script else ():
                        rank.child.kill(signal.SIGTERM)
                if self.control.stop and self._is_script:
                    if all(rank.is_settled for rank in self.ranks) or time.monotonic() > self._leave_by:
                        return Report({"steps": self.step}, step=self.step)
                    continue
                if self.control.stop and not all(rank.is_ready for rank in self.ranks):
                    return Report({"steps": self._first_step}, step=self._first_step)  # nothing new to keep
                if all(rank.done is not None for rank in self.ranks):
                    return Report(self.ranks[0].done, step=self.step)
                if any(rank.error or (rank.is_gone and rank.done is None) for rank in self.ranks):
                    return self._fail([], turn)
                if self._node.agreement.has_failed(self._generation):
                    return self._fail([], turn)
                now = time.monotonic()
                if now >= self._next_watch:
                    self._next_watch = now + WATCH_EVERY_S
                    hung = self._hung(now)
                    if hung:
                        return self._fail(hung, turn)
        finally:
            self._end()

    @property
    def _is_spread(self) -> bool:
        """Whether the ranks of other nodes must leave after the same step as ours."""
        return self._node.plan.workers.num_nodes > 1 and not self._is_script

    def _leaves_unready(self, wants_stop: bool) -> bool:
        """The first node's agent names a step that lies far enough ahead for every agent to hear of it in time.

        The others do as it says, whatever they know themselves. True where nothing was begun that could be kept.
        """
        agreement = self._node.agreement
        if self.control.last_step:
            return False
        if self._node.number > 0:
            self.control.last_step = agreement.last_step(self._generation)
            return False
        if not wants_stop:
            return False
        if not all(rank.is_ready for rank in self.ranks):
            agreement.fail(self._generation)  # the others may be waiting for these ranks
            return True
        done = max(self.step - self._first_step, 1)
        pace = (time.monotonic() - (self._first_step_at or self._started)) / done
        last = self.step + max(2, math.ceil(NOTICE_S / pace))
        agreement.stop_after(self._generation, last)
        self.control.last_step = last
        return False

    @property
    def step(self) -> int:
        """Steps completed by the rank that came furthest."""
        beats = (self.control.last_beat(rank.local) for rank in self.ranks)
        seen = [beat.step for beat in beats if beat is not None]
        return max([self._first_step, *seen])

    def _hung_script(self, now: float) -> list[Rank]:
        """Scripts are heard of through their reports; without any, only a rank stopped by a signal is noticed."""
        retry = self._node.plan.retry
        stopped = [rank for rank in self.ranks if _is_stopped(rank.child.pid)]
        beats = [beat for rank in self.ranks if (beat := self.control.last_beat(rank.local)) is not None]
        num_reports = max((beat.micro for beat in beats), default=0)
        self._silence.hear(max((beat.time for beat in beats), default=None), num_reports)
        limit = watchdog.script_timeout(self._silence.longest_s, retry.hang_timeout_s, retry.start_timeout_s)
        if watchdog.is_hung(beats, now, limit):
            return stopped or [rank for rank in self.ranks if not rank.is_settled]
        return stopped if self._silence.stopped_for(bool(stopped), now) > retry.hang_timeout_s else []

    def _hung(self, now: float) -> list[Rank]:
        if self._is_script:
            return self._hung_script(now)
        beats = {rank.local: beat for rank in self.ranks if (beat := self.control.last_beat(rank.local)) is not None}
        retry = self._node.plan.retry
        if len(beats) < len(self.ranks):
            late = [rank for rank in self.ranks if rank.local not in beats]
            return late if now - self._started > retry.start_timeout_s else []
        done = self.step - self._first_step
        if done >= 1 and self._first_step_at is None:
            self._first_step_at = now
        usual = None
        if self._first_step_at is not None and done >= 2:
            usual = (now - self._first_step_at) / (done - 1)
        elif self._first_step_at is not None:
            usual = float("inf")
        limit = watchdog.timeout(usual, retry.hang_timeout_s, retry.start_timeout_s)
        if watchdog.takes_any_time((beat.phase for beat in beats.values()), is_compiled=self._is_compiled):
            limit = max(limit, retry.start_timeout_s)
        if not watchdog.is_hung(list(beats.values()), now, limit):
            return []
        stopped = [rank for rank in self.ranks if _is_stopped(rank.child.pid)]
        return stopped or [self.ranks[local] for local in watchdog.culprits(beats)]

    # -- failing -------------------------------------------------------------------------------------------

    def _fail(self, hung: list[Rank], turn: Callable[[float], None]) -> Report:
        """Find out what happened, copy a survivor's state into the snapshot if it is newer, and end all ranks."""
        self._node.agreement.fail(self._generation)
        failures = [self._hang(rank) for rank in hung]
        if hung:
            _wait(turn, lambda: False, STACKS_S)
            for rank in hung:
                rank.child.kill()
        # NCCL tells survivors nothing: waiting for them to notice would be in vain.
        if not self._is_final() and self._node.plan.workers.collectives == "gloo":
            _wait(turn, lambda: all(rank.is_settled for rank in self.ranks), GRACE_S)
        failures += self._failures(hung)
        step = self.step
        snapshot_step = self._rescue(turn) if not self._is_final() else self._snapshot_step()
        return Report(None, failures, snapshot_step, step)

    def _is_final(self) -> bool:
        return any(rank.error is not None and rank.error["kind"] not in ("peer", "killed") for rank in self.ranks)

    def _hang(self, rank: Rank) -> Failure:
        beat = self.control.last_beat(rank.local)
        where = f"{beat.place} for {time.monotonic() - beat.time:.0f} s" if beat else "starting"
        if self._is_script:
            where = f"{self._where(rank)}, silent for {time.monotonic() - (self._silence.heard or self._started):.0f} s"
        if _is_stopped(rank.child.pid):
            return Failure("hung", f"rank {rank.number} was stopped by a signal, {where}", self.step)
        rank.child.kill(signal.SIGUSR2)  # its stacks go to its log
        return Failure("hung", f"rank {rank.number} hung {where}; its stacks are in rank-{rank.number}.log", self.step)

    def _failures(self, hung: list[Rank]) -> list[Failure]:
        """What went wrong, causes before consequences."""
        causes, consequences = [], []
        for rank in self.ranks:
            error = rank.error
            if error is not None and error["kind"] != "peer":
                causes.append(_from_error(rank, error, self._is_script))
            elif error is not None:
                cause = f"rank {rank.number} lost its peers: {error['error'].splitlines()[0]}"
                consequences.append(Failure("exited", cause, error["step"]))
            elif rank.is_gone and rank.done is None and rank not in hung:
                causes.append(self._from_exit(rank))
        if self._is_script and len(causes) > 1:
            # What its peers say of a lost rank may be anything, in a script: what came first was the cause.
            failed = [rank for rank in self.ranks if rank.settled_at and rank.done is None and rank not in hung]
            first = min(failed, key=lambda rank: rank.settled_at).number
            causes = [failure for failure in causes if re.match(rf"rank {first}\b", failure.cause)][:1] or causes
        return causes + ([] if hung else consequences)

    def _from_exit(self, rank: Rank) -> Failure:
        status = self._node.zygote.wait(rank.child, GRACE_S)
        where = self._where(rank)
        if status is not None and status < 0:
            return Failure("killed", f"rank {rank.number} was killed by {_signal_name(-status)} {where}", self.step)
        cause = f"rank {rank.number} left with exit code {status} {where}, before the work was done"
        return Failure("exited", cause, self.step)

    def _where(self, rank: Rank) -> str:
        if self._is_script:
            return f"after step {self.step} was reported" if self.step else "before a step was reported"
        beat = self.control.last_beat(rank.local)
        return beat.place if beat else "before its first step"

    def _snapshot_step(self) -> int | None:
        return held_step(self._node.snapshot_path, len(self.ranks))

    def _rescue(self, turn: Callable[[float], None]) -> int | None:
        """Let the survivor that came furthest copy its state; returns the step the snapshot then holds."""
        if self._writing_step():
            # The writer is reading it. A short wait costs less than the steps done since; after a long one, what the
            # snapshot holds is good enough.
            _wait(turn, lambda: not self._writing_step(), WRITER_S)
        held = self._snapshot_step()
        if self._writing_step():
            return held
        survivors = [r for r in self.ranks if r.error is not None and r.error.get("can_rescue") and not r.is_gone]
        best = max(survivors, key=lambda r: r.error["step"], default=None)  # type: ignore[index]
        if best is None or best.error is None or (held is not None and best.error["step"] <= held):
            return held
        send(best.channel, {"rescue": True})
        _wait(turn, lambda: best.rescued is not None or best.is_gone, RESCUE_S)
        return self._snapshot_step()

    # -- ranks ---------------------------------------------------------------------------------------------

    def _fork(self, local: int, restore: Mapping[str, Any]) -> Rank:
        node, workers = self._node, self._node.plan.workers
        number = node.number * workers.per_node + local
        ours, theirs = pair()
        args = {
            "run": str(node.run_path),
            "node": node.number,
            "rank": number,
            "world": workers.total,
            "local_rank": local,
            "local_world": workers.per_node,
            "generation": self._generation,
            "restore": dict(restore),
            "snapshot": str(node.snapshot_path),
            "control": str(node.control_path),
            "host": node.store_host,
            "port": node.store_port,
            "gpus": list(node.gpus),
        }
        log_path = node.run_path / "logs" / f"rank-{number}.log"
        with open(log_path, "ab", buffering=0) as log:
            begins = "" if self._is_script else f", from step {restore['step']}"
            with contextlib.suppress(OSError):
                log.write(f"--- attempt {self._generation}{begins} ---\n".encode())
            entry = "dtrain.runtime.script:main" if self._is_script else "dtrain.runtime.rank:main"
            child = node.zygote.fork(entry, args, [theirs.fileno()], log.fileno(), f"rank-{number}")
        theirs.close()
        rank = Rank(number, local, child, ours)
        node.selector.register(ours, selectors.EVENT_READ, lambda: self._read(rank))
        node.selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._gone(rank))
        return rank

    def _read(self, rank: Rank) -> None:
        message = receive(rank.channel)
        if message is None:
            self._unregister(rank.channel)
        elif "error" in message:
            rank.error, rank.settled_at = message, rank.settled_at or time.monotonic()
        elif "done" in message:
            rank.done = message["done"]
        elif "rescued" in message:
            rank.rescued = message["rescued"]
        else:
            rank.is_ready = rank.is_ready or "ready" in message
            self._on_message(message)

    def _gone(self, rank: Rank) -> None:
        self._unregister(rank.child.pidfd)
        # Its last words may still lie in the channel, whose other end a process that it started may hold open.
        while rank.channel in self._node.selector.get_map() and select.select([rank.channel], [], [], 0)[0]:
            self._read(rank)
        self._unregister(rank.channel)
        rank.is_gone, rank.settled_at = True, rank.settled_at or time.monotonic()
        is_silent = self._is_script and rank.done is None and rank.error is None
        if is_silent and self._node.zygote.wait(rank.child, GRACE_S) == 0:
            rank.done = {"steps": self.step, "metrics": {}}  # os._exit(0) ends a script well

    def _unregister(self, file: Any) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._node.selector.unregister(file)

    def _end(self) -> None:
        for rank in self.ranks:
            if rank.done is None:
                rank.child.kill()
            if self._is_script:  # with all that it started
                with contextlib.suppress(OSError):
                    os.killpg(rank.child.pid, signal.SIGKILL)
        for rank in self.ranks:
            if self._node.zygote.wait(rank.child, GRACE_S) is None:
                rank.child.kill()
                self._node.zygote.wait(rank.child, GRACE_S)
            self._unregister(rank.channel)
            self._unregister(rank.child.pidfd)
            rank.channel.close()
            os.close(rank.child.pidfd)


def _from_error(rank: Rank, error: Mapping[str, Any], is_script: bool = False) -> Failure:
    kind: FailureKind = error["kind"] if error["kind"] in ("diverged", "memory", "killed") else "error"
    first = str(error["error"]).splitlines()[0][:500]
    advice = "; lower batch.micro or turn on train.activation_checkpointing" if kind == "memory" else ""
    where = f", step {error['step'] + 1}" if rank.is_ready and not is_script else ""
    said = first if not rank.is_ready and error["kind"] == "training" else f"{error['class']}: {first}"
    cause = f"rank {rank.number}{where}: {said}{advice}"
    known = error["kind"] if error["kind"] in ("input", "storage") else "training"
    return Failure(kind, cause, error["step"], detail=error["detail"], error_kind=known)


def _wait(turn: Callable[[float], None], until: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not until() and time.monotonic() < deadline:
        turn(min(0.01, timeout_s))


def _is_stopped(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in ("T", "t")


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
