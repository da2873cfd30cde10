"""Starts ranks as a run does, watches what they do, and turns it into findings. A rank that hangs holds up nobody."""

import os
import selectors
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.errors import ClusterError
from dtrain.finding import Finding, Say
from dtrain.machine import Machine
from dtrain.messages import pair, receive
from dtrain.runtime import zygote
from dtrain.runtime.zygote import Child, Zygote
from dtrain.settings import convert

NEEDS = ("torch", "numpy", "tensorboard", "safetensors")
"""Distributions without which no rank starts."""
ENTRY = "dtrain.doctor.exercise:main"
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send_recv", "barrier")
STEPS = 3
SAMPLES_PER_WORKER = 4
ZYGOTE_S = 60.0
LIMIT_S = {"cpu": 10.0, "cuda": 60.0}
"""Longest silence of a rank; the first thing done on a GPU loads CUDA and its libraries."""
HOST = "127.0.0.1"
LOG_LINES = 3
REMEDIES = {
    "rendezvous": "let no firewall rule stop connections on the loopback interface, and unset MASTER_ADDR, NCCL_* and"
    " GLOO_* variables",
    "compute": "run nvidia-smi, and compare its CUDA version with the one torch was built for",
    "training": "run `dtrain doctor` again; if it stays, reinstall torch, and send this line to dtrain's issue tracker",
    "gloo": "run `dtrain doctor` again on an idle machine; if it stays, reinstall torch",
    "nccl": "run `dtrain doctor` again with NCCL_DEBUG=INFO; if it stays, try NCCL_P2P_DISABLE=1,"
    " then NCCL_SHM_DISABLE=1",
}


def check(machine: Machine, say: Say, entry: str = ENTRY, limit_s: float | None = None) -> list[Finding]:
    """Exchange and train on the GPUs of this machine, if any, and with two workers on its cores.

    `entry` is what a rank runs, `limit_s` the longest it may be silent (by device when left out).
    """
    say("starting ranks (importing torch)")
    findings: list[Finding] = []
    try:
        with warm_process(findings) as forks:
            for device, world in _worlds(machine):
                say(f"exchanging and training with {world} x {device}")
                findings += World(forks, device, world, machine, entry, limit_s or LIMIT_S[device]).check()
    except ClusterError as error:
        remedy = (
            "look at the lines above it in the message; most often torch cannot be imported: python -c 'import torch'"
        )
        findings.append(Finding("ranks", "problem", error.message, remedy))
    return findings


def _worlds(machine: Machine) -> Iterator[tuple[str, int]]:
    if machine.gpus:
        yield "cuda", len(machine.gpus)
    yield "cpu", 2


@dataclass(frozen=True)
class _Forks:
    zygote: Zygote
    folder: Path


@contextmanager
def warm_process(findings: list[Finding]) -> Iterator[_Forks]:
    """A zygote of the doctor's own, in a folder of its own; both are gone when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="dtrain-doctor-"))
    process = zygote.start(folder, os.getpid())
    connection: Zygote | None = None
    try:
        started = time.monotonic()
        while connection is None:
            if process.poll() is not None or time.monotonic() > started + ZYGOTE_S:
                how = "did not come up" if process.poll() is None else f"ended with {process.returncode}"
                raise ClusterError(f"the process that ranks are forked from {how}: {_tail(folder / 'zygote.log')}")
            time.sleep(0.01)
            connection = _connect(folder)
        took = time.monotonic() - started
        findings.append(Finding("zygote", "ok", f"the process that ranks are forked from was up in {took:.1f} s"))
        yield _Forks(connection, folder)
    finally:
        if connection is not None:
            connection.close()  # its children are killed
        process.terminate()
        try:
            process.wait(5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _connect(folder: Path) -> Zygote | None:
    for path in folder.glob("zygote-*.sock"):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(str(path))
            return Zygote(connection)
        except OSError:
            connection.close()
    return None


@dataclass
class _Rank:
    number: int
    child: Child
    channel: socket.socket
    log: Path
    doing: str = "starting"
    heard_at: float = field(default_factory=time.monotonic)
    error: str = ""
    has_ended: bool = False
    is_gone: bool = False
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def hear(self, message: Mapping[str, Any]) -> None:
        self.heard_at = time.monotonic()
        if "doing" in message:
            self.doing = message["doing"]
        elif "error" in message:
            self.error = message["error"]
        elif "area" in message:
            self.results[message["area"]] = dict(message)
            self.doing = f"done with {message['area']}"
        else:
            self.has_ended = True


class World:
    """The ranks on one kind of device."""

    def __init__(self, forks: _Forks, device: str, world: int, machine: Machine, entry: str, limit_s: float) -> None:
        self._forks, self._device, self._world = forks, device, world
        self._machine, self._entry, self._limit_s = machine, entry, limit_s
        self._collectives = "nccl" if device == "cuda" else "gloo"
        self._weights = forks.folder / f"weights-{device}.pt"

    def check(self) -> list[Finding]:
        with ExitStack() as stack:
            alone = self._fork(stack, 0, 1, port=0)
            self._watch([alone])
            on_device = ("compute",) if self._device == "cuda" else ()
            if self._world == 1 or alone.error or not alone.has_ended:
                return self._judge([alone], on_device)
            port = self._serve_store(stack)
            ranks = [self._fork(stack, number, self._world, port) for number in range(self._world)]
            self._watch(ranks)
            return self._judge(ranks, (*on_device, "rendezvous", *COLLECTIVES, "training"))

    def _fork(self, stack: ExitStack, number: int, world: int, port: int) -> _Rank:
        args = {
            "plan": _plan(self._device, world, self._world, self._machine),
            "rank": number,
            "world": world,
            "host": HOST,
            "port": port,
            "generation": 0,
            "collectives": COLLECTIVES,
            "weights": str(self._weights),
        }
        log = self._forks.folder / f"{self._device}-{number}-of-{world}.log"
        child, channel = self._start(stack, self._entry, args, log, f"rank-{number}")
        return _Rank(number, child, channel, log)

    def _serve_store(self, stack: ExitStack) -> int:
        log = self._forks.folder / "store.log"
        _, channel = self._start(stack, "dtrain.doctor.exercise:serve_store", {"host": HOST}, log, "store")
        channel.settimeout(self._limit_s)
        message = receive(channel)
        if message is None:
            raise ClusterError(f"the store where ranks meet did not start: {_tail(log)}")
        return int(message["port"])

    def _start(
        self, stack: ExitStack, entry: str, args: Mapping[str, Any], log: Path, name: str
    ) -> tuple[Child, socket.socket]:
        ours, theirs = pair()
        stack.callback(ours.close)
        with theirs, open(log, "wb") as file:
            child = self._forks.zygote.fork(entry, args, [theirs.fileno()], file.fileno(), name)
        stack.callback(os.close, child.pidfd)
        stack.callback(child.kill)
        return child, ours

    def _watch(self, ranks: Sequence[_Rank]) -> None:
        """Until all have ended, or one has failed, or been silent for too long."""
        with selectors.DefaultSelector() as selector:
            for rank in ranks:
                selector.register(rank.channel, selectors.EVENT_READ, rank)
            while selector.get_map() and not all(rank.has_ended for rank in ranks):
                for key, _ in selector.select(0.1):
                    message = receive(key.data.channel)
                    if message is None:
                        key.data.is_gone = True
                        selector.unregister(key.data.channel)
                    else:
                        key.data.hear(message)
                now = time.monotonic()
                lost = [rank for rank in ranks if rank.error or (rank.is_gone and not rank.has_ended)]
                patience = 1.0 if lost else self._limit_s  # a rank's peers get a moment to say what they saw
                if all(rank.has_ended or now - rank.heard_at > patience for rank in ranks if rank not in lost):
                    return

    def _judge(self, ranks: Sequence[_Rank], areas: Sequence[str]) -> list[Finding]:
        findings = []
        for area in areas:
            results = [rank.results.get(area) for rank in ranks]
            if all(results):
                findings.append(self._compare(area, [result for result in results if result]))
        if not all(rank.has_ended for rank in ranks):
            findings.append(self._failure(ranks))
        return findings

    def _compare(self, area: str, results: Sequence[Mapping[str, Any]]) -> Finding:
        name = f"{area} ({self._collectives if len(results) > 1 else self._device})"
        wrong = [number for number, result in enumerate(results) if not result["right"]]
        if wrong:
            text = f"wrong on rank {', '.join(map(str, wrong))}: {results[wrong[0]]['text']}"
            return Finding(name, "problem", text, self._remedy(area))
        return Finding(name, "ok", results[0]["text"])

    def _failure(self, ranks: Sequence[_Rank]) -> Finding:
        """What stopped the ranks, the cause before its consequences."""
        died = next((r for r in ranks if r.is_gone and not r.error and not r.has_ended), None)
        raised = min((r for r in ranks if r.error), key=lambda r: r.heard_at, default=None)
        if died is not None:
            status = self._forks.zygote.wait(died.child, 1.0)
            how = f"was killed by signal {-status}" if status is not None and status < 0 else f"left with code {status}"
            text, place = f"rank {died.number} {how} in {died.doing}: {_tail(died.log)}", died.doing
        elif raised is not None:
            text, place = f"rank {raised.number} failed in {raised.doing}: {raised.error}", raised.doing
        else:
            # Ranks wait for each other: those that have come least far hold up the others.
            least = min(len(rank.results) for rank in ranks if not rank.has_ended)
            late = [rank for rank in ranks if not rank.has_ended and len(rank.results) == least]
            who = ", ".join(str(rank.number) for rank in late)
            place = late[0].doing
            text = f"rank{'s' * (len(late) > 1)} {who} hung in {place}: silent for {self._limit_s:g} s"
        area = place.removeprefix("done with ")
        return Finding(
            f"{area} ({self._collectives})", "problem", f"{text}; what comes after it was not tried", self._remedy(area)
        )

    def _remedy(self, area: str) -> str:
        return REMEDIES.get(area) or REMEDIES[self._collectives]


def _plan(device: str, world: int, num_workers: int, machine: Machine) -> str:
    """A small job, planned as any other: `num_workers` workers, or one that does the work of all of them.

    SGD, because Adam's division would turn a rounding of a tiny gradient into a whole step.
    """
    from dtrain.planning import make_plan
    from dtrain.spec.cluster import ClusterSpec
    from dtrain.spec.job import JobSpec

    job = {
        "name": "doctor",
        "model": {"name": "transformer", "num_layers": 2, "num_heads": 2, "width": 64},
        "data": {"name": "text", "sequence_length": 32, "tokenizer": {"name": "bytes"}},
        "batch": {"global": SAMPLES_PER_WORKER * num_workers, "micro": SAMPLES_PER_WORKER // 2},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "schedule": {"name": "constant"},
        # The loop is left one step before its end, where it would write a sample.
        "train": {"steps": STEPS + 1, "log_every_steps": STEPS + 1},
        "evaluate": {"every_steps": None},
    }
    place = {
        "name": "doctor",
        "backend": {"name": "local"},
        "device": "gpu" if device == "cuda" else "cpu",
        "workers_per_node": world,
    }
    return make_plan(convert(job, JobSpec), convert(place, ClusterSpec), machine).to_json()


def _tail(log: Path) -> str:
    """The last lines of a log, on one line."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return " | ".join(line.strip() for line in lines[-LOG_LINES:]) or "its log is empty"
