"""What the doctor's ranks do: every collective, then training steps, each held against what is known to be right.

rank -> doctor   {"doing": area}                     from here on it may hang, or die
                 {"area", "right", "text", ...}      what came of it
                 {"error": text}                     an exception
"""

import functools
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dtrain import component
from dtrain.data import Dataset, DataShape
from dtrain.messages import receive, send
from dtrain.plan import Plan
from dtrain.runtime import rendezvous
from dtrain.training import loop
from dtrain.training.optim import build_optimizer
from dtrain.training.seeds import seed_everything

NUM_TIMES = 5
MESSAGE_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
"""Large enough that the start of a message counts for little."""
TOLERANCE = 1e-5
"""Largest difference of a weight: another order of fp32 sums moves one by a few roundings (about 1e-7 is seen);
a gradient that is not shared moves it by more than 1e-3."""
NUM_SAMPLES = 4096


def serve_store(args: dict[str, Any], descriptors: Sequence[int]) -> int:
    """Where ranks find each other, in a process of its own as in a run; lives until the doctor hangs up."""
    channel = socket.socket(fileno=descriptors[0])
    store = rendezvous.serve_store(args["host"])
    send(channel, {"port": store.port})
    receive(channel)
    return 0


def main(args: dict[str, Any], descriptors: Sequence[int]) -> int:
    """Entry of a rank. A world of one writes down the weights it came to; the others compare theirs with them."""
    channel = socket.socket(fileno=descriptors[0])
    try:
        plan = Plan.from_json(args["plan"])
        place = _place(plan, args["rank"], args["world"])
        if place.device.type == "cuda":
            send(channel, {"doing": "compute"})
            send(channel, {"area": "compute", **_compute(place.device)})
        if place.num_workers > 1:
            send(channel, {"doing": "rendezvous"})
            started = time.monotonic()
            rendezvous.join(plan, args, place)
            text = f"{place.num_workers} ranks met in {time.monotonic() - started:.2f} s"
            send(channel, {"area": "rendezvous", "right": True, "text": text})
            for name in args["collectives"]:
                send(channel, {"doing": name})
                send(channel, {"area": name, **_measure(COLLECTIVES[name], place)})
        if args["weights"]:
            send(channel, {"doing": "training"})
            send(channel, {"area": "training", **_train(plan, place, Path(args["weights"]))})
    except BaseException as error:
        traceback.print_exc()
        send(channel, {"error": f"{type(error).__name__}: {str(error).strip() or 'no message'}"})
        return 1
    send(channel, {"end": True})
    receive(channel)  # nobody leaves while another still exchanges
    return 0


def _place(plan: Plan, rank: int, world: int) -> loop.Place:
    if plan.workers.device == "cuda":
        torch.cuda.set_device(rank)
        return loop.Place(rank, world, torch.device("cuda", rank))
    torch.set_num_threads(1)
    return loop.Place(rank, world, torch.device("cpu"))


# -- collectives -------------------------------------------------------------------------------------------------

# Each takes the size of the message a rank gives, sends numbers that tell who sent what, and says if they arrived.
# Numbers stay far below 2**24, so that fp32 sums are exact.


def _all_reduce(n: int, place: loop.Place) -> tuple[Callable[[], Any], Callable[[], bool]]:
    data = torch.empty(n, device=place.device)

    def act() -> None:
        data.fill_(place.worker + 1)
        dist.all_reduce(data)

    return act, lambda: bool((data == sum(range(1, place.num_workers + 1))).all())


def _all_gather(n: int, place: loop.Place) -> tuple[Callable[[], Any], Callable[[], bool]]:
    size = n // place.num_workers
    mine = torch.full((size,), float(place.worker + 1), device=place.device)
    data = torch.empty(size * place.num_workers, device=place.device)
    return (
        lambda: dist.all_gather_into_tensor(data, mine),
        lambda: bool((data.view(place.num_workers, size) == _column(place)).all()),
    )


def _reduce_scatter(n: int, place: loop.Place) -> tuple[Callable[[], Any], Callable[[], bool]]:
    size = n // place.num_workers
    data = _column(place).expand(place.num_workers, size).contiguous().view(-1)
    mine = torch.empty(size, device=place.device)
    expected = (place.worker + 1) * place.num_workers
    return lambda: dist.reduce_scatter_tensor(mine, data), lambda: bool((mine == expected).all())


def _broadcast(n: int, place: loop.Place) -> tuple[Callable[[], Any], Callable[[], bool]]:
    source = place.num_workers - 1
    data = torch.full((n,), float(place.worker + 1), device=place.device)
    return lambda: dist.broadcast(data, src=source), lambda: bool((data == source + 1).all())


def _all_to_all(n: int, place: loop.Place) -> tuple[Callable[[], Any], Callable[[], bool]]:
    size = n // place.num_workers
    # What goes to rank j says from whom it comes and to whom it goes.
    sent = (1000.0 * place.worker + _column(place)).expand(place.num_workers, size).contiguous().view(-1)
    data = torch.empty_like(sent)
    expected = 1000.0 * (_column(place) - 1) + place.worker + 1
    return (
        lambda: dist.all_to_all_single(data, sent),
        lambda: bool((data.view(place.num_workers, size) == expected).all()),
    )


def _send_recv(n: int, place: loop.Place) -> tuple[Callable[[], Any], Callable[[], bool]]:
    """Around a ring: to the next rank, from the one before."""
    behind, ahead = (place.worker - 1) % place.num_workers, (place.worker + 1) % place.num_workers
    sent = torch.full((n,), float(place.worker + 1), device=place.device)
    data = torch.empty_like(sent)

    def act() -> None:
        both = [dist.P2POp(dist.isend, sent, ahead), dist.P2POp(dist.irecv, data, behind)]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    return act, lambda: bool((data == behind + 1).all())


def _barrier(n: int, place: loop.Place) -> tuple[Callable[[], Any], Callable[[], bool]]:
    del n
    # Nobody may be past it while somebody has not come to it: the last rank comes late, and all must have waited.
    late_s, waited = 0.05, [0.0]
    devices = [place.device.index] if place.device.type == "cuda" else None

    def act() -> None:
        dist.all_reduce(torch.zeros(1, device=place.device))
        _wait_for(place.device)
        started = time.monotonic()
        if place.worker == place.num_workers - 1:
            time.sleep(late_s)
        dist.barrier(device_ids=devices)
        _wait_for(place.device)
        waited[0] = time.monotonic() - started

    return act, lambda: waited[0] > 0.5 * late_s


COLLECTIVES = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "broadcast": _broadcast,
    "all_to_all": _all_to_all,
    "send_recv": _send_recv,
    "barrier": _barrier,
}
"""By name, each a function of (numbers a rank gives, place) that returns (do it, was it right)."""


def _measure(make: Callable[..., Any], place: loop.Place) -> dict[str, Any]:
    num_bytes = MESSAGE_BYTES[place.device.type]
    act, is_right = make(num_bytes // 4 // place.num_workers * place.num_workers, place)
    best, right = float("inf"), True
    for _ in range(1 if make is _barrier else NUM_TIMES):
        _wait_for(place.device)
        started = time.monotonic()
        act()
        _wait_for(place.device)
        best = min(best, time.monotonic() - started)
        right = right and is_right()
    if make is _barrier:
        text = "nobody passed before the last had come" if right else "it let ranks pass before the last had come"
        return {"right": right, "text": text}
    text = f"{num_bytes / best / 1e6:,.0f} MB/s with messages of {num_bytes / 2**20:.0f} MiB"
    return {"right": right, "text": text if right else f"what arrived is not what was sent ({text})"}


def _column(place: loop.Place) -> torch.Tensor:
    """1, 2, ... for each rank, as a column."""
    return torch.arange(1, place.num_workers + 1, dtype=torch.float32, device=place.device).view(-1, 1)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _compute(device: torch.device) -> dict[str, Any]:
    """A product of whole numbers small enough that any order of summing them is exact."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-4, 5, (1024, 1024), generator=generator).float() for _ in range(2))
    found = (left.to(device) @ right.to(device)).cpu()
    is_right = bool((found == left @ right).all())
    text = f"{torch.cuda.get_device_name(device)} multiplies {'right' if is_right else 'wrong'}"
    return {"right": is_right, "text": text}


# -- training ----------------------------------------------------------------------------------------------------


def _train(plan: Plan, place: loop.Place, weights: Path) -> dict[str, Any]:
    """The steps of a run, by its loop, strategy and engine, then all weights against those of a single worker."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    seed_everything(plan.train.seed)
    shape = component.load("data", plan.data.name).describe(plan.data)
    model: Any = component.load("models", plan.model.name)
    strategy: Any = component.load("strategies", plan.strategy.name)
    task = model.build(plan.model, shape, plan.train)
    prepared = strategy.prepare(task, plan, place.device, functools.partial(build_optimizer, plan.optimizer))
    before = {piece.name: piece.tensor.detach().cpu().clone() for piece in prepared.state}
    loop.train(loop.Training(plan, task, prepared, _Source(shape), place), 0, _Keeper(plan.train.steps - 1))
    state = {piece.name: piece.tensor.detach().cpu() for piece in prepared.state}
    if place.num_workers == 1:
        torch.save(state, weights)
        return {"right": True, "text": ""}
    expected = torch.load(weights)
    difference = max(float((state[name] - expected[name]).abs().max()) for name in state)
    moved = max(float((state[name] - before[name]).abs().max()) for name in state)
    right = difference <= TOLERANCE < moved and state.keys() == expected.keys()
    steps = plan.train.steps - 1
    text = (
        f"after {steps} steps {place.num_workers} workers differ from one by {difference:.1e} at most;"
        f" {TOLERANCE:.0e} is allowed for sums in another order, and weights moved by {moved:.1e}"
    )
    return {"right": right, "text": text}


class _Tokens:
    """Made-up text: sample number n is always the same."""

    num_samples = NUM_SAMPLES

    def __init__(self, shape: DataShape) -> None:
        self._shape = shape

    def batch(self, indices: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
        high, length = self._shape.vocabulary_size, self._shape.sequence_length
        rows = np.stack([np.random.default_rng(int(i)).integers(0, high, length + 1) for i in indices])
        return {"inputs": rows[:, :-1].copy(), "targets": rows[:, 1:].copy()}


class _Source:
    fingerprint = ""
    is_cheap = True

    def __init__(self, shape: DataShape) -> None:
        self.train: Dataset = _Tokens(shape)
        self.held_out: Dataset = _Tokens(shape)

    def yardsticks(self) -> dict[str, dict[str, float]]:
        return {}


class _Keeper:
    """Leaves the loop after some steps; nothing is kept."""

    def __init__(self, last_step: int) -> None:
        self._last_step = last_step

    def beat(self, step: int, micro: int, place: int) -> None:
        del step, micro, place

    def begin_step(self, step: int) -> None:
        del step

    def end_step(self, step: int) -> bool:
        return step == self._last_step

    def commit(self, step: int, held_out: Mapping[str, float] | None) -> None:
        del step, held_out

    def wants_checkpoint(self, step: int) -> bool:
        del step
        return False

    def report(self, step: int, metrics: Mapping[str, Any]) -> None:
        del step, metrics

    def end_at(self, step: int) -> None:
        del step

    def show(self, step: int, pictures: np.ndarray) -> None:
        del step, pictures
