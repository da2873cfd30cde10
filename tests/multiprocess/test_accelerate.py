"""Accelerate's engines: that they are what was asked for, that they compute the same, and that they leave no trace."""

import os

import pytest
from msgspec.structs import replace
from test_deepspeed import MADE, SUMS, goes_on, whole
from world import Cell, Keeper, RankError, Ranks, Trained, assert_same, make_training

from dtrain.checkpoint import store
from dtrain.plan import Plan
from dtrain.training import loop

SHARDED = ["fsdp", "deepspeed"]


@pytest.fixture(scope="module")
def ranks():
    """As `conftest.ranks`, with what takes long to import."""
    with Ranks(preload=("deepspeed.runtime.zero.muon.muon_optimizer", "accelerate")) as started:
        yield started


def cell_of(name, engine, **options):
    words = {key: options.pop(key) for key in ("train", "steps", "num_workers", "optimizer") if key in options}
    return Cell(strategy={"name": "accelerate", "engine": engine, **options}, task=MADE[name], **words)


@pytest.mark.parametrize(
    ("name", "engine", "options"),
    [
        ("Transformer", "ddp", {}),
        ("Rivals", "ddp", {"train": {"clip_grad_norm": None}}),
        ("Transformer", "fsdp", {"train": {"activation_checkpointing": "full"}}),
        ("Pictures", "fsdp", {"reshard_after_forward": False}),
        ("Pictures", "deepspeed", {"stage": 1}),
        ("Pictures", "deepspeed", {"stage": 3}),
        ("Pictures", "ddp", {"num_workers": 1}),
        ("Pictures", "fsdp", {"num_workers": 1}),
        ("Transformer", "fsdp", {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}),
    ],
)
def test_accelerate_equals_one_process(name, engine, options, ranks):
    cell = cell_of(name, engine, **options)
    trained = ranks.train(cell)
    assert_same(trained, ranks.alone(cell), SUMS)
    assert_same(trained, ranks.alone(cell), SUMS, "optimizer.")


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_averages_are_evaluated_and_training_goes_on_unharmed(engine, ranks):
    cell = cell_of("Transformer", engine, train={"ema": 0.9})
    plan = cell.plan()
    often = replace(plan, evaluate=replace(plan.evaluate, every_steps=2))
    found = ranks.run(goes_on, 2, often.to_json(), cell.shape, cell.task)
    assert_same(Trained(whole(found), found[0][1], found[0][2], []), ranks.alone(cell), SUMS)


def test_a_checkpoint_goes_from_engine_to_engine(ranks, tmp_path):
    reached, path = 0, None
    for engine, num_workers in (("fsdp", 2), ("ddp", 1), ("deepspeed", 2)):
        cell = cell_of("Pictures", engine, num_workers=num_workers, steps=reached + 1)
        found = ranks.run(goes_on, num_workers, cell.plan().to_json(), cell.shape, cell.task, reached, path)
        reached, written = reached + 1, whole(found)
        store.write(tmp_path, reached, [piece for entry in found for piece in entry[0]], {})
        path = store.path_of(tmp_path, reached)
    expected = ranks.alone(cell).state
    assert written.keys() == expected.keys()
    assert max(float((written[name].double() - expected[name].double()).abs().max()) for name in expected) < SUMS


def environments(rank, num_workers, plan_json, shape, task):
    """What Accelerate is told by others' variables, and what is left of its own."""
    misleading = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "bf16", "FSDP_VERSION": "1"}
    os.environ |= misleading
    before = dict(os.environ)
    training = make_training(rank, num_workers, Plan.from_json(plan_json), shape, task)
    after = dict(os.environ)
    kinds = {type(module).__name__ for module in training.prepared.engines["train"]._model.modules()}
    loop.train(training, 0, Keeper())
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}, kinds


def test_no_setting_goes_through_the_environment(ranks):
    cell = cell_of("Pictures", "ddp", steps=1)
    for changed, kinds in ranks.run(environments, 2, cell.plan().to_json(), cell.shape, cell.task):
        assert changed == set()
        assert "DistributedDataParallel" in kinds
        assert not any(kind.startswith("FSDP") for kind in kinds)


@pytest.mark.parametrize("engine", SHARDED)
def test_several_networks_of_the_users_own_are_refused(engine, ranks):
    with pytest.raises(RankError, match=r"takes one network, and this model has 2 \(generator, critic\); use strategy"):
        ranks.train(cell_of("Rivals", engine, num_workers=1))


def test_weights_that_a_loss_leaves_out_are_named(ranks):
    with pytest.raises(RankError, match=r"phase 'train' does not depend on model.spare.weight, model.spare.bias;"):
        ranks.train(cell_of("Forgetful", "fsdp", num_workers=1))
