"""The agent's side of the checkpoint writer: start it, hand it snapshots one at a time, note what came of each."""

import contextlib
import os
import selectors
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dtrain.messages import pair, receive, send
from dtrain.plan import AnyPlan, Plan
from dtrain.runs import Run
from dtrain.runtime.zygote import Child, Zygote
from dtrain.settings import to_builtins

NICE = 5
"""Training goes first where cores are short."""


class CheckpointWriter:
    """At most one snapshot is being written.

    `on_free` is called when it may be overwritten again, `tell` takes events. `away` is what `shelf.of` takes.
    """

    def __init__(
        self,
        run: Run,
        plan: AnyPlan,
        node: int,
        snapshot: Path,
        selector: selectors.BaseSelector,
        on_free: Callable[[], None],
        tell: Callable[..., None],
        away: Mapping[str, Any] | None,
    ) -> None:
        self._run, self._selector, self._on_free, self._tell = run, selector, on_free, tell
        self._is_leader = node == 0
        self._args = {
            "node": node,
            "num_nodes": plan.workers.num_nodes,
            "num_local": plan.workers.per_node,
            "folder": str(run.checkpoints),
            "keep": to_builtins(plan.checkpoint.keep) if isinstance(plan, Plan) else {},
            "snapshot": str(snapshot),
            "num_workers": plan.workers.total,
            "away": away,
        }
        self._process: tuple[Child, socket.socket] | None = None
        self.step = 0
        """Step of the snapshot that is being written; 0 for none."""
        self.last_failure = ""
        """Why the last checkpoint was not written; empty when it was."""
        self._is_refusal_told = False

    def write(self, zygote: Zygote, step: int, attempt: int, held_out: Mapping[str, float], data: str) -> None:
        """Begin to write the snapshot, which holds `step`; `data` is the fingerprint of what was trained on."""
        if self._process is None:
            self._process = self._start(zygote)
        self.step = step
        send(self._process[1], {"step": step, "attempt": attempt, "metrics": dict(held_out), "data": data})

    def drop(self) -> None:
        """End the process; a checkpoint that was being written is given up."""
        if self._process is None:
            return
        child, channel = self._process
        self._process = None
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(channel)
        channel.close()
        child.kill()
        os.close(child.pidfd)
        if self.step:
            self._fail(self.step, "the checkpoint writer was killed")

    def _start(self, zygote: Zygote) -> tuple[Child, socket.socket]:
        ours, theirs = pair()
        with open(self._run.logs / f"writer-{self._args['node']}.log", "ab") as log:
            entry = "dtrain.checkpoint.writer:main"
            child = zygote.fork(entry, self._args, [theirs.fileno()], log.fileno(), "writer", nice=NICE)
        theirs.close()
        self._selector.register(ours, selectors.EVENT_READ, self._read)
        return child, ours

    def _read(self) -> None:
        assert self._process is not None
        said = receive(self._process[1])
        if said is None:
            self.drop()
        elif "failed" in said:
            self._fail(said["failed"], said["reason"])
        else:
            if self._is_leader:
                refused = said.pop("refused")
                text = f"checkpoint of step {said['written']} ({said['bytes'] / 1e6:.1f} MB in {said['seconds']:.1f} s)"
                self._tell("checkpoint", message=text, **said)
                if refused and not self._is_refusal_told:
                    self._tell("not-deleted", message=f"older checkpoints stay, and take space: {refused}")
                self._is_refusal_told = bool(refused)
            self.last_failure = ""
            self._free()

    def _fail(self, step: int, reason: str) -> None:
        text = f"checkpoint of step {step} failed: {reason}; the one before stays valid, training goes on"
        self._tell("checkpoint-failed", message=text, step=step)
        self.last_failure = reason
        self._free()

    def _free(self) -> None:
        self.step = 0
        self._on_free()
