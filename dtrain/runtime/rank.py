"""One worker: joins the others, restores its state, and runs the loop. Forked from the zygote by the agent.

rank -> agent                                   agent -> rank
{"ready": step}        state restored
{"metrics": {...}}     worker 0 only
{"picture": {...}}     worker 0 only: its file in the run's samples/
{"checkpoint": step}   first of each node: the snapshot of this step may be written
{"done": {...}}        the loop came to its end, or left when asked to
{"error": ..., ...}    an exception; waits  ->  {"rescue": true} copy the state to the snapshot, or killed
{"rescued": step}
"""

import dataclasses
import faulthandler
import functools
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dtrain import code, component
from dtrain.checkpoint import store
from dtrain.checkpoint.pieces import Piece
from dtrain.checkpoint.snapshot import Snapshot, path_of
from dtrain.data import Source, cache
from dtrain.errors import DtrainError, InputError, StorageError
from dtrain.messages import receive, send
from dtrain.plan import Plan
from dtrain.runs import Run
from dtrain.runtime import rendezvous
from dtrain.runtime.control import Control
from dtrain.training import gallery, loop
from dtrain.training.averaging import Average
from dtrain.training.feed import pinned
from dtrain.training.loading import Loaders
from dtrain.training.memory import keep_freed_memory
from dtrain.training.optim import build_optimizer
from dtrain.training.patience import Patience
from dtrain.training.seeds import seed_everything


class Keeper:
    """Looks after the loop in the name of the agent: signs of life, snapshots, the agreed moment to leave."""

    def __init__(
        self, plan: Plan, control: Control, channel: socket.socket, place: loop.Place, local_rank: int, samples: Path
    ) -> None:
        self._samples = samples
        self._plan, self._control, self._channel, self._place = plan, control, channel, place
        self._local_rank = local_rank
        self._is_leader = local_rank == 0
        self._snapshot: Snapshot | None = None
        self._share: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._slot = 0
        self._last_step = plan.train.steps
        self.completed = 0
        """Steps whose update is whole in this worker's memory."""
        self.is_updating = False

    def attach(self, snapshot: Snapshot, state: Sequence[Piece], completed: int) -> None:
        self._snapshot = snapshot
        self._slot = self._local_rank if snapshot.num_slots > 1 else 0
        self._share = snapshot.share(self._slot, state)
        if self._place.device.type == "cuda" and self._share:
            pinned(snapshot.room(self._share))  # as long as this process lives
        self.completed = completed

    def beat(self, step: int, micro: int, place: int) -> None:
        # While it evaluates, an average may stand where the weights were.
        self.is_updating = place in (loop.UPDATE, loop.EVALUATE)
        self._control.beat(self._local_rank, step, micro, place)

    def begin_step(self, step: int) -> None:
        if not self._is_leader:
            return
        if self._control.stop and not self._control.last_step:
            self._control.last_step = step
        if step % self._plan.checkpoint.snapshot_every_steps == 0 and not self._control.writing_step:
            self._control.snapshot_step = step

    def end_step(self, step: int) -> bool:
        self.completed, self.is_updating = step, False
        control = self._control
        leave = control.last_step == step
        if leave or self.wants_checkpoint(step):
            self._await_writer(step)
        if control.snapshot_step == step and self._snapshot is not None:
            control.beat(self._local_rank, step, 0, loop.SNAPSHOT)
            self._snapshot.write_share(self._slot, step, self._share)
        return leave

    def _await_writer(self, step: int) -> None:
        """Wait until the snapshot is free: the writer may still be reading the one before."""
        control = self._control
        while (control.writing_step != 0) if self._is_leader else (control.snapshot_step != step):
            control.beat(self._local_rank, step, 0, loop.SNAPSHOT)
            time.sleep(0.0005)
        if self._is_leader:
            control.writing_step = step
            control.snapshot_step = step

    def wants_checkpoint(self, step: int) -> bool:
        return step % (self._plan.checkpoint.every_steps or self._plan.train.steps) == 0 or step == self._last_step

    def end_at(self, step: int) -> None:
        self._last_step = step

    def show(self, step: int, pictures: np.ndarray) -> None:
        if self._place.worker == 0:
            name = gallery.save(self._samples, step, pictures)
            send(self._channel, {"picture": {"step": step, "file": name}})

    def commit(self, step: int, held_out: Mapping[str, float] | None) -> None:
        if self._is_leader and self._control.writing_step == step:
            send(self._channel, {"checkpoint": step, "held_out": dict(held_out or {})})

    def report(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._place.worker == 0:
            send(self._channel, {"metrics": {"step": step, **metrics}})


def main(args: dict[str, Any], descriptors: Sequence[int]) -> int:
    """Entry of a rank: `args` as the agent's `Attempt` writes them, `descriptors` [channel]."""
    channel = socket.socket(fileno=descriptors[0])
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # the agent asks a hung rank where it is
    keeper: Keeper | None = None
    rescue: tuple[Snapshot, list[Piece]] | None = None
    try:
        run = Run(Path(args["run"]))
        plan = run.task_plan
        loaders = _loaders(plan, args["rank"], channel)
        place = _place(plan, args)
        plan.batch.check(place.num_readers)
        control = Control.open(Path(args["control"]))
        keeper = Keeper(plan, control, channel, place, args["local_rank"], run.samples)
        keeper.beat(0, 0, loop.STARTING)
        rendezvous.join(plan, args, place)
        training, state = _build(plan, place, loaders)
        is_replicated = training.prepared.is_replicated
        segment = path_of(Path(args["snapshot"]), args["local_rank"], is_replicated=is_replicated)
        snapshot = Snapshot.create(segment, state, args["local_world"] if is_replicated else 1)
        start = _restore(args["restore"], state, snapshot, args, is_replicated, training.source.fingerprint)
        if start:
            training.prepared.refresh()
        keeper.attach(snapshot, state, start)
        if is_replicated and place.device.type == "cpu":
            rescue = snapshot, state
        keeper.beat(start, 0, loop.STARTING)
        counted = 0 if plan.arithmetic.num_parameters else _num_parameters(training)
        said = {"is_replicated": is_replicated, "data": training.source.fingerprint, "num_parameters": counted}
        send(channel, {"ready": start, **said})
        outcome = loop.train(training, start, keeper)
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        _report(channel, error, keeper, rescue is not None)
        while (order := receive(channel)) is not None:
            if order.get("rescue") and keeper is not None and rescue is not None:
                rescue[0].write_whole(keeper.completed, rescue[1])
                send(channel, {"rescued": keeper.completed})
        os._exit(1)
    send(channel, {"done": outcome})
    sys.stdout.flush()
    # Nothing is left to tidy that the agent does not tidy: leaving at once cannot hang in a collective's shutdown.
    os._exit(0)


def prepare(args: dict[str, Any], descriptors: Sequence[int]) -> int:
    """Entry of the process that readies the data of a node before its ranks start."""
    channel = socket.socket(fileno=descriptors[0])
    plan = Run(Path(args["run"])).task_plan
    torch.set_num_threads(max(1, plan.workers.threads * plan.workers.per_node))
    try:
        module: Any = component.load("data", plan.data.name)  # type: ignore[attr-defined]
        module.prepare(plan.data, cache.folder())
    except InputError as error:
        send(channel, {"error": error.message, "class": "InputError", "kind": "input"})
        return 1
    except BaseException as error:
        traceback.print_exc()
        send(channel, {"error": str(error), "class": type(error).__name__, "kind": "error", "detail": text_of(error)})
        return 1
    send(channel, {"done": {}})
    return 0


def _loaders(plan: Plan, rank: int, channel: socket.socket) -> Loaders | None:
    """The processes that read ahead, forked while there is neither thread nor device nor process group here."""
    loading, on_gpu = plan.train.loading, plan.workers.device == "cuda"
    if not loading.workers or loading.workers == "auto":
        return None
    return Loaders(
        functools.partial(_open, plan),
        loading.workers,
        loading.prefetch,
        worker=rank,
        inherited=[channel],
        register=pinned if on_gpu else None,
    )


def _open(plan: Plan) -> Source:
    data: Any = component.load("data", plan.data.name)  # type: ignore[attr-defined]
    source: Source = data.open(plan.data, cache.folder())
    return source


def _place(plan: Plan, args: Mapping[str, Any]) -> loop.Place:
    torch.set_num_threads(plan.workers.threads)
    if plan.workers.device == "cuda":
        if args.get("gpus"):  # read when CUDA starts, which it has not before this line
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(args["gpus"])
        torch.cuda.set_device(args["local_rank"])
        device = torch.device("cuda", args["local_rank"])
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    return loop.Place(args["rank"], args["world"], device, plan.workers.total // plan.batch.num_readers)


def _build(plan: Plan, place: loop.Place, loaders: Loaders | None = None) -> tuple[loop.Training, list[Piece]]:
    """All that the loop needs, and the state that must survive."""
    seed_everything(plan.train.seed)
    data: Any = component.load("data", plan.data.name)  # type: ignore[attr-defined]
    model: Any = component.load("models", plan.model.name)  # type: ignore[attr-defined]
    strategy: Any = component.load("strategies", plan.strategy.name)  # type: ignore[attr-defined]
    source = _open(plan)
    task = model.build(plan.model, data.describe(plan.data), plan.train)
    prepared = strategy.prepare(task, plan, place.device, functools.partial(build_optimizer, plan.optimizer))
    prepared = prepared.keeping(task.is_kept)
    average = Average(prepared, plan.train.ema) if plan.train.ema else None
    patience = Patience(plan.train.stop_early, place.device) if plan.train.stop_early else None
    state = [*prepared.state, *(average.state if average else ())]
    if patience is not None:
        is_primary = prepared.is_replicated or place.worker == 0
        state += [dataclasses.replace(piece, is_primary=is_primary) for piece in patience.state]
    return loop.Training(plan, task, prepared, source, place, average, patience, loaders), state


def _num_parameters(training: loop.Training) -> int:
    """Trainable numbers, tied weights counted once; ZeRO-3 leaves a worker only a share of each, and its whole size."""
    found = {id(p): p for part in training.task.parts.values() for p in part.parameters() if p.requires_grad}
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in found.values())


def _restore(
    restore: Mapping[str, Any],
    state: Sequence[Piece],
    snapshot: Snapshot,
    args: Mapping[str, Any],
    is_replicated: bool,
    data: str,
) -> int:
    """Put the state back; returns the steps already done."""
    source, step = restore["from"], int(restore["step"])
    if source == "checkpoint":
        if restore["data"] != data:
            raise InputError(
                f"the data is not what {Path(restore['path']).name} was trained on (fingerprint {data}, then"
                f" {restore['data']}); put the old data back, or submit a new run"
            )
        store.read_into(Path(restore["path"]), state)
    elif source == "snapshot":
        if args["node"] == restore["node"] or not is_replicated:
            held = snapshot.read_into(state)
            if held != step:
                raise StorageError(f"the snapshot holds step {held} where step {step} was agreed")
        if is_replicated and args["world"] > args["local_world"]:
            sender = int(restore["node"]) * args["local_world"]
            for piece in state:
                dist.broadcast(piece.tensor.detach(), src=sender)
    return step


def _report(channel: socket.socket, error: BaseException, keeper: Keeper | None, has_copy: bool) -> None:
    kind = "error"
    if isinstance(error, DtrainError):
        kind = error.kind
    elif isinstance(error, MemoryError | torch.OutOfMemoryError):
        kind = "memory"
    elif rendezvous.is_peer_loss(error):
        kind = "peer"
    can_rescue = has_copy and keeper is not None and keeper.completed > 0 and not keeper.is_updating
    send(
        channel,
        {
            "error": str(error) or type(error).__name__,
            "class": type(error).__name__,
            "kind": kind,
            "detail": text_of(error),
            "step": keeper.completed if keeper else 0,
            "can_rescue": can_rescue,
        },
    )


def text_of(error: BaseException) -> str:
    """The traceback as the user knows it: without dtrain's own frames where the user's code was reached."""
    if isinstance(error, DtrainError) and error.__cause__ is not None:
        error = error.__cause__  # what dtrain says of it is the run's cause
    frames = traceback.extract_tb(error.__traceback__)
    foreign = [f for f in frames if code.is_users(f.filename)]
    kept = traceback.StackSummary.from_list(frames)
    if foreign:
        first = next(i for i, f in enumerate(frames) if f in foreign)
        kept = traceback.StackSummary.from_list(frames[first:])
    lines = ["Traceback (most recent call last):\n", *kept.format(), *traceback.format_exception_only(error)]
    return "".join(lines)
