"""A plan leaves nothing open, its arithmetic always holds, and what cannot work is refused by name."""

import json
import re
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from making import FOUR_GPUS, TWO_CORES, a_cluster, a_job, a_plan

from dtrain.errors import InputError
from dtrain.machine import Gpu, Machine
from dtrain.plan import BatchArithmetic, Plan
from dtrain.planning import make_plan

MACHINES = st.builds(
    Machine,
    num_cores=st.integers(1, 256),
    memory_gib=st.floats(64, 4096),
    gpus=st.integers(0, 16).map(lambda n: (Gpu("H200", 141.0),) * n),
)


# -- batch arithmetic ------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    machine=MACHINES,
    global_size=st.integers(1, 2**24),
    micro=st.none() | st.integers(1, 4096),
    nodes=st.integers(1, 64),
    per_node=st.just("auto") | st.integers(1, 64),
)
def test_micro_times_accumulation_times_workers_is_the_global_batch(machine, global_size, micro, nodes, per_node):
    job = a_job(batch={"global": global_size, "micro": micro})
    cluster = a_cluster(device="cpu", nodes=nodes, workers_per_node=per_node)
    try:
        plan = make_plan(job, cluster, machine)
    except InputError as error:
        found = re.search(r"multiple of (\d+) workers?.*; nearest: (\d+)", error.message)
        assert found, error.message
        total, nearest = map(int, found.groups())
        assume(nearest <= 2**24)
        again = a_job(batch={"global": nearest, "micro": micro})
        assert make_plan(again, a_cluster(device="cpu", nodes=nodes, workers_per_node=total // nodes), machine)
        return
    batch = plan.batch
    assert batch.global_size == global_size
    assert batch.micro * batch.accumulation * plan.workers.total == global_size
    assert micro is None or batch.micro == micro
    batch.check(plan.workers.total)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_arithmetic_that_does_not_hold_is_refused_at_every_start(micro, accumulation, workers, others):
    batch = BatchArithmetic(global_size=micro * accumulation * workers, micro=micro, accumulation=accumulation)
    batch.check(workers)
    if others != workers:
        with pytest.raises(InputError, match="plan the job again"):
            batch.check(others)


@pytest.mark.parametrize(
    ("workers", "micro", "asked", "message"),
    [
        (8, 32, 500, "batch.global 500 is not a multiple of 8 workers x micro 32; nearest: 512"),
        (8, 32, 1, "batch.global 1 is not a multiple of 8 workers x micro 32; nearest: 256"),
        (8, None, 12, "batch.global 12 is not a multiple of 8 workers; nearest: 8"),
        (8, None, 13, "batch.global 13 is not a multiple of 8 workers; nearest: 16"),
        (1, 4, 6, "batch.global 6 is not a multiple of 1 worker x micro 4; nearest: 4"),
    ],
)
def test_a_batch_that_does_not_divide_names_the_nearest_that_does(workers, micro, asked, message):
    job = a_job(batch={"global": asked, "micro": micro})
    with pytest.raises(InputError) as caught:
        make_plan(job, a_cluster(device="cpu", workers_per_node=workers), TWO_CORES)
    assert caught.value.message == message


@given(activation=st.integers(1, 2**40), memory=st.floats(0.01, 1000), per_worker=st.integers(1, 4096))
def test_the_micro_batch_fits_memory_or_is_one(monkeypatch_size, activation, memory, per_worker):
    monkeypatch_size(activation)
    job = a_job(batch={"global": per_worker})
    plan = make_plan(job, a_cluster(device="gpu", workers_per_node=1, memory_per_worker_gib=memory), FOUR_GPUS)
    assert plan.batch.micro == 1 or plan.batch.micro * activation <= memory * 2**30


@pytest.fixture(scope="module")
def monkeypatch_size():
    """Sets how much memory a sample of the transformer needs."""
    from dtrain.models import ModelSize, transformer

    patch = pytest.MonkeyPatch()
    yield lambda activation: patch.setattr(transformer, "describe", lambda *_: ModelSize(1, 1, activation))
    patch.undo()


# -- nothing left open -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [TWO_CORES, FOUR_GPUS])
def test_a_plan_leaves_nothing_open(machine):
    plan = make_plan(
        a_job(schedule={"name": "wsd"}, evaluate={"every_steps": None}, checkpoint={"every_steps": None}),
        a_cluster(),
        machine,
    )
    text = plan.to_json()
    assert '"auto"' not in text
    values = json.loads(text)
    assert values["schedule"]["decay_steps"] == 20
    assert (values["evaluate"]["every_steps"], values["checkpoint"]["every_steps"]) == (100, 100)
    told = "\n".join(plan.notes)
    for resolved in (
        "device:",
        "workers_per_node:",
        "batch.micro:",
        "schedule.decay_steps:",
        "checkpoint.every_steps:",
    ):
        assert resolved in told


@settings(max_examples=50, deadline=None)
@given(machine=MACHINES, global_size=st.sampled_from([8, 64, 480, 4096]), precision=st.sampled_from(["fp32", "bf16"]))
def test_a_plan_goes_through_json_unchanged(machine, global_size, precision):
    plan = make_plan(a_job(batch={"global": global_size}, train={"precision": precision}), a_cluster(), machine)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()


def test_a_plan_cannot_be_changed():
    plan = a_plan()
    with pytest.raises(AttributeError, match="immutable"):
        plan.name = "other"


def test_the_same_files_and_machine_give_the_same_plan():
    assert a_plan().to_json() == a_plan().to_json()


def test_storage_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert a_plan("runs").storage == str(tmp_path / "runs")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert a_plan("~/runs").storage == "/home/somebody/runs"


# -- workers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "cluster", "expected"),
    [
        (TWO_CORES, {}, ("cpu", "gloo", 2, 1)),
        (Machine(16, 64.0), {}, ("cpu", "gloo", 8, 2)),  # a batch of 8 keeps 8 workers busy
        (Machine(16, 64.0), {"workers_per_node": 1}, ("cpu", "gloo", 1, 16)),
        (FOUR_GPUS, {}, ("cuda", "nccl", 4, 4)),
        (FOUR_GPUS, {"device": "cpu", "workers_per_node": 2}, ("cpu", "gloo", 2, 8)),
        (FOUR_GPUS, {"workers_per_node": 1}, ("cuda", "nccl", 1, 4)),  # the other GPUs' cores are left to others
    ],
)
def test_workers_are_resolved_from_the_machine(machine, cluster, expected):
    workers = make_plan(a_job(), a_cluster(**cluster), machine).workers
    assert (workers.device, workers.collectives, workers.per_node, workers.threads) == expected


def test_auto_workers_divide_the_batch_over_all_nodes():
    plan = make_plan(a_job(batch={"global": 12}), a_cluster(nodes=2), Machine(8, 64.0))
    assert (plan.workers.per_node, plan.workers.total) == (6, 12)


def test_more_workers_than_cores_are_allowed_with_a_warning():
    plan = make_plan(a_job(), a_cluster(workers_per_node=4), TWO_CORES)
    assert plan.workers.per_node == 4
    assert plan.warnings == ("4 workers share 2 cores: correct, but slower than 2 workers",)
    assert not make_plan(a_job(), a_cluster(workers_per_node=2), TWO_CORES).warnings


def test_more_workers_than_gpus_are_refused():
    with pytest.raises(InputError, match=r"workers_per_node 8 is more than the 4 GPUs of this machine.*at most 4"):
        make_plan(a_job(), a_cluster(workers_per_node=8), FOUR_GPUS)


def test_gpus_that_are_not_there_are_refused_unless_the_workers_are_given():
    with pytest.raises(InputError, match="asks for GPUs and this machine has none"):
        make_plan(a_job(), a_cluster(device="gpu"), TWO_CORES)
    plan = make_plan(a_job(), a_cluster(device="gpu", workers_per_node=8, memory_per_worker_gib=80), TWO_CORES)
    assert (plan.workers.device, plan.workers.per_node) == ("cuda", 8)


@settings(max_examples=100, deadline=None)
@given(machine=MACHINES, per_node=st.just("auto") | st.integers(1, 300))
def test_a_node_is_never_asked_for_more_than_it_has(machine, per_node):
    try:
        plan = make_plan(a_job(batch={"global": 5040 * 16}), a_cluster(workers_per_node=per_node), machine)
    except InputError:
        return
    resources = plan.workers.resources
    assert 0 < resources["CPU"] <= machine.num_cores
    assert resources.get("GPU", 0) <= len(machine.gpus)
    assert plan.workers.threads >= 1


# -- the schedule ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"warmup_steps": 100}, "schedule.warmup_steps 100 is not below train.steps 100"),
        (
            {"name": "wsd", "warmup_steps": 60, "decay_steps": 50},
            "schedule.warmup_steps 60 + decay_steps 50 is more than train.steps 100",
        ),
    ],
)
def test_a_schedule_longer_than_the_run_is_refused(schedule: dict[str, Any], message: str):
    with pytest.raises(InputError) as caught:
        make_plan(a_job(schedule=schedule), a_cluster(), TWO_CORES)
    assert caught.value.message == message


@settings(max_examples=200, deadline=None)
@given(steps=st.integers(1, 10**6), warmup=st.integers(0, 10**6), decay=st.none() | st.integers(1, 10**6))
def test_warm_up_and_decay_fit_into_the_run(steps, warmup, decay):
    schedule = {"name": "wsd", "warmup_steps": warmup, "decay_steps": decay}
    try:
        plan = make_plan(a_job(train={"steps": steps}, schedule=schedule), a_cluster(), TWO_CORES)
    except InputError:
        assert warmup >= steps or (decay is not None and warmup + decay > steps)
        return
    assert plan.schedule.decay_steps is not None
    assert warmup + plan.schedule.decay_steps <= steps
