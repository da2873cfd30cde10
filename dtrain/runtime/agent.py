"""One per node: owns the node's ranks and snapshot, tries again after a failure, and feeds the checkpoint writer.

Forked from the zygote by its host (the driver, a Ray Train worker, a Tune trial), to whom it speaks over a connection.
The first node's agent leads: it decides about retries, writes metrics, events and checkpoints.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dtrain.checkpoint import shared_memory as shared
from dtrain.checkpoint import shelf, store
from dtrain.checkpoint.snapshot import held_step
from dtrain.errors import ClusterError, DtrainError, Stopped, StorageError
from dtrain.plan import Plan, ScriptPlan
from dtrain.runs import Run
from dtrain.runtime import rendezvous, retry
from dtrain.runtime.attempt import Attempt, Node, Report
from dtrain.runtime.ledger import Ledger
from dtrain.runtime.line import DriverLine
from dtrain.runtime.preparing import prepare
from dtrain.runtime.retry import Failure
from dtrain.runtime.scribe import Scribe
from dtrain.runtime.writing import CheckpointWriter
from dtrain.runtime.zygote import Zygote

REPORT_TIMEOUT_S = 30.0
STORE_TIMEOUT_S = 600.0
LAST_CHECKPOINT_S = 300.0


def main(args: dict[str, Any], descriptors: Sequence[int]) -> int:
    """Entry of an agent. `descriptors` holds the run's lease where the host could pass it on."""
    torch.set_num_threads(1)
    agent = Agent(args)
    if args.get("is_placed"):
        signal.signal(signal.SIGTERM, lambda *_: agent.line.notice_preemption())
    try:
        agent.run()
    except DtrainError as error:
        state = "stopped" if isinstance(error, Stopped) else "failed"
        agent.end({"state": state, "error_kind": error.kind, "error": error.message, "cause": error.message})
    except Exception as error:
        text = traceback.format_exc()
        cause = f"dtrain's agent failed: {type(error).__name__}: {error}"
        agent.end({"state": "failed", "error_kind": "internal", "error": text, "cause": cause})
    finally:
        agent.close()
    if agent.line.is_lost and args.get("driver_command"):
        _start_driver([*args["driver_command"], "--again"], agent.run_folder, descriptors)
    return 0


def _start_driver(command: list[str], run: Run, lease: Sequence[int]) -> None:
    """Start the next driver, which inherits the run's lease: at no moment does the run seem lost."""
    words = [f"--lease={descriptor}" for descriptor in lease[:1]]
    with (run.logs / "driver.log").open("ab") as log:
        subprocess.Popen(
            [*command, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=lease,
        )


class Agent:
    """The story of a run on one node, over its attempts."""

    def __init__(self, args: Mapping[str, Any]) -> None:
        self.run_folder = Run(Path(args["run"]))
        self._away: Mapping[str, Any] | None = args.get("away")
        """The run's storage, id and owner's token, where that is a bucket and the folder this node's own."""
        self._starts_driver = bool(args.get("driver_command"))
        self._shelf = shelf.of(self.run_folder.checkpoints, self._away)
        self._plan: Plan | ScriptPlan = self.run_folder.plan
        self._number: int = args["node"]
        self._is_leader = self._number == 0
        self._scribe = Scribe(self.run_folder) if self._is_leader else None
        self._selector = selectors.DefaultSelector()
        secret = bytes.fromhex(args["secret"])
        self.line = DriverLine(tuple(args["driver"]), secret, self._number, self._selector, self._note_loss)
        self._ledger = Ledger(
            self.run_folder,
            args["attempts"],
            self._plan.code,
            self.line.tell,
            is_leader=self._is_leader,
            is_away=self._away is not None,
        )
        self.line.tell({"hello": self._number})
        self._zygote_folder, self._until = Path(args["zygote_folder"]), int(args["until"])
        self._zygote = Zygote.connect(self._zygote_folder, self._until)
        host = args["host"]
        if self._is_leader:
            self._store = rendezvous.serve_store(host)
            store_address = (host, self._store.port)
            self.line.tell({"store": store_address})
        else:
            store_address = self._await_store()
            self._store = rendezvous.connect_store(*store_address)
        base = shared.prefix(self.run_folder.path, self._number)
        self._node = Node(
            run_path=self.run_folder.path,
            plan=self._plan,
            number=self._number,
            zygote=self._zygote,
            selector=self._selector,
            snapshot_path=Path(f"{base}-state"),
            control_path=Path(f"{base}-control"),
            store_host=store_address[0],
            store_port=store_address[1],
            agreement=rendezvous.Agreement(self._store, self._number, self._plan.workers.num_nodes),
            gpus=tuple(args.get("gpus") or ()),
        )
        self._writer = CheckpointWriter(
            self.run_folder,
            self._plan,
            self._number,
            self._node.snapshot_path,
            self._selector,
            self._free_snapshot,
            self._ledger.note,
            self._away,
        )
        self._script_store: Any = None
        """What a script's ranks meet in: a new one for every attempt, as their launch contract has it."""
        self._attempt: Attempt | None = None
        self._peer_steps: set[int | None] = {None}
        """What the other nodes' snapshots held when the last attempt failed."""
        self._attempt_number = 0
        self._picture = ""
        """File of the last pictures that the model made."""
        self._num_parameters = 0
        """Of a model whose parameters only its workers could count; 0 before they have, and for all others."""
        self._data = ""
        """Fingerprint of what the ranks train on."""

    # -- the story -----------------------------------------------------------------------------------------

    def run(self) -> None:
        shared.sweep()
        shared.claim(self.run_folder.path, self._number)
        if isinstance(self._plan, Plan):
            prepare(self.run_folder, self._number, self._zygote, self._selector, self._turn, self.line, self._ledger)
        if self._is_leader:
            self._lead()
        else:
            self._follow()

    def _lead(self) -> None:
        earlier = self._ledger.failures()
        restore = self._where_from()
        while True:
            number = len(self._ledger.attempts) + 1
            self._ledger.begin(number, restore)
            self._node.agreement.announce(number, {"restore": restore})
            report = self._try(number, restore)
            if report.outcome is not None:
                self._finish(report.outcome)
                return
            failure = self._root_cause(number, report)
            decision = retry.decide(failure, earlier, self._plan.retry)
            earlier.append(failure)
            self._ledger.end(failure)
            self._ledger.event(
                "failure", failure.cause, failure=failure.kind, step=failure.step, attempt=number, retry=decision.again
            )
            if self.line.stop is not None:
                self._stopped(report.snapshot_step or 0)
                return
            if not decision.again:
                self._give_up(failure, decision.reason)
                return
            self.line.tell({"record": {"state": "recovering", "cause": failure.cause}})
            if decision.delay_s:
                self._ledger.event("waiting", f"trying again in {decision.delay_s:.0f} s ({decision.reason})")
                self._turn_until(lambda: self.line.stop is not None, decision.delay_s)
            restore = self._where_from()

    def _follow(self) -> None:
        number = len(self._ledger.attempts) + 1
        while True:
            order = self._await_order(number)
            if "end" in order:
                return
            report = self._try(number, self._on_this_node(order["restore"]))
            if report.outcome is None:
                failures = [asdict(f) for f in report.failures]
                self._node.agreement.submit(number, {"failures": failures, "snapshot_step": report.snapshot_step})
            number += 1

    def _try(self, number: int, restore: Mapping[str, Any]) -> Report:
        self._attempt_number = number
        if not self._zygote.is_alive:
            self._zygote.close()
            self._zygote = Zygote.connect(self._zygote_folder, self._until)
            self._node = Node(**{**vars(self._node), "zygote": self._zygote})
            self._writer.drop()
        self._attempt = Attempt(self._node, number, restore, lambda: self._writer.step, self._on_rank)
        try:
            return self._attempt.watch(self._turn, lambda: self.line.stop is not None)
        finally:
            self._attempt = None

    # -- beginnings ------------------------------------------------------------------------------------------

    def _where_from(self) -> dict[str, Any]:
        """The newest state that can be trusted: the snapshot, else the newest valid checkpoint, else scratch.

        A script finds its own.
        """
        if isinstance(self._plan, ScriptPlan):
            self._script_store = rendezvous.serve_store(self._node.store_host)
            return {"from": "script", "step": 0, "host": self._node.store_host, "port": self._script_store.port}
        committed = self._shelf.steps()
        step = self._held_step()
        if step is not None and step >= max(committed, default=0) and (self._holds_all or self._peer_steps == {step}):
            return {"from": "snapshot", "step": step, "node": self._number}
        rejected: list[str] = []
        found = self._shelf.newest_valid(rejected.append)
        for sentence in rejected:
            self._ledger.event("checkpoint-rejected", sentence)
        if found is None:
            return {"from": "scratch", "step": 0}
        path, manifest = found
        return {"from": "checkpoint", "step": manifest["step"], "path": str(path), "data": manifest.get("data", "")}

    def _on_this_node(self, restore: dict[str, Any]) -> dict[str, Any]:
        """What the first node restores, with the copy that this node has made of it."""
        if restore["from"] != "checkpoint" or self._away is None:
            return restore
        found = self._shelf.newest_valid(print)  # the first node has said it to everybody
        if found is None or found[1]["step"] != restore["step"]:
            got = f"the newest is of step {found[1]['step']}" if found else "there is none"
            raise StorageError(f"node {self._number} does not find the checkpoint of step {restore['step']}: {got}")
        return {**restore, "path": str(found[0])}

    def _await_store(self) -> tuple[str, int]:
        """Follower: where the leader's store is, as the driver passes it on."""
        deadline = time.monotonic() + STORE_TIMEOUT_S
        while self.line.store_address is None:
            if self.line.is_lost or time.monotonic() > deadline:
                raise ClusterError("the first node's agent did not come up")
            self._turn(0.02)
        return self.line.store_address

    def _await_order(self, number: int) -> dict[str, Any]:
        while True:
            order = self._node.agreement.order(number)
            if order is not None:
                return order
            self._turn(0.02)

    # -- endings ---------------------------------------------------------------------------------------------

    def _root_cause(self, number: int, report: Report) -> Failure:
        """The failure that came first, over all nodes: a cause on any node goes before a consequence on another."""
        failures = list(report.failures)
        if self._plan.workers.num_nodes > 1:
            mine = {"failures": [asdict(f) for f in failures], "snapshot_step": report.snapshot_step}
            self._node.agreement.submit(number, mine)
            reports = self._node.agreement.reports(number, REPORT_TIMEOUT_S)
            self._peer_steps = {node_report["snapshot_step"] for node_report in reports.values()}
            for node_report in reports.values():
                failures += [Failure(**f) for f in node_report["failures"]]
        order = {"error": 0, "diverged": 0, "memory": 0, "hung": 1, "killed": 2, "exited": 3, "agent": 4}
        root = min(failures, key=lambda f: order[f.kind], default=Failure("exited", "all ranks left", report.step))
        has_saved = isinstance(self._plan, ScriptPlan) and _newest(self.run_folder.checkpoints) > self._ledger.began
        return Failure(**{**asdict(root), "step": max(report.step, root.step), "has_saved": has_saved})

    def _finish(self, outcome: dict[str, Any]) -> None:
        self._await_writer()
        step = int(outcome["steps"])
        if "metrics" not in outcome:
            self._ledger.end(None, step)
            self._stopped(step)
            return
        if isinstance(self._plan, ScriptPlan):
            self._ledger.end(None, step)
            self.end({"state": "succeeded", "cause": "the script came to its end on every worker", "outcome": outcome})
            return
        if step not in self._shelf.steps():
            reason = self._writer.last_failure or "it was not committed"
            text = f"training is done, but its last checkpoint could not be written ({reason}); free space and resume"
            self._ledger.end(None, step)
            self.end({"state": "failed", "error_kind": "storage", "error": text, "cause": text, "outcome": outcome})
            return
        self._ledger.end(None, step)
        if self._picture:
            outcome["pictures"] = self._picture
        outcome["checkpoint"] = store.path_of(self.run_folder.checkpoints, step).name
        cause = f"all {step} steps done"
        if step < self._plan.train.steps:
            cause = f"stopped early after step {step}: the held-out loss no longer fell"
        self.end({"state": "succeeded", "cause": cause, "outcome": outcome})

    def _keep_snapshot(self) -> None:
        """Put the snapshot on storage when it is newer than every checkpoint: no work is lost by an early end."""
        self._await_writer()
        step = self._held_step()
        newest = max(self._shelf.steps(), default=0)
        if step is not None and step > newest and self._holds_all:
            self._write_checkpoint(step, {})
            self._await_writer()

    def _held_step(self) -> int | None:
        return held_step(self._node.snapshot_path, self._plan.workers.per_node)

    @property
    def _holds_all(self) -> bool:
        """Whether this node's snapshot is the whole state; else other nodes hold the rest of it."""
        return self._plan.workers.num_nodes == 1 or self._node.snapshot_path.exists()

    def _stopped(self, step: int) -> None:
        self._keep_snapshot()
        newest = max(self._shelf.steps(), default=None)
        where = f"checkpoint of step {newest}" if newest is not None else "no checkpoint yet"
        cause = f"stopped by {self.line.stop} at step {step}, {where}"
        if isinstance(self._plan, ScriptPlan):
            cause = f"stopped by {self.line.stop}" + (f" after step {step} was reported" if step else "")
        self.end({"state": "stopped", "error_kind": "stopped", "cause": cause})

    def _give_up(self, failure: Failure, reason: str) -> None:
        if failure.kind != "diverged":
            self._keep_snapshot()
        final = failure.kind in retry.FINAL
        kind = (failure.error_kind or "training") if final else "retries-exhausted"
        self.end(
            {
                "state": "failed",
                "cause": reason,
                "error_kind": kind,
                "error": failure.detail or reason,
            }
        )

    def end(self, result: Mapping[str, Any]) -> None:
        """Say how it came out, once."""
        self._ledger.tell_latest()
        if self._is_leader and getattr(self, "_node", None) is not None:
            self._node.agreement.announce(len(self._ledger.attempts) + 1, {"end": True})
        self.line.tell({"end": dict(result)})

    def close(self) -> None:
        """Leave nothing behind."""
        self._writer.drop()
        if self._scribe is not None:
            self._scribe.close()
        shared.remove(self.run_folder.path, self._number)
        self._zygote.close()

    # -- ranks and the writer ------------------------------------------------------------------------------------

    def _on_rank(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            attempt = self._attempt
            if message.get("num_parameters") and not self._num_parameters:
                self._num_parameters = message["num_parameters"]
                self._ledger.event("model", f"the model has {self._num_parameters:,} parameters")
            self._data = message.get("data", "")
            if self._is_leader and attempt is not None and all(r.is_ready for r in attempt.ranks):
                self._ledger.running()
        elif "checkpoint" in message:
            if self._is_leader or not self._holds_all:
                self._write_checkpoint(message["checkpoint"], message["held_out"])
            elif self._attempt is not None:
                self._attempt.control.writing_step = 0
        elif "metrics" in message and self._scribe is not None:
            self._scribe.write(len(self._ledger.attempts), message["metrics"])
            self._ledger.take_latest(message["metrics"])
        elif "picture" in message and self._scribe is not None:
            self._picture = message["picture"]["file"]
            self._scribe.show(self.run_folder.samples / self._picture, message["picture"]["step"])

    def _write_checkpoint(self, step: int, held_out: Mapping[str, float]) -> None:
        self._writer.write(self._zygote, step, self._attempt_number, held_out, self._data)

    def _free_snapshot(self) -> None:
        if self._attempt is not None:
            self._attempt.control.writing_step = 0

    def _await_writer(self) -> None:
        self._turn_until(lambda: not self._writer.step, LAST_CHECKPOINT_S)

    # -- events --------------------------------------------------------------------------------------------------

    def _turn(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            key.data()
        self.line.tell_preemption()

    def _turn_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < deadline:
            self._turn(0.02)

    def _note_loss(self) -> None:
        # One loss is counted once: here where this agent starts the next driver, else by whoever hands the run over.
        event = "driver-lost" if self._starts_driver else "orphaned"
        self._ledger.event(event, "the driver is gone: writing a last checkpoint")


def _newest(folder: Path) -> float:
    """Time of the newest file in a folder, seconds since 1970; 0 for none."""
    times = [0.0]
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                times.append(os.stat(os.path.join(parent, name)).st_mtime)
    return max(times)
