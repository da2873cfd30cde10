"""What training measures, and measuring on held-out data: each sample once, sums and never means of means."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dtrain.training import evaluate as module
from dtrain.training import metrics as clock_module
from dtrain.training.evaluate import evaluate
from dtrain.training.feed import read
from dtrain.training.metrics import StepMetrics

CPU = torch.device("cpu")


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(clock_module, "time", made)
    return made


def test_a_reading_is_the_mean_over_all_micro_batches_since_the_last(clock):
    metrics = StepMetrics(CPU, ["train"], samples_per_step=8, tokens_per_step=32)
    for losses, norm in [((1.0, 3.0), 5.0), ((5.0, 7.0), 6.0)]:
        for loss in losses:
            metrics.add("train", torch.tensor(loss, requires_grad=True))
        metrics.end_step(torch.tensor(norm))
    clock.now += 4.0
    assert metrics.read() == {
        "loss": 4.0,
        "grad_norm": 6.0,
        "steps_per_s": 0.5,
        "samples_per_s": 4.0,
        "tokens_per_s": 16.0,
    }
    metrics.add("train", torch.tensor(10.0))
    metrics.end_step(torch.tensor(1.0))
    clock.now += 1.0
    assert metrics.read()["loss"] == 10.0


def test_time_that_is_not_training_does_not_count(clock):
    metrics = StepMetrics(CPU, ["train"], 1, 0)
    metrics.add("train", torch.tensor(1.0))
    metrics.end_step(torch.tensor(1.0))
    clock.now += 1.0
    paused = metrics.pause()
    clock.now += 1000.0
    metrics.resume(paused)
    clock.now += 1.0
    assert metrics.read()["steps_per_s"] == 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_loss_that_is_no_number_shows_in_the_mean(bad, clock):
    metrics = StepMetrics(CPU, ["train"], 1, 0)
    for loss in (1.0, bad, 1.0):
        metrics.add("train", torch.tensor(loss))
    assert not np.isfinite(metrics.read()["loss"])
    metrics.add("train", torch.tensor(2.0))
    assert metrics.read()["loss"] == 2.0


def test_reading_when_nothing_was_measured(clock):
    found = StepMetrics(CPU, ["train"], 1, 1).read()
    assert (found["loss"], found["grad_norm"], found["steps_per_s"]) == (0.0, 0.0, 0.0)


def test_a_loss_in_another_precision_is_added_in_fp32(clock):
    metrics = StepMetrics(CPU, ["train"], 1, 0)
    for _ in range(1000):
        metrics.add("train", torch.tensor(1.0, dtype=torch.bfloat16))
    assert metrics.read()["loss"] == 1.0


def test_several_phases_are_told_apart_and_added_up(clock):
    metrics = StepMetrics(CPU, ["a", "b"], 1, 0)
    for loss in (1.0, 3.0):
        metrics.add("a", torch.tensor(loss))
    metrics.add("b", torch.tensor(5.0))
    found = metrics.read()
    assert (found["loss"], found["loss_a"], found["loss_b"]) == (7.0, 2.0, 5.0)
    assert metrics.read()["loss_a"] == 0.0


def test_a_loss_in_brackets_is_a_number_too(clock):
    """The loop takes any tensor of one number for a loss."""
    metrics = StepMetrics(CPU, ["train"], 1, 0)
    metrics.add("train", torch.ones(1, requires_grad=True) * 3)
    assert metrics.read()["loss"] == 3.0


def test_adding_does_not_hold_on_to_the_graph(clock):
    metrics = StepMetrics(CPU, ["train"], 1, 0)
    metrics.add("train", torch.ones((), requires_grad=True) * 2)
    assert metrics._losses["train"].grad_fn is None


# -- evaluation ------------------------------------------------------------------------------------------------


class Numbers:
    """Sample n is the number n."""

    def __init__(self, num_samples):
        self.num_samples = num_samples

    def batch(self, indices, draws):
        return {"n": indices, "drawn": draws.view(np.int64)}


def reading(dataset):
    """As a `Feed` reads it."""
    return lambda wanted: (
        {name: torch.from_numpy(array) for name, array in read(dataset, *samples).items()} for samples in wanted
    )


class Task:
    def __init__(self):
        self.seen, self.drawn = [], {}

    def evaluate(self, parts, batch):
        assert not torch.is_grad_enabled()
        assert not any(part.training for part in parts.values())
        assert torch.equal(batch["draws"], batch["drawn"])
        self.seen.append(batch["n"].tolist())
        self.drawn |= dict(zip(batch["n"].tolist(), batch["draws"].tolist(), strict=True))
        return {"sum": batch["n"].sum(), "count": torch.tensor(len(batch["n"]), dtype=torch.int32)}

    def finish_evaluation(self, sums):
        return {"loss": sums["sum"] / max(1.0, sums["count"]), **sums}


def run(num_samples, limit, batch_size, worker=0, num_workers=1, task=None):
    task, beats, parts = task or Task(), [], {"main": nn.Dropout()}
    num_before = len(task.seen)
    read = reading(Numbers(num_samples))
    found = evaluate(task, parts, read, min(limit, num_samples), batch_size, worker, num_workers, beats.append)
    assert all(part.training for part in parts.values())
    assert beats == list(range(len(task.seen) - num_before))
    return task.seen, found


def test_sums_are_divided_once():
    seen, found = run(5, 100, 2)
    assert seen == [[0, 1], [2, 3], [4]]
    assert found == {"loss": 2.0, "sum": 10.0, "count": 5.0}  # a mean of means would be 2.5


def test_only_as_many_samples_as_asked():
    assert [n for batch in run(1000, 7, 3)[0] for n in batch] == list(range(7))


def test_draws_belong_to_a_sample_whatever_the_batch_and_the_worker():
    one, many = Task(), Task()
    run(9, 9, 9, task=one)
    for worker in range(2):
        run(9, 9, 2, worker, 2, task=many)
    assert one.drawn == many.drawn and len(set(one.drawn.values())) == 9


def test_sums_are_exact_beyond_fp32():
    task, big = Task(), Numbers(3)
    big.batch = lambda indices, draws: {"n": indices + 2**24, "drawn": draws.view(np.int64)}
    found = evaluate(task, {}, reading(big), 3, 1, 0, 1, lambda _: None)
    assert found["sum"] == 3 * 2**24 + 3


def test_a_sum_in_brackets_is_a_number_too():
    task = Task()
    task.evaluate = lambda parts, batch: {"sum": batch["n"].sum()[None], "count": torch.ones(1)}
    found = evaluate(task, {}, reading(Numbers(5)), 5, 2, 0, 1, lambda _: None)
    assert (found["sum"], found["count"]) == (10.0, 3.0)


def test_workers_add_up_where_the_samples_are(monkeypatch):
    """A task may count in the host's memory, where NCCL adds nothing up; `meta` stands for a device here."""
    found = {}
    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module, "_add_up", lambda totals: found.update(totals) or dict.fromkeys(totals, 1.0))
    task = Task()
    task.evaluate = lambda parts, batch: {"sum": batch["n"].sum(), "count": torch.tensor(2)}
    on_device = lambda wanted: ({"n": torch.zeros(2, device="meta")} for _ in wanted)  # noqa: E731
    evaluate(task, {}, on_device, 4, 2, 0, 1, lambda _: None)
    assert {name: total.device.type for name, total in found.items()} == {"sum": "meta", "count": "meta"}


@settings(deadline=None)
@given(
    num_samples=st.integers(1, 60),
    limit=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    num_workers=st.integers(1, 7),
)
def test_every_sample_is_seen_by_exactly_one_worker(num_samples, limit, batch_size, num_workers):
    batches = [
        list(module._batches(min(num_samples, limit), batch_size, worker, num_workers)) for worker in range(num_workers)
    ]
    assert len({len(own) for own in batches}) == 1  # as many for each, since sharded models compute together
    every = [batch for own in batches for batch in own]
    assert all(0 < len(indices) <= batch_size for indices, _ in every)
    counted = [int(n) for indices, counts in every if counts for n in indices]
    assert sorted(counted) == list(range(min(num_samples, limit)))


TOGETHER = """
    import json, os, sys
    import torch, torch.distributed as dist
    sys.path.insert(0, sys.argv[1])
    from test_metrics_evaluate import Numbers, Task, reading
    from dtrain.training.evaluate import evaluate
    from dtrain.training.metrics import StepMetrics
    num_workers = 3
    worker = next((n for n in range(1, num_workers) if os.fork() == 0), 0)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(sys.argv[2], num_workers)
    dist.init_process_group("gloo", store=store, rank=worker, world_size=num_workers)
    found = [
        evaluate(Task(), {}, reading(Numbers(n)), n, 2, worker, num_workers, lambda _: None) for n in (10, 3, 2, 1)
    ]
    metrics = StepMetrics(torch.device("cpu"), ["train"], 1, 0)
    metrics.add("train", torch.tensor(float(worker)))
    metrics.end_step(torch.tensor(4.0))
    said = [found, metrics.read()["loss"]]
    gathered = [None] * num_workers
    dist.all_gather_object(gathered, said)
    if worker == 0:
        print(json.dumps(gathered))
    dist.barrier()
    os._exit(0) if worker else [os.wait() for _ in range(num_workers - 1)]
"""


def test_all_workers_return_the_same_figures_even_those_without_a_sample(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(TOGETHER), str(Path(__file__).parent), str(tmp_path / "store")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    gathered = json.loads(result.stdout)
    assert gathered[0] == gathered[1] == gathered[2]
    found, loss = gathered[0]
    assert [f["sum"] for f in found] == [45.0, 3.0, 1.0, 0.0]
    assert [f["count"] for f in found] == [10.0, 3.0, 2.0, 1.0]
    assert loss == 1.0
