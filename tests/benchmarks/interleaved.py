"""Keepers that measure from within the loop: real ones, which at the edges of blocks of steps take the time."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dtrain.checkpoint.pieces import Piece
from dtrain.runtime.rank import Keeper
from dtrain.training import loop
from tests.benchmarks import byhand


class StepKeeper(Keeper):
    """Between blocks of dtrain's steps the hand-written loop takes as many of its own."""

    BLOCK_S = 0.4
    """About how long a block is, rounded to whole intervals of metrics and snapshots."""
    WARM_STEPS = 20

    def attach(self, snapshot: Any, state: Sequence[Piece], completed: int) -> None:
        super().attach(snapshot, state, completed)
        self._state = {piece.name: piece.tensor for piece in state}
        self._rival = self._make_rival()
        self._block = 0
        self._left = self.WARM_STEPS
        self._since: float | None = None
        self._times: dict[str, list[float]] = {"ours": [], "theirs": []}
        self._work = {"ours": 0.0, "theirs": 0.0}
        """Processor time of this rank: what a busy machine changes less than the clock."""

    def _make_rival(self) -> Any:
        return byhand.rival(self._plan, self._place.worker, self._place.num_workers)

    def _meet(self) -> None:
        """Until all ranks are here, which a world of one need not be asked."""
        if self._place.num_workers > 1:
            dist.barrier()

    def begin_step(self, step: int) -> None:
        if self._left == 0:
            self._turn()
        self._left -= 1
        super().begin_step(step)

    def _turn(self) -> None:
        if self._block == 0:
            self._rival.run(self.WARM_STEPS)
            started = time.perf_counter()
            self._rival.run(self.WARM_STEPS)
            intervals = torch.tensor([self.BLOCK_S / (time.perf_counter() - started) * self.WARM_STEPS / 10])
            if self._place.num_workers > 1:
                dist.broadcast(intervals, 0)
            self._block = max(1, round(intervals.item())) * 10
            self._left = self.WARM_STEPS  # until this loop has come as far
            return
        if self._since is not None:
            self._times["ours"].append((time.perf_counter() - self._since) / self._block)
            self._work["ours"] += time.process_time() - self._worked
            self._meet()
            started, worked = time.perf_counter(), time.process_time()
            self._rival.run(self._block)
            self._times["theirs"].append((time.perf_counter() - started) / self._block)
            self._work["theirs"] += time.process_time() - worked
        self._left = self._block
        self._meet()
        self._since, self._worked = time.perf_counter(), time.process_time()

    def commit(self, step: int, held_out: Mapping[str, float] | None) -> None:
        if step == self._plan.train.steps:
            # Both have trained alike: after as many steps the weights must be the same.
            self._rival.run(step - self._rival.done)
            _write(self, {**self._times, "work": self._work, **self._told()})
        super().commit(step, held_out)

    def _told(self) -> dict[str, Any]:
        """What else is said of the two at their end."""
        live = {name: tensor for name, tensor in self._state.items() if name.startswith("model.model.")}
        theirs = self._rival.weights()
        if theirs is None:  # they cannot be laid beside ours piece by piece
            return {"difference": None}
        return {"difference": max(float((t.detach() - theirs[name[12:]]).abs().max()) for name, t in live.items())}


class DeviceKeeper(StepKeeper):
    """Of one worker on any device, where the rival finds its data: times are taken when the device is at rest."""

    WARM_STEPS = 10
    MIN_BLOCKS = 5
    """So many fit into the run where it has the steps for it, however fast they are."""
    GAINED = 10
    """A block has at least so many batches for each that loaders keep ready."""

    def _make_rival(self) -> Any:
        from tests.benchmarks import ready

        self._loss = float("nan")
        return ready.rival(self._plan, self._place.device)

    def _turn(self) -> None:
        # The rival may have to be compiled: the watchdog is to be as patient as it is at the end of a run.
        self.beat(self.completed, 0, loop.END)
        if self._place.device.type == "cuda":
            torch.cuda.synchronize()
        super()._turn()
        room, loading = self._plan.train.steps - 2 * self.WARM_STEPS, self._plan.train.loading
        # Loaders fill up while the rival has its turn: what they gain by it must not count for much.
        least = math.ceil(self.GAINED * int(loading.workers) * loading.prefetch / 10) * 10
        self._block = max(min(self._block, room // (10 * self.MIN_BLOCKS) * 10), least, 10)

    def report(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._loss = metrics.get("loss", self._loss)
        super().report(step, metrics)

    def _told(self) -> dict[str, Any]:
        told = {"losses": [self._loss, self._rival.last_loss], "device": "one core", "memory_gib": 0.0}
        if self._place.device.type == "cuda":
            told["device"] = torch.cuda.get_device_name()
            told["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return told


class CheckpointKeeper(Keeper):
    """Blocks of ten steps, by turns with a checkpoint of dtrain's, with none, and with a synchronous `torch.save`.

    What a checkpoint costs is told twice: how long the loop stands still for it, and how long its block takes.
    """

    BLOCK = 10
    TURNS = ("ours", "none", "theirs")

    def attach(self, snapshot: Any, state: Sequence[Piece], completed: int) -> None:
        super().attach(snapshot, state, completed)
        self._state = {piece.name: piece.tensor.detach() for piece in state}
        self._waits: dict[str, list[float]] = {"ours": [], "theirs": []}
        self._blocks: dict[str, list[float]] = {name: [] for name in self.TURNS}
        self._since = 0.0
        torch.serialization.set_crc32_options(False)  # the rival need not compute what dtrain's sums replace

    def _turn_of(self, step: int) -> str:
        """Of the block that step number `step` is in; the first block warms up."""
        block = (step - 1) // self.BLOCK
        return self.TURNS[(block - 1) % len(self.TURNS)] if block else "warm-up"

    def begin_step(self, step: int) -> None:
        if step % self.BLOCK == 1:
            if step > self.BLOCK + 1:
                self._await_idle()
                self._blocks[self._turn_of(step - 1)].append(time.perf_counter() - self._since)
            dist.barrier()
            self._since = time.perf_counter()
        super().begin_step(step)

    def wants_checkpoint(self, step: int) -> bool:
        if step == self._plan.train.steps:
            return True
        return step % self.BLOCK == 1 and self._turn_of(step) == "ours"

    def end_step(self, step: int) -> bool:
        started = time.perf_counter()
        leave = super().end_step(step)
        if step == self._plan.train.steps:
            return leave
        if step % self.BLOCK == 1 and self._turn_of(step) == "theirs":
            self._save()
            self._waits["theirs"].append(time.perf_counter() - started)
        elif step % self.BLOCK == 1 and self._turn_of(step) == "ours":
            self._waits["ours"].append(time.perf_counter() - started)
        return leave

    def _save(self) -> None:
        if self._place.worker == 0:
            path = _run_folder() / "state.pt"
            with path.open("wb") as file:
                torch.save(self._state, file)
                file.flush()
                os.fsync(file.fileno())
        dist.barrier()

    def _await_idle(self) -> None:
        """A checkpoint must be committed within its block, or the next block would pay for it."""
        while self._control.writing_step:
            time.sleep(0.002)

    def commit(self, step: int, held_out: Mapping[str, float] | None) -> None:
        if step == self._plan.train.steps:
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self._state.values())
            _write(self, {"waits": self._waits, "blocks": self._blocks, "num_bytes": num_bytes})
        started = time.perf_counter()
        super().commit(step, held_out)
        if step < self._plan.train.steps and self._turn_of(step) == "ours" and step % self.BLOCK == 1:
            self._waits["ours"][-1] += time.perf_counter() - started


def _run_folder() -> Path:
    """Of a rank, whose output goes to a log in it."""
    return Path(os.readlink("/proc/self/fd/1")).parent.parent


def _write(keeper: Keeper, measured: dict[str, Any]) -> None:
    """Where `inside.run` looks for it."""
    if keeper._place.worker == 0:
        (_run_folder() / "measured.json").write_text(json.dumps(measured))
