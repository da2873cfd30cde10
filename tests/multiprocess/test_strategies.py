"""Every strategy computes what one plain process does, in every way its options spread the work."""

from dataclasses import replace

import pytest
import sharded_ranks
import torch
from world import TOKENS, TRANSFORMER, Cell, RankError, assemble, assert_same

from dtrain.data import DataShape
from dtrain.errors import InputError

SUMS = 1e-6
"""fp32 rounds a sum of gradients by 6e-8 of it, in another order otherwise; weights are below 1, after 5 steps."""
LOW = 2e-2
"""bf16 and fp16 round each product before it is summed, and micro batches of other sizes are summed in other orders:
after 5 steps of 1e-2 in which a gradient is a few percent off, weights are."""
TABLE = DataShape("table", num_features=5)
LLAMA = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "bias": False}


def largest_difference(one, other, prefix):
    names = {name for name in one.state if name.startswith(prefix)}
    assert names == {name for name in other.state if name.startswith(prefix)}
    return max(float((one.state[n].double() - other.state[n].double()).abs().max()) for n in names)


def fails_on_one(rank, num_workers):
    if rank == 1:
        raise ValueError("no such number")


def test_what_a_rank_raises_is_told(ranks):
    with pytest.raises(RankError, match=r"rank 1 raised:(.|\n)*ValueError: no such number") as caught:
        ranks.run(fails_on_one, 2)
    assert caught.value.classes[0] == "ValueError"


# -- the same weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_workers", "strategy"),
    [
        (2, {"name": "ddp"}),
        (2, {"name": "ddp", "static_graph": True}),
        (1, {"name": "fsdp"}),
        (2, {"name": "fsdp"}),
        (4, {"name": "fsdp"}),
        (2, {"name": "fsdp", "reshard_after_forward": False}),
        (2, {"name": "fsdp", "reduce_each_micro_batch": True}),
        (2, {"name": "fsdp", "wrap": "size", "min_parameters": 1000}),
        (2, {"name": "fsdp", "cpu_offload": True}),
        (4, {"name": "fsdp", "replicate": 2}),
        (4, {"name": "fsdp", "tensor_parallel": 2}),
    ],
    ids=lambda value: str(value),
)
def test_weights_and_moments_are_those_of_one_process(num_workers, strategy, ranks):
    cell = Cell(strategy=strategy, num_workers=num_workers)
    trained, alone = ranks.train(cell), ranks.alone(cell)
    assert_same(trained, alone, SUMS)
    assert largest_difference(trained, alone, "optimizer.") <= SUMS
    losses = [[report["loss"] for report in each.reports if "loss" in report] for each in (trained, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    norms = [[report["grad_norm"] for report in each.reports if "loss" in report] for each in (trained, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_copy_on_each_node(ranks):
    cell = Cell(strategy={"name": "fsdp", "replicate": "nodes"}, num_workers=4, num_nodes=2)
    assert_same(ranks.train(cell), ranks.alone(cell), SUMS)


@pytest.mark.parametrize("strategy", [{"tensor_parallel": 2}, {"wrap": "size", "min_parameters": 500}], ids=str)
def test_heads_that_share_a_norm_and_a_gate(strategy, ranks):
    """The norm of queries and keys sees some heads on each worker: its gradient is the sum over them."""
    cell = Cell(model={**TRANSFORMER, **LLAMA}, strategy={"name": "fsdp", **strategy})
    assert_same(ranks.train(cell), ranks.alone(cell), SUMS)


def test_without_clipping_and_with_momentum(ranks):
    sgd = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    cell = Cell(strategy={"name": "fsdp"}, optimizer=sgd, train={"clip_grad_norm": None})
    assert_same(ranks.train(cell), ranks.alone(cell), SUMS)


@pytest.mark.parametrize("recomputed", ["selective", "full"])
@pytest.mark.parametrize("strategy", [{}, {"tensor_parallel": 2}], ids=str)
def test_recomputed_activations_change_nothing(recomputed, strategy, ranks):
    cell = Cell(strategy={"name": "fsdp", **strategy}, train={"activation_checkpointing": recomputed})
    plain = replace(cell, train={})
    assert_same(ranks.train(cell), ranks.alone(plain), SUMS)


def test_blocks_compiled_sharded_and_recomputed(ranks):
    """What inductor fuses it computes in fp32 as before; the sample at the end compiles nothing more."""
    cell = Cell(model={**TRANSFORMER, "num_layers": 1}, strategy={"name": "fsdp"}, steps=2)
    compiled = replace(cell, train={"compile": True, "activation_checkpointing": "selective"})
    assert_same(ranks.train(compiled), ranks.alone(cell), SUMS)


def test_an_average_and_evaluations_between_steps_leave_the_weights_alone(ranks):
    """An evaluation gathers weights, and the average stands in their place meanwhile: neither may be trained on."""
    cell = Cell(strategy={"name": "fsdp"}, train={"ema": 0.9}, evaluate_every=1)
    assert_same(ranks.train(cell), ranks.alone(cell), SUMS)
    assert_same(ranks.train(cell), ranks.alone(Cell(train={"ema": 0.9})), SUMS)


@pytest.mark.parametrize("num_workers", [2, 4])
@pytest.mark.parametrize("task", [sharded_ranks.regression, sharded_ranks.frozen], ids=lambda task: task.__name__)
def test_sizes_that_no_number_of_workers_divides(task, num_workers, ranks):
    cell = Cell(shape=TABLE, task=task, strategy={"name": "fsdp"}, num_workers=num_workers)
    trained = ranks.train(cell)
    assert_same(trained, ranks.alone(cell), SUMS)
    assert "model.model.offset" in trained.names[0]
    assert "model.model.offset" not in trained.names[-1]  # one number, which the first holds
    if task is sharded_ranks.frozen:
        assert not any(name.startswith("optimizer.train.model.first") for name in trained.state)


@pytest.mark.parametrize("strategy", [{"name": "ddp"}, {"name": "fsdp"}], ids=str)
def test_two_phases_of_which_each_trains_one_part(strategy, ranks):
    cell = Cell(shape=TABLE, task=sharded_ranks.players, strategy=strategy, evaluate_every=2)
    assert_same(ranks.train(cell), ranks.alone(cell), SUMS)


def test_parts_that_a_phase_does_not_train_get_no_gradients(ranks):
    cell = Cell(shape=TABLE, task=sharded_ranks.players, strategy={"name": "fsdp"})
    for found in ranks.run(sharded_ranks.gradients_of_idle_parts, 2, cell.plan().to_json(), cell.shape, cell.task):
        assert all(name.startswith("judge.") for name in found["judge"])
        assert all(name.startswith("maker.") for name in found["maker"])
        assert found["judge"]
        assert found["maker"]


# -- formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("strategy", [{"name": "ddp"}, {"name": "fsdp"}], ids=str)
def test_low_formats_come_close_to_one_process(precision, strategy, ranks):
    cell = Cell(strategy=strategy, train={"precision": precision})
    trained, alone = ranks.train(cell), ranks.alone(cell)
    assert_same(trained, alone, LOW)
    assert trained.state["model.model.tokens.weight"].dtype is torch.float32
    if precision == "fp16":
        assert torch.equal(trained.state["optimizer.train.loss_scale"], alone.state["optimizer.train.loss_scale"])


def test_gathering_in_bf16_computes_what_gathering_in_fp32_does(ranks):
    """Autocast rounds the same weights in the same way: at most the order of a sum differs."""
    train = {"precision": "bf16"}
    plain = ranks.train(Cell(strategy={"name": "fsdp"}, train=train))
    low = ranks.train(Cell(strategy={"name": "fsdp", "gather": "low"}, train=train))
    assert_same(low, plain, SUMS)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_gradients_sent_in_bf16_are_about_right(name, ranks):
    cell = Cell(strategy={"name": name, "gradient_compression": "bf16"})
    trained, alone = ranks.train(cell), ranks.alone(cell)
    assert_same(trained, alone, LOW)
    assert largest_difference(trained, alone, "model.") > SUMS  # they were compressed


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_an_overflow_on_one_worker_skips_the_step_on_all(name, ranks):
    """After one step nothing has moved and the scale is halved; pieces that all hold are compared bit for bit."""
    cell = Cell(
        shape=TABLE, task=sharded_ranks.overflowing, strategy={"name": name}, train={"precision": "fp16"}, steps=1
    )
    trained = ranks.train(cell)
    untouched = sharded_ranks.overflowing(TABLE, cell.plan().train).parts["model"].state_dict()
    for key in ("first.weight", "second.0.bias", "offset"):
        assert torch.equal(trained.state[f"model.model.{key}"], untouched[key])
    assert trained.state["optimizer.train.loss_scale"].tolist() == [32768.0, 0.0]
    assert trained.state["optimizer.train.model.first.weight.step"].item() == 0
    more = ranks.train(replace(cell, steps=2))
    assert more.state["optimizer.train.loss_scale"].tolist() == [32768.0, 1.0]
    assert not torch.equal(more.state["model.model.first.weight"], untouched["first.weight"])


# -- state -------------------------------------------------------------------------------------------------------

DDP, FSDP = {"name": "ddp"}, {"name": "fsdp"}
MESH, HYBRID = {"name": "fsdp", "tensor_parallel": 2}, {"name": "fsdp", "replicate": 2}


@pytest.mark.parametrize(
    ("writers", "written_by", "readers", "read_by"),
    [(2, FSDP, 1, DDP), (1, DDP, 2, FSDP), (2, DDP, 4, MESH), (4, MESH, 2, FSDP), (4, HYBRID, 1, FSDP)],
    ids=str,
)
def test_what_one_strategy_writes_another_reads_and_goes_on_with(
    writers, written_by, readers, read_by, ranks, tmp_path
):
    before = Cell(strategy=written_by, num_workers=writers)
    after = Cell(strategy=read_by, num_workers=readers)
    arguments = (TOKENS, None, 2, str(tmp_path))
    held = ranks.run(sharded_ranks.train_and_write, writers, before.plan().to_json(), *arguments)
    written = assemble(held, is_replicated=written_by is DDP)
    found = ranks.run(sharded_ranks.read_and_train, readers, after.plan().to_json(), *arguments)
    restored = assemble([each[0] for each in found], is_replicated=read_by is DDP)
    assert restored.keys() == written.keys()
    assert all(torch.equal(restored[name], written[name]) for name in written)
    ended = assemble([each[1] for each in found], is_replicated=read_by is DDP)
    alone = ranks.alone(before).state
    assert max(float((ended[name] - alone[name]).abs().max()) for name in alone) <= SUMS


# -- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_parameters_that_the_loss_does_not_use_are_named(name, ranks):
    cell = Cell(shape=TABLE, task=sharded_ranks.unused, strategy={"name": name})
    with pytest.raises(RankError, match=r"phase 'train' does not depend on model\.spare\.weight, model\.spare\.b"):
        ranks.train(cell)


def test_a_parameter_without_dimensions_is_refused_by_name(ranks):
    cell = Cell(shape=TABLE, task=sharded_ranks.scalar, strategy={"name": "fsdp"})
    with pytest.raises(RankError, match=r"model\.offset has none; give it the shape \[1\]") as caught:
        ranks.train(cell)
    assert caught.value.classes[0] == InputError.__name__


def test_a_task_that_says_nothing_of_splitting_is_refused(ranks):
    cell = Cell(shape=TABLE, task=sharded_ranks.regression, strategy=MESH)
    with pytest.raises(RankError, match=r"Regression does not say how its layers are split"):
        ranks.train(cell)
