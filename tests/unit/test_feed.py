"""Reading ahead: the same batches as without loaders, from any step, and what happens when a loader or worker ends."""

import contextlib
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from making import FOUR_GPUS, TWO_CORES, a_cluster

from dtrain.data.order import Order
from dtrain.errors import InputError
from dtrain.planning import make_plan
from dtrain.settings import convert
from dtrain.spec.job import JobSpec, Loading
from dtrain.training.feed import Feed
from dtrain.training.loading import TRAIN, LoaderLost, Loaders

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
CPU = torch.device("cpu")


class Numbers:
    """Sample n is n in several forms; how many bytes it takes and how long may depend on the batch."""

    num_samples = 1000

    def __init__(self, offset=0, fail_at=None, seconds=0.0):
        self.offset, self.fail_at, self.seconds = offset, fail_at, seconds

    def batch(self, indices, draws):
        time.sleep(self.seconds)
        if self.fail_at is not None and self.fail_at in indices:
            raise InputError(f"sample {self.fail_at} cannot be read; take it out")
        width = 1 + int(indices[0]) % 7 * 1000  # so that memory has to grow
        return {
            "n": indices + self.offset,
            "wide": np.repeat((indices + self.offset)[:, None], width, axis=1).astype(np.float32),
            "small": (indices % 256).astype(np.uint8),
            "drawn": draws.view(np.int64).copy(),
        }


class Source:
    def __init__(self, **words):
        self.train, self.held_out = Numbers(**words), Numbers(offset=10_000)


@pytest.fixture
def loaders():
    """Make loaders that end with the test."""
    made = []

    def make(num=2, prefetch=2, open_source=Source, **words):
        made.append(Loaders(open_source, num, prefetch, **words))
        return made[-1]

    yield make
    for one in made:
        one.close()


def order(accumulation=2, micro=5):
    return Order(3, Numbers.num_samples, accumulation * micro, micro, accumulation, 1, 0)


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for name, tensor in batch.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(("num", "prefetch"), [(1, 1), (1, 3), (3, 2)])
def test_batches_are_those_that_are_read_without_loaders(loaders, num, prefetch):
    ahead, plain = Feed(Source(), order(), CPU, loaders(num, prefetch)), Feed(Source(), order(), CPU)
    for step in range(30):
        for number in range(2):
            batch = ahead.micro_batch(step, number)
            assert ahead.micro_batch(step, number) is batch
            assert_same(batch, plain.micro_batch(step, number))
            assert torch.equal(batch["draws"], batch["drawn"])


@pytest.mark.parametrize("steps", [[0, 1, 100_000_000, 100_000_001, 3, 2, 3, 4, 4], [7, 7, 8]])
def test_any_step_can_be_asked_for(loaders, steps):
    ahead, plain = Feed(Source(), order(), CPU, loaders()), Feed(Source(), order(), CPU)
    for step in steps:
        for number in range(2):
            assert_same(ahead.micro_batch(step, number), plain.micro_batch(step, number))


def test_the_passes_of_several_phases_are_foreseen(loaders):
    made = loaders()
    ahead, plain = Feed(Source(), order(), CPU, made, passes=2), Feed(Source(), order(), CPU)
    streams = set()
    for step in range(4, 10):
        for number in (0, 1, 0, 1):
            assert_same(ahead.micro_batch(step, number), plain.micro_batch(step, number))
            streams.add(id(ahead._stream))
    assert len(streams) == 1  # never read in vain


@pytest.mark.parametrize(("num", "prefetch"), [(1, 1), (1, 3), (3, 2)])
def test_a_batch_stays_as_it_is_until_the_second_after_it(loaders, num, prefetch):
    feed = Feed(Source(), order(), CPU, loaders(num, prefetch))
    before = None
    for step in range(40):
        for number in range(2):
            batch = feed.micro_batch(step, number)
            if before is not None:
                time.sleep(0.001)  # time to write to what was given back
                assert_same(*before)
            before = batch, {name: tensor.clone() for name, tensor in batch.items()}
    assert sum(loader._num_slots for loader in feed._loaders.loaders) <= num * prefetch + 2 + num


def test_batches_are_not_copied(loaders):
    feed = Feed(Source(), order(), CPU, loaders(1, 1))
    addresses = {feed.micro_batch(0, number)["n"].data_ptr() for number in range(2)}
    mapped = [memory.bytes for memory in feed._loaders.loaders[0]._memory.values()]
    for address in addresses:
        assert any(m.ctypes.data <= address < m.ctypes.data + m.nbytes for m in mapped)


def test_held_out_batches_may_be_read_between(loaders):
    ahead, plain = Feed(Source(), order(), CPU, loaders()), Feed(Source(), order(), CPU)
    for step in range(6):
        assert_same(ahead.micro_batch(step, 0), plain.micro_batch(step, 0))
        wanted = [(np.arange(4) + 4 * k, np.arange(4, dtype=np.uint64) + k) for k in range(step)]
        for mine, other in zip(ahead.held_out(iter(wanted)), plain.held_out(iter(wanted)), strict=True):
            assert_same(mine, other)
            assert mine["n"].min() >= 10_000
        assert_same(ahead.micro_batch(step, 1), plain.micro_batch(step, 1))


def test_reading_happens_while_the_worker_computes(loaders):
    feed = Feed(Source(), order(), CPU, loaders(2, 2, lambda: Source(seconds=0.05)))
    feed.micro_batch(0, 0)
    waited = 0.0
    for step in range(1, 6):
        time.sleep(0.06)
        started = time.monotonic()
        feed.micro_batch(step, 0) if step == 1 else feed.micro_batch(step - 1, 1)
        feed.micro_batch(step, 1) if step == 1 else feed.micro_batch(step, 0)
        waited += time.monotonic() - started
    assert waited < 5 * 2 * 0.05 / 2


# -- what goes wrong -------------------------------------------------------------------------------------------


def test_an_error_in_a_loader_is_raised_by_the_worker_for_its_batch(loaders):
    source = Source(fail_at=int(order().micro_batch(3, 0)[0][2]))
    feed = Feed(source, order(), CPU, loaders(open_source=lambda: source))
    for step in range(3):
        for number in range(2):
            feed.micro_batch(step, number)
    with pytest.raises(InputError, match=r"sample \d+ cannot be read; take it out") as caught:
        feed.micro_batch(3, 0)
    assert caught.value.message == f"sample {source.train.fail_at} cannot be read; take it out"
    assert "in batch" in caught.value.__notes__[0]  # where in the loader it was raised
    feed.micro_batch(3, 1)  # the loader goes on


def test_an_error_while_opening_is_raised_by_the_worker(loaders):
    def fail():
        raise InputError("no such data")

    with pytest.raises(InputError, match="no such data"):
        Feed(Source(), order(), CPU, loaders(open_source=fail)).micro_batch(0, 0)


class Unsendable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize("what", ["unsendable", "objects"])
def test_what_cannot_be_sent_is_told_in_words(loaders, what):
    class Odd(Numbers):
        def batch(self, indices, draws):
            if what == "unsendable":
                raise Unsendable("this", "that")
            return {"words": np.array(["a", None], dtype=object)}

    source = Source()
    source.train = Odd()
    expected = (
        "Unsendable: this and that" if what == "unsendable" else "words of a batch has dtype object; give numbers"
    )
    with pytest.raises((RuntimeError, TypeError), match=expected):
        Feed(source, order(), CPU, loaders(open_source=lambda: source)).micro_batch(0, 0)


@pytest.mark.parametrize("busy", [True, False])
def test_a_killed_loader_is_noticed_within_a_second(loaders, busy):
    made = loaders(2, 1, lambda: Source(seconds=2.0 if busy else 0.0))
    feed = Feed(Source(), order(), CPU, made)
    if not busy:
        feed.micro_batch(0, 0)
    for loader in made.loaders:
        os.kill(loader.pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(LoaderLost, match=r"loader-0-\d, which reads data ahead, was killed by SIGKILL; if memory"):
        for step in range(1, 10):
            feed.micro_batch(step, 0)
    assert time.monotonic() - started < 1.0
    with pytest.raises(LoaderLost):
        feed.micro_batch(50, 0)
    assert LoaderLost.kind == "killed"  # which the agent tries again


def test_memory_is_registered_once_and_undone(loaders):
    registered = {}

    def register(memory):
        registered[memory.ctypes.data] = memory.nbytes
        return lambda: registered.pop(memory.ctypes.data)

    made = loaders(2, 1, register=register)
    feed = Feed(Source(), order(), CPU, made)
    for step in range(20):
        feed.micro_batch(step, 0)
        feed.micro_batch(step, 1)
    held = [memory.bytes for loader in made.loaders for memory in loader._memory.values()]
    assert registered == {memory.ctypes.data: memory.nbytes for memory in held}
    made.close()
    assert registered == {}


# -- how many --------------------------------------------------------------------------------------------------


def resolved(machine, data, **loading):
    asked = {
        "name": "tiny",
        "model": {"name": "mlp"},
        "data": data,
        "batch": {"global": 8},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "train": {"steps": 1, "loading": loading},
    }
    plan = make_plan(convert(asked, JobSpec), a_cluster(), machine)
    return plan.train.loading, [note for note in plan.notes if "loading" in note]


SHARDS = {"name": "webdataset", "source": "/nowhere/{0..9}.tar", "num_classes": 4}


@pytest.mark.parametrize(
    ("machine", "data", "num", "why"),
    [
        (TWO_CORES, SHARDS, 1, "1 core a worker, 4 at most"),
        (replace(TWO_CORES, num_cores=64, gpus=FOUR_GPUS.gpus), SHARDS, 4, "16 cores a worker, 4 at most"),
        (TWO_CORES, {"name": "images"}, 0, "these batches are cheap to read"),
    ],
)
def test_auto_is_resolved_by_what_a_batch_costs(machine, data, num, why):
    assert resolved(machine, data) == (Loading(workers=num, prefetch=2), [f"train.loading.workers: {num} ({why})"])
    assert resolved(machine, data, workers=7, prefetch=1) == (Loading(workers=7, prefetch=1), [])


def lives(pid):
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("busy", [True, False])
def test_loaders_end_with_their_worker_however_it_ends(busy):
    told, tell = os.pipe()
    worker = os.fork()
    if worker == 0:
        loaders = Loaders(lambda: Source(seconds=30.0 if busy else 0.0), 3, 2)
        stream = loaders.read(TRAIN, [order().micro_batch(step, 0) for step in range(6)])
        if busy:
            time.sleep(0.1)
        else:
            list(stream)
        os.write(tell, " ".join(str(loader.pid) for loader in loaders.loaders).encode())
        time.sleep(60)
        os._exit(0)
    pids = [int(word) for word in os.read(told, 100).split()]
    assert len(pids) == 3 and all(map(lives, pids))
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    deadline = time.monotonic() + 1.0
    while any(map(lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(lives, pids))
    os.close(told)
    os.close(tell)


def test_loaders_say_who_they_are(loaders):
    made = loaders(2, 1, worker=13)
    for _ in range(2):
        next(made.read(TRAIN, [(np.arange(3), np.arange(3, dtype=np.uint64))]))
    names = {Path(f"/proc/{loader.pid}/comm").read_text().strip() for loader in made.loaders}
    assert names == {"loader-13-0", "loader-13-1"}


def test_loaders_share_no_socket_with_their_worker_or_each_other(loaders):
    channel, other_side = socket.socketpair()
    made = loaders(3, 1, inherited=[channel])
    next(made.read(TRAIN, [(np.arange(3), np.arange(3, dtype=np.uint64))]))
    of_the_worker = {
        os.readlink(f"/proc/self/fd/{one.fileno()}") for one in (channel, *(x.socket for x in made.loaders))
    }
    try:
        for loader in made.loaders:
            deadline = time.monotonic() + 30  # one that has not been asked for anything may only be starting
            while opened_by(loader.pid) & of_the_worker:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        channel.close()
        other_side.close()


def opened_by(pid: int) -> set[str]:
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(path))
    return found
