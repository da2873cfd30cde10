"""Gloo ranks for tests: a job on tiny made-up data, trained by the real loop under any strategy, and its whole state.

    from world import Cell, assert_same

    def test_it(ranks):                       # the fixture of conftest.py: one for the whole session
        cell = Cell(model={"name": "mlp"}, shape=DataShape("table", num_features=6, num_classes=3),
                    strategy={"name": "fsdp"})
        assert_same(ranks.train(cell), ranks.alone(cell), tolerance=1e-6)

A cell is planned as any job (a refusal raises here, in the test), then trained on ranks of its own: they are forked
from one process that has imported torch, so a cell costs a few tenths of a second and finds no trace of the one
before it. `alone` is one plain process with the same global batch in as many micro batches. `ranks.run` calls any
function on ranks that have met.
"""

import ctypes
import faulthandler
import functools
import importlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from dtrain import component
from dtrain.data import DataShape
from dtrain.machine import Machine
from dtrain.plan import Plan
from dtrain.planning import make_plan
from dtrain.settings import convert
from dtrain.spec.cluster import ClusterSpec
from dtrain.spec.job import JobSpec

PRELOAD = (
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
    "dtrain.checkpoint.store",
    "dtrain.runtime.rank",
    "dtrain.strategies.engine",
    "dtrain.models.networks",
)
TIMEOUT_S = 100.0
MOURNING_S = 2.0
"""How long the others get to say what they saw when one rank has failed."""
NUM_TRAIN, NUM_HELD_OUT = 61, 11
"""Samples; neither is a multiple of a number of workers."""
SAMPLE_LENGTH = 8
"""Tokens that a model writes at the end; all weights are gathered for each of them."""
TOKENS = DataShape("tokens", vocabulary_size=50, sequence_length=12)
TRANSFORMER = {"name": "transformer", "num_layers": 2, "num_heads": 4, "width": 16, "pad_vocabulary_to": 2}
# Adam divides by the root of the mean square gradient: where a gradient is zero but for rounding (the bias of keys
# in attention), a small eps would turn the rounding into whole steps.
ADAMW = {"name": "adamw", "lr": 1e-2, "eps": 1e-3}


@dataclass(frozen=True)
class Cell:
    """What is trained, on what made-up data, and how it is spread."""

    model: Mapping[str, Any] = field(default_factory=lambda: dict(TRANSFORMER))
    shape: DataShape = TOKENS
    strategy: Mapping[str, Any] = field(default_factory=lambda: {"name": "ddp"})
    train: Mapping[str, Any] = field(default_factory=dict)
    """Added to the job's `train`: precision, activation_checkpointing, ..."""
    optimizer: Mapping[str, Any] = field(default_factory=lambda: dict(ADAMW))
    evaluate_every: int | None = None
    """Steps between evaluations; only at the end when left out."""
    steps: int = 5
    global_size: int = 8
    accumulation: int = 2
    num_workers: int = 2
    num_nodes: int = 1
    task: "Callable[[DataShape, Any], Any] | None" = None
    """Makes the task instead of `model`: a function of (shape, plan.train) at the top of a module."""

    def plan(self) -> Plan:
        """As `dtrain plan` makes it. Raises `InputError` for what is refused."""
        shape = self.shape if self.task is None else TOKENS
        workers = convert(
            {
                "name": "ranks",
                "backend": {"name": "local"},
                "device": "cpu",
                "nodes": self.num_nodes,
                "workers_per_node": self.num_workers // self.num_nodes,
            },
            ClusterSpec,
        )
        job: dict[str, Any] = {
            "name": "cell",
            "model": dict(self.model),
            # What the model is told of its data; the ranks make some of this shape themselves.
            "data": {"name": "custom", "open": f"{__file__}:Source", "shape": asdict(shape)},
            "batch": {"global": self.global_size, "micro": None},
            "optimizer": dict(self.optimizer),
            "schedule": {"name": "constant"},
            "train": {"steps": self.steps, "log_every_steps": 1, **self.train},
            "evaluate": {"every_steps": self.evaluate_every},
            "strategy": dict(self.strategy),
        }
        # As many cores as workers, so that each computes with one thread: two that wait for each other on one core
        # take a hundred times as long.
        machine = Machine(num_cores=self.num_workers // self.num_nodes, memory_gib=8.0)
        readers = make_plan(convert(job, JobSpec), workers, machine).batch
        num_readers = readers.global_size // (readers.micro * readers.accumulation)
        job["batch"]["micro"] = self.global_size // (self.accumulation * num_readers)
        return make_plan(convert(job, JobSpec), workers, machine)


@dataclass(frozen=True)
class Trained:
    """What a cell came to."""

    state: "dict[str, Any]"
    """Whole tensors by name, put together from the pieces of all ranks."""
    outcome: dict[str, Any]
    """As `loop.train` returned it to worker 0; `metrics` are those of the held-out data."""
    reports: list[dict[str, Any]]
    """What worker 0 reported, step by step: loss, grad_norm, ..."""
    names: list[set[str]]
    """For each rank, what it holds a piece of."""


class Ranks:
    """The process that ranks are forked from; one serves a whole session. Use `with`, or `close`."""

    def __init__(self, preload: Sequence[str] = ()) -> None:
        self._preload = (*PRELOAD, *preload)
        self._folder = Path(tempfile.mkdtemp(prefix="dtrain-ranks-"))
        self._connection: Connection | None = None
        self._process: Any = None
        self._number = 0
        self._references: dict[str, Trained] = {}

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._process.join(5.0)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._process.close()
            self._connection = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def train(self, cell: Cell) -> Trained:
        """Plan and train `cell`; raises `InputError` for what planning refuses, `RankError` for what ranks raise."""
        plan = cell.plan()
        found = self.run(_train, cell.num_workers, plan.to_json(), cell.shape, cell.task)
        state = assemble([pieces for pieces, *_ in found], is_replicated=found[0][3])
        names = [{piece.name for piece in pieces} for pieces, *_ in found]
        return Trained(state, found[0][1], found[0][2], names)

    def alone(self, cell: Cell) -> Trained:
        """The same training by one plain process. It depends on no strategy, and is done once for all of them."""
        plain = replace(cell, strategy={"name": "ddp"}, num_workers=1, num_nodes=1)
        key = repr(plain)
        if key not in self._references:
            self._references[key] = self.train(plain)
        return self._references[key]

    def run(
        self, function: Callable[..., Any], num_workers: int, *args: Any, timeout_s: float = TIMEOUT_S
    ) -> list[Any]:
        """What `function(rank, num_workers, *args)` returns on each rank; they have joined a gloo group before.

        `function` lives at the top of a module, `args` and what it returns are pickled. Raises `RankError` when a
        rank raises, dies, or has not ended in time.
        """
        from dtrain.runtime import rendezvous

        self._number += 1
        folder = self._folder / str(self._number)
        folder.mkdir()
        store = rendezvous.serve_store("127.0.0.1") if num_workers > 1 else None
        request = {
            "function": function,
            "args": args,
            "num_workers": num_workers,
            "port": store.port if store else 0,
            "folder": str(folder),
            "timeout_s": timeout_s,
        }
        connection = self._connect()
        connection.send_bytes(pickle.dumps(request))
        statuses: list[int | None] = json.loads(connection.recv_bytes())
        results = [_read(folder / f"result-{rank}") for rank in range(num_workers)]
        failed = [(rank, r) for rank, r in enumerate(results) if r is None or "error" in r]
        if failed:
            # The first error is the cause; the others mostly saw a peer leave.
            failed.sort(key=lambda entry: entry[1]["at"] if entry[1] else 0.0)
            raise RankError(_story(failed, statuses, folder), [r["class"] if r else "" for _, r in failed])
        shutil.rmtree(folder, ignore_errors=True)
        return [result["value"] for result in results if result is not None]

    def _connect(self) -> Connection:
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._preload), daemon=True)
            self._process.start()
            theirs.close()
        return self._connection


class RankError(Exception):
    """A rank did not come to its end. `classes` are the names of what was raised, the first first."""

    def __init__(self, text: str, classes: list[str]) -> None:
        super().__init__(text)
        self.classes = classes


def assemble(ranks: "Sequence[Sequence[Any]]", *, is_replicated: bool) -> "dict[str, Any]":
    """Whole tensors from the pieces of all ranks.

    Each number must be in the primary pieces of exactly one rank (of the first, where each holds all), and what
    others hold of it must be the same, bit for bit.
    """
    import torch

    state: dict[str, Any] = {}
    held: dict[str, Any] = {}
    writers = ranks[:1] if is_replicated else ranks
    for piece in (piece for pieces in writers for piece in pieces if piece.is_primary):
        if piece.name not in state:
            state[piece.name] = torch.zeros(piece.whole, dtype=piece.tensor.dtype)
            held[piece.name] = torch.zeros(piece.whole, dtype=torch.int32)
        assert state[piece.name].shape == piece.whole, f"{piece.name} is said to be {piece.whole} by one rank only"
        state[piece.name][_where(piece)] = piece.tensor
        held[piece.name][_where(piece)] += 1
    wrong = [name for name, count in held.items() if not bool((count == 1).all())]
    assert not wrong, f"some numbers are written by no rank, or by more than one, of {wrong[:5]}"
    for number, pieces in enumerate(ranks):
        for piece in pieces:
            assert piece.name in state, f"rank {number} holds {piece.name}, which nobody writes"
            found = state[piece.name][_where(piece)]
            assert torch.equal(found, piece.tensor), f"rank {number} holds {piece.name} otherwise than its writer"
    return state


def assert_same(one: Trained, other: Trained, tolerance: float, prefix: str = "model.") -> None:
    """All tensors under `prefix` are the same up to `tolerance`, and so is the metric of the held-out data."""
    names = {name for name in one.state if name.startswith(prefix)}
    assert names == {name for name in other.state if name.startswith(prefix)}
    assert names
    worst, name = max((float((one.state[n].double() - other.state[n].double()).abs().max()), n) for n in names)
    assert worst <= tolerance, f"{name} differs by {worst:.2e}"
    losses = [trained.outcome["metrics"]["loss"] for trained in (one, other)]
    assert abs(losses[0] - losses[1]) <= 10 * tolerance * max(1.0, abs(losses[1])), losses


def _where(piece: Any) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(piece.at, piece.tensor.shape, strict=True))


# -- made-up data ------------------------------------------------------------------------------------------------


class Made:
    """Samples of any kind: sample number n is always the same, but for what is drawn."""

    def __init__(self, shape: DataShape, seed: int, num_samples: int) -> None:
        self._shape, self._seed, self.num_samples = shape, seed, num_samples

    def batch(self, indices: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
        make: Callable[..., dict[str, Any]] = getattr(self, f"_{self._shape.kind}")
        rows = [
            make(np.random.default_rng([self._seed, int(index)]), np.random.default_rng(int(draw)))
            for index, draw in zip(indices, draws, strict=True)
        ]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _text(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Each token says much of the next one, so that there is something to learn."""
        high = self._shape.vocabulary_size
        start, stride = rng.integers(0, high, 2)
        noise = rng.integers(0, 3, length)
        return ((start + (stride % 3 + 1) * np.arange(length) + noise) % high).astype(np.int64)

    def _tokens(self, rng: np.random.Generator, drawn: np.random.Generator) -> dict[str, Any]:
        row = self._text(rng, self._shape.sequence_length + 1)
        return {"inputs": row[:-1], "targets": row[1:]}

    def _masked(self, rng: np.random.Generator, drawn: np.random.Generator) -> dict[str, Any]:
        length = self._shape.sequence_length
        row = self._text(rng, length)
        hidden = drawn.permutation(length)[: max(1, round(0.15 * length))]  # as many in every sample
        inputs, targets = row.copy(), np.full(length, -1, dtype=np.int64)
        targets[hidden] = row[hidden]
        inputs[hidden] = self._shape.vocabulary_size - 1
        return {"inputs": inputs, "targets": targets}

    def _pairs(self, rng: np.random.Generator, drawn: np.random.Generator) -> dict[str, Any]:
        length = self._shape.sequence_length
        long, short = (int(n) for n in rng.integers(length // 2, length + 1, 2))
        row = self._text(rng, length + 1)
        source, inputs, targets = (np.full(length, -1, dtype=np.int64) for _ in range(3))
        source[:long] = row[:long]
        inputs[:short], targets[:short] = row[:short], row[1 : short + 1]
        return {"source": source, "inputs": inputs, "targets": targets}

    def _images(self, rng: np.random.Generator, drawn: np.random.Generator) -> dict[str, Any]:
        shape = self._shape
        picture = rng.standard_normal((shape.channels, shape.height, shape.width), dtype=np.float32)
        return {"images": picture, "labels": np.int64(rng.integers(0, max(shape.num_classes, 1)))}

    def _table(self, rng: np.random.Generator, drawn: np.random.Generator) -> dict[str, Any]:
        features = rng.standard_normal(self._shape.num_features, dtype=np.float32)
        if self._shape.num_classes:
            return {"features": features, "targets": np.int64(rng.integers(0, self._shape.num_classes))}
        return {"features": features, "targets": np.float32(features.sum())}

    def _series(self, rng: np.random.Generator, drawn: np.random.Generator) -> dict[str, Any]:
        shape = self._shape
        walk = rng.standard_normal((shape.sequence_length + shape.horizon, shape.num_features)).cumsum(0)
        series = (walk / np.sqrt(len(walk))).astype(np.float32)
        past, future = np.split(series, [shape.sequence_length])
        return {"inputs": past, "last": past[-1, 0], "targets": future[:, 0]}


class Source:
    """What a worker reads from, and the few words that text models ask of it."""

    fingerprint = "made up"
    is_cheap = True

    def __init__(self, shape: DataShape) -> None:
        self.train = Made(shape, 0, NUM_TRAIN)
        self.held_out = Made(shape, 1, NUM_HELD_OUT)
        self.separator = max(shape.vocabulary_size - 1, 0)

    def yardsticks(self) -> dict[str, dict[str, float]]:
        return {}

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % max(self.separator, 1) for letter in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(str(token) for token in tokens)

    def to_pixels(self, pictures: np.ndarray) -> np.ndarray:
        return (np.clip(pictures.transpose(0, 2, 3, 1) * 0.25 + 0.5, 0.0, 1.0) * 255).astype(np.uint8)


class Keeper:
    """Keeps what is reported; never leaves early. A test may subclass it."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    def beat(self, step: int, micro: int, place: int) -> None: ...

    def begin_step(self, step: int) -> None: ...

    def end_step(self, step: int) -> bool:
        return False

    def commit(self, step: int, held_out: Mapping[str, float] | None) -> None: ...

    def wants_checkpoint(self, step: int) -> bool:
        return False

    def end_at(self, step: int) -> None: ...

    def show(self, step: int, pictures: np.ndarray) -> None: ...

    def report(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.reports.append({"step": step, **metrics})


# -- in a rank ---------------------------------------------------------------------------------------------------


def make_training(rank: int, num_workers: int, plan: Plan, shape: DataShape, task: Any = None) -> Any:
    """A `loop.Training` of the plan on made-up data: what a rank does before its loop."""
    from dtrain.runtime import rank as runtime
    from dtrain.training import loop
    from dtrain.training.averaging import Average
    from dtrain.training.optim import build_optimizer
    from dtrain.training.seeds import seed_everything

    place = runtime._place(plan, {"rank": rank, "world": num_workers, "local_rank": rank})
    seed_everything(plan.train.seed)
    strategy: Any = component.load("strategies", plan.strategy.name)
    if task is None:
        model: Any = component.load("models", plan.model.name)
        made = model.build(plan.model, shape, plan.train)
    else:
        made = task(shape, plan.train)
    prepared = strategy.prepare(made, plan, place.device, functools.partial(build_optimizer, plan.optimizer))
    prepared = prepared.keeping(made.is_kept)
    average = Average(prepared, plan.train.ema) if plan.train.ema else None
    return loop.Training(plan, made, prepared, Source(shape), place, average)


def _train(rank: int, num_workers: int, plan_json: str, shape: DataShape, task: Any) -> Any:
    from dtrain.models import Request
    from dtrain.training import loop

    training = make_training(rank, num_workers, Plan.from_json(plan_json), shape, task)
    keeper = Keeper()
    with mock.patch("dtrain.training.sample.Request", functools.partial(Request, length=SAMPLE_LENGTH)):
        outcome = loop.train(training, 0, keeper)
    return copies(training.prepared.state), outcome, keeper.reports, training.prepared.is_replicated


def copies(state: "Sequence[Any]") -> "list[Any]":
    """Pieces of a live state, copied, to be returned from a rank."""
    return [replace(piece, tensor=piece.tensor.detach().cpu().clone()) for piece in state]


def _enter(request: Mapping[str, Any], rank: int) -> None:
    """The life of a rank, from its fork to its end."""
    import torch

    from dtrain.runtime import rendezvous
    from dtrain.training.loop import Place

    folder = Path(request["folder"])
    with open(folder / f"log-{rank}", "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    torch.set_num_threads(1)
    num_workers = request["num_workers"]
    try:
        place = Place(rank, num_workers, torch.device("cpu"))
        if num_workers > 1:
            plan = Cell(num_workers=num_workers).plan()
            rendezvous.join(plan, {"generation": 0, "host": "127.0.0.1", "port": request["port"]}, place)
        found = {"value": request["function"](rank, num_workers, *request["args"])}
        _write(folder / f"result-{rank}", found)
        if num_workers > 1:
            torch.distributed.barrier()  # nobody leaves while another still exchanges
        status = 0
    except BaseException as error:
        traceback.print_exc()
        text = "".join(traceback.format_exception(error))
        _write(folder / f"result-{rank}", {"error": text, "class": type(error).__name__, "at": time.time()})
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _write(path: Path, result: Mapping[str, Any]) -> None:
    making = path.with_suffix(".making")
    making.write_bytes(pickle.dumps(dict(result)))
    making.rename(path)


def _read(path: Path) -> dict[str, Any] | None:
    return pickle.loads(path.read_bytes()) if path.exists() else None


def _serve(connection: Connection, preload: Sequence[str]) -> None:
    """The process that ranks are forked from: one request after another, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in preload:
        importlib.import_module(name)
    while True:
        try:
            data = connection.recv_bytes()
        except EOFError:
            return
        try:
            request = pickle.loads(data)
        except Exception:
            connection.send_bytes(b"[]")
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        pids = []
        for rank in range(request["num_workers"]):
            pid = os.fork()
            if not pid:
                _enter(request, rank)
            pids.append(pid)
        connection.send_bytes(json.dumps(_watch(pids, request["timeout_s"])).encode())


def _watch(pids: Sequence[int], timeout_s: float) -> list[int | None]:
    """Exit statuses; those still there at the end, or a while after another failed, write their stacks and die."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + timeout_s
    while len(statuses) < len(pids) and time.monotonic() < deadline:
        for pid in pids:
            ended, status = (0, 0) if pid in statuses else os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = os.waitstatus_to_exitcode(status)
                if statuses[pid]:
                    deadline = min(deadline, time.monotonic() + MOURNING_S)
        time.sleep(0.002)
    found: list[int | None] = [statuses.get(pid) for pid in pids]
    left = [pid for pid in pids if pid not in statuses]
    for pid in left:
        os.kill(pid, signal.SIGUSR2)
    if left:
        time.sleep(0.2)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return found


def _story(failed: Sequence[tuple[int, Any]], statuses: Sequence[int | None], folder: Path) -> str:
    told = []
    for rank, result in failed:
        if result is not None:
            told.append(f"rank {rank} raised:\n{result['error']}")
            continue
        status = statuses[rank] if rank < len(statuses) else None
        how = "had not ended in time" if status is None else f"left with {status}"
        log = folder / f"log-{rank}"
        tail = log.read_text(errors="replace")[-4000:] if log.exists() else ""
        told.append(f"rank {rank} {how}:\n{tail}")
    return "\n".join(told)
