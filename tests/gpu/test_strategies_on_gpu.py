"""Every strategy trains to the same weights on one GPU, and to those that cores come to."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from node import Ended, Node, needs_gpu

JOB = Path(__file__).resolve().parents[1] / "ray" / "job.yaml"
# SGD, because Adam's division would turn a rounding of a tiny gradient into a whole step.
TRAINING = (
    "train.steps=10",
    "model.dropout=0",
    "optimizer={name: sgd, lr: 0.1}",
    "schedule.name=constant",
    "evaluate.every_steps=null",
    "checkpoint.every_steps=null",
)
MOVED = 1e-2
"""How far the training moves some weight at least: a difference far below it is none of training."""
SAME = {"gpu": 1e-4, "cpu": 1e-3}
"""Largest difference of a weight: between strategies on the GPU; and between it and cores, since its matrix products
read 10 bits of a number (TF32)."""
STRATEGIES = {
    "fsdp": "{name: fsdp}",
    "deepspeed-1": "{name: deepspeed, stage: 1}",
    "deepspeed-2": "{name: deepspeed, stage: 2}",
    "deepspeed-3": "{name: deepspeed, stage: 3, keep_below: 0}",
    "accelerate-ddp": "{name: accelerate, engine: ddp}",
    "accelerate-fsdp": "{name: accelerate, engine: fsdp}",
    "accelerate-deepspeed": "{name: accelerate, engine: deepspeed}",
}

pytestmark = needs_gpu


def apart(one: Ended, other: Ended) -> float:
    ours, theirs = one.weights(), other.weights()
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


@pytest.fixture(scope="module")
def node():
    with Node() as made:
        yield made


@pytest.fixture(scope="module")
def plain(node: Node) -> Ended:
    return node.run(node.plan(JOB, "strategy.name=ddp", *TRAINING))


def test_a_gpu_trains_as_cores_do(node: Node, plain: Ended) -> None:
    with Node(("cluster.device=cpu", "cluster.workers_per_node=1")) as cores:
        on_cores = cores.run(cores.plan(JOB, "strategy.name=ddp", *TRAINING))
        assert apart(plain, on_cores) < SAME["cpu"]
    untrained = node.run(node.plan(JOB, "strategy.name=ddp", *TRAINING, "train.steps=1"))
    assert apart(plain, untrained) > MOVED


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_trains_as_ddp_does(node: Node, plain: Ended, strategy: str) -> None:
    library = strategy.partition("-")[0] if strategy != "accelerate-deepspeed" else "deepspeed"
    if library != "fsdp" and find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    ended = node.run(node.plan(JOB, f"strategy={STRATEGIES[strategy]}", *TRAINING))
    assert apart(ended, plain) < SAME["gpu"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_bf16_and_compiled_blocks_learn(node: Node, plain: Ended, strategy: str) -> None:
    """Evaluations in between compile anew, and nobody takes that for a hang."""
    settings = [*TRAINING, f"strategy.name={strategy}", "train.precision=bf16", "train.compile=true"]
    ended = node.run(node.plan(JOB, *settings, "evaluate.every_steps=4"))
    assert len(ended.attempts) == 1
    assert apart(ended, plain) < MOVED


def test_what_does_not_fit_on_the_gpu_stays_in_the_hosts_memory(node: Node, plain: Ended) -> None:
    ended = node.run(node.plan(JOB, "strategy={name: fsdp, cpu_offload: true}", *TRAINING))
    assert apart(ended, plain) < SAME["gpu"]


@pytest.mark.parametrize("model", ["cnn", "gan"])
def test_pictures_train_the_same_sharded_and_whole(node: Node, model: str) -> None:
    settings = [f"model={{name: {model}}}", "data={name: images, source: digits}", *TRAINING]
    settings.remove("model.dropout=0")
    whole, sharded = (node.run(node.plan(JOB, f"strategy.name={name}", *settings)) for name in ("ddp", "fsdp"))
    assert apart(whole, sharded) < 10 * SAME["gpu"], "sums over pictures are taken in any order"
