"""How workers and tensors are divided, and what strategies refuse at plan time."""

import itertools
import re

import numpy as np
import pytest
import torch
from making import a_cluster, a_job
from msgspec.structs import replace

from dtrain.errors import InputError
from dtrain.machine import Gpu, Machine
from dtrain.planning import make_plan
from dtrain.strategies.loss_scale import INTERVAL, START, LossScale
from dtrain.strategies.mesh import Mesh, chunk, cut

EIGHT_GPUS = Machine(num_cores=64, memory_gib=512.0, gpus=(Gpu("H100", 80.0),) * 8)


def plan(strategy, workers_per_node=8, nodes=1, **changes):
    job = a_job(strategy={"name": "fsdp", **strategy}, **{"batch": {"global": 48}, **changes})
    return make_plan(job, a_cluster(nodes=nodes, workers_per_node=workers_per_node), EIGHT_GPUS)


@pytest.mark.parametrize(
    ("shape", "tensor_dimension"),
    [((7, 6), None), ((7, 6), 1), ((1, 6), 1), ((12, 2), 0), ((12, 2), 1), ((3, 4), None), ((2, 4), 0), ((1,), None)],
)
@pytest.mark.parametrize("mesh", [Mesh(1, 4, 1), Mesh(2, 2, 1), Mesh(1, 2, 2), Mesh(2, 3, 2), Mesh(1, 1, 1)])
def test_workers_of_a_replica_hold_every_number_once(shape, tensor_dimension, mesh):
    held = np.zeros(shape, dtype=int)
    places = [mesh.place(worker) for worker in range(mesh.num_workers)]
    assert len(set(places)) == mesh.num_workers
    for place in places:
        at, size = cut(shape, mesh, place, tensor_dimension)
        held[tuple(slice(a, a + s) for a, s in zip(at, size, strict=True))] += 1
    assert (held == mesh.replicas * (mesh.tensor if tensor_dimension is None else 1)).all()


def test_chunks_are_those_of_torch():
    for size, parts in itertools.product(range(1, 14), range(1, 6)):
        found = [len(part) for part in torch.arange(size).chunk(parts)]
        found += [0] * (parts - len(found))
        assert [chunk(size, parts, n)[1] for n in range(parts)] == found
        assert [chunk(size, parts, n)[0] for n in range(parts)] == [min(sum(found[:n]), size) for n in range(parts)]


def test_a_mesh_that_does_not_come_out_even_is_an_error():
    with pytest.raises(ValueError, match="6 workers are not 2 replicas of groups of 2"):
        Mesh.of(6, 2, 2)


def test_a_plan_gives_each_tensor_group_samples_of_its_own():
    made = plan({"tensor_parallel": 2}, batch={"global": 48, "micro": 3})
    assert (made.batch.num_readers, made.batch.micro, made.batch.accumulation) == (4, 3, 4)


@pytest.mark.parametrize(("batch", "tensor_parallel", "per_node"), [(48, 1, 8), (6, 1, 6), (6, 2, 6), (4, 2, 8)])
def test_auto_takes_whole_tensor_groups(batch, tensor_parallel, per_node):
    model = {"num_heads": 2, "width": 32}
    made = plan({"tensor_parallel": tensor_parallel}, "auto", batch={"global": batch}, model=model)
    assert made.workers.per_node == per_node


@pytest.mark.parametrize(
    ("strategy", "changes", "words"),
    [
        ({"tensor_parallel": 3}, {}, "tensor_parallel 3 does not divide the 8 workers of a node; nearest: 2"),
        ({"tensor_parallel": 4}, {}, "tensor_parallel 4 does not divide num_heads 2 of model transformer"),
        (
            {"tensor_parallel": 2},
            {"model": {"mlp_ratio": 0.97}},
            "tensor_parallel 2 does not divide the hidden width of an MLP 31",
        ),
        ({"tensor_parallel": 2}, {"batch": {"global": 6}}, "batch.global 6 is not a multiple of 4 groups of 2 workers"),
        ({"replicate": 3}, {}, "replicate 3 does not divide the 8 workers that shard the model; nearest: 2"),
        (
            {"replicate": 3, "tensor_parallel": 2},
            {},
            "replicate 3 does not divide the 4 groups of 2 workers that shard the model; nearest: 2",
        ),
        ({"replicate": 8}, {}, "replicate 8 leaves one worker to each copy, and nothing is sharded"),
        ({"gather": "low"}, {}, "gather: low needs train.precision: bf16 or fp16"),
        (
            {"gather": "low"},
            {"train": {"precision": "bf16", "compile": True}},
            "use gather: fp32, or train.compile: false",
        ),
    ],
)
def test_fsdp_refuses_by_name_and_says_what_works(strategy, changes, words):
    with pytest.raises(InputError, match=re.escape(words)):
        plan(strategy, **changes)


def test_a_model_that_is_not_split_is_refused_under_tensor_parallelism():
    with pytest.raises(InputError, match=r"model mlp cannot be split inside of its layers; use tensor_parallel: 1"):
        job = replace(a_job(strategy={"name": "fsdp", "tensor_parallel": 2}), model=_mlp())
        component_check(job)


def _mlp():
    from dtrain import component

    return component.with_name("mlp", component.load("models", "mlp").Options)()


def component_check(job):
    from dtrain.plan import Workers
    from dtrain.strategies import fsdp

    workers = Workers(num_nodes=1, per_node=2, device="cpu", collectives="gloo", threads=1, cpus_per_node=2)
    fsdp.check(job.strategy, job, workers, None)


def test_nodes_means_a_copy_on_each():
    from dtrain.strategies import fsdp

    assert fsdp._copies(fsdp.Options(replicate="nodes"), plan({}, nodes=3).workers) == 3
    with pytest.raises(InputError, match="leaves one worker to each copy"):
        plan({"replicate": "nodes"}, workers_per_node=1, nodes=3)


def test_a_loss_scale_halves_on_overflow_and_doubles_after_many_good_steps():
    scale = LossScale(torch.device("cpu"))
    held = scale.piece("train", True).tensor
    assert scale.piece("train", True).name == "optimizer.train.loss_scale"
    loss = torch.tensor(2.0)
    assert float(scale.raised(loss)) == 2.0 * START
    assert not scale.accepts(torch.tensor(float("inf")))
    assert not scale.accepts(torch.tensor(float("nan")))
    assert held.tolist() == [START / 4, 0.0]
    for _ in range(INTERVAL - 1):
        assert scale.accepts(torch.tensor(1.0))
    assert held.tolist() == [START / 4, INTERVAL - 1]
    assert scale.accepts(torch.tensor(1.0))
    assert held.tolist() == [START / 2, 0.0]
    gradients = [torch.tensor([START, 0.0])]
    scale.lower(gradients)
    assert gradients[0].tolist() == [2.0, 0.0]


def test_a_loss_scale_is_restored_in_place():
    scale = LossScale(torch.device("cpu"))
    scale.piece("train", True).tensor.copy_(torch.tensor([8.0, 5.0]))
    assert float(scale.raised(torch.tensor(1.0))) == 8.0
