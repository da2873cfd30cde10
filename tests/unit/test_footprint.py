"""What a worker must hold, known before anything runs: the arithmetic of ZeRO, and the advice where it is too much."""

import pytest
from making import a_cluster, a_job

from dtrain import footprint
from dtrain.errors import InputError
from dtrain.machine import Gpu, Machine
from dtrain.models import ModelSize
from dtrain.plan import Workers
from dtrain.planning import make_plan

H100 = Machine(num_cores=192, memory_gib=2048.0, gpus=(Gpu("H100", 80.0),) * 8)
SEVEN_BILLION = ModelSize(num_parameters=7_500_000_000, flops_per_sample=0, activation_bytes_per_sample=0)
LLAMA = {
    "num_layers": 32, "num_heads": 32, "width": 4096, "activation": "swiglu", "mlp_ratio": 2.6875,
    "norm": "rmsnorm", "positions": "rope", "tie_weights": False,
}  # fmt: skip


def workers(per_node=64, num_nodes=1):
    return Workers(
        num_nodes=num_nodes, per_node=per_node, device="cuda", collectives="nccl", threads=1, cpus_per_node=per_node
    )


def held(strategy, job=None, accumulation=1, **where):
    asked = a_job(strategy=strategy, **(job or {}))
    return footprint.bytes_of(asked, workers(**where), accumulation)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ({"name": "ddp"}, 120.0),
        ({"name": "deepspeed", "stage": 1}, 31.4 + 15.0),  # here gradients add up in fp32: 2 bytes more a parameter
        ({"name": "deepspeed", "stage": 2}, 16.6 + 0.23),
        ({"name": "deepspeed", "stage": 3}, 1.88 + 0.23),
    ],
)
def test_the_arithmetic_is_that_of_the_paper(strategy, expected):
    """Figure 1 of ZeRO: 7.5 billion parameters on 64 workers, Adam in mixed precision, in 10**9 bytes."""
    job = a_job(strategy=strategy, train={"steps": 1, "precision": "bf16"})
    gigabytes = footprint.state_gib(job, workers(), SEVEN_BILLION) * 2**30 / 1e9
    assert gigabytes == pytest.approx(expected, rel=0.01)


def test_every_strategy_that_divides_says_how():
    whole = footprint.Bytes(trained=16.0, frozen=4.0, average=4.0)
    assert held({"name": "ddp"}) == whole
    assert held({"name": "fsdp"}, per_node=1) == whole
    assert held({"name": "fsdp"}, per_node=8) == footprint.Bytes(2.0, 0.5, 0.5)
    assert held({"name": "fsdp", "replicate": "nodes"}, per_node=4, num_nodes=2) == footprint.Bytes(4.0, 1.0, 1.0)
    assert held({"name": "fsdp", "cpu_offload": True}, per_node=8) == footprint.Bytes(0.0, 0.0, 0.0)
    assert held({"name": "deepspeed", "stage": 3}, per_node=8) == footprint.Bytes(2.5, 0.5, 0.5)
    offloaded = held({"name": "deepspeed", "stage": 3, "offload_optimizer": "cpu", "offload_parameters": True})
    assert (offloaded.trained, offloaded.frozen) == (0.0, 0.0)


def test_gradients_that_wait_for_the_last_micro_batch_are_whole():
    assert held({"name": "fsdp"}, accumulation=4, per_node=8).trained == 12.0 / 8 + 4.0
    each = {"name": "fsdp", "reduce_each_micro_batch": True}
    assert held(each, accumulation=4, per_node=8).trained == 2.0


def test_plain_sgd_needs_less():
    assert held({"name": "ddp"}, {"optimizer": {"name": "sgd", "momentum": 0.9}}).trained == 12.0
    assert held({"name": "ddp"}, {"optimizer": {"name": "sgd", "momentum": 0.0}}).trained == 8.0


def test_frozen_weights_and_an_average_count():
    size = ModelSize(num_parameters=2**30, flops_per_sample=0, activation_bytes_per_sample=0, num_frozen=3 * 2**30)
    assert footprint.state_gib(a_job(), workers(), size) == 16.0 + 3 * 4.0
    assert footprint.state_gib(a_job(train={"steps": 1, "ema": 0.9}), workers(), size) == 16.0 + 3 * 4.0 + 4 * 4.0


def planned(strategy, machine=H100, micro=8, **cluster):
    job = a_job(
        model=LLAMA,
        batch={"global": 64, "micro": micro},
        strategy=strategy,
        train={"steps": 10, "precision": "bf16"},
    )
    return make_plan(job, a_cluster(**cluster), machine)


def test_a_model_that_cannot_fit_is_refused_with_a_strategy_that_does():
    said = (
        r"weights, gradients and optimizer state of 6\.\d billion parameters take 9\d GiB of each worker's 80 under"
        r" strategy ddp; strategy: {name: fsdp} takes 1\d GiB"
    )
    with pytest.raises(InputError, match=said):
        planned({"name": "ddp"})
    assert planned({"name": "fsdp"}).warnings == ()
    assert planned({"name": "deepspeed", "stage": 3}).warnings == ()


def test_one_worker_is_told_to_offload_or_to_share():
    one = Machine(num_cores=24, memory_gib=256.0, gpus=(Gpu("H100", 80.0),))
    with pytest.raises(InputError, match=r"strategy: {name: fsdp, cpu_offload: true} takes 0 GiB"):
        planned({"name": "ddp"}, one)
    cores = Machine(num_cores=2, memory_gib=24.0)  # whose memory is the one that there is
    with pytest.raises(InputError, match=r"each worker's 12 under strategy ddp; share it among 9 workers or more"):
        planned({"name": "ddp"}, cores)


def test_what_fits_barely_is_warned_of():
    [said] = planned({"name": "ddp"}, memory_per_worker_gib=110).warnings
    assert "which leaves little for activations; strategy: {name: fsdp} takes 1" in said
    assert planned({"name": "ddp"}, memory_per_worker_gib=200).warnings == ()


def test_a_model_of_unknown_size_is_let_through():
    unknown = ModelSize(num_parameters=0, flops_per_sample=0, activation_bytes_per_sample=0)
    assert footprint.check(a_job(), workers(1), unknown, 1, 0.5) == []
