"""Every strategy computes what one plain process does."""

import pytest
from world import Cell, RankError, assert_same

SUMS = 1e-6
"""Sums of gradients in another order round differently: fp32 has 24 bits, weights are below 1, after 5 steps."""


def test_ddp_equals_one_process(ranks):
    cell = Cell()
    assert_same(ranks.train(cell), ranks.alone(cell), SUMS)


def fails_on_one(rank, num_workers):
    if rank == 1:
        raise ValueError("no such number")


def test_what_a_rank_raises_is_told(ranks):
    with pytest.raises(RankError, match=r"rank 1 raised:(.|\n)*ValueError: no such number") as caught:
        ranks.run(fails_on_one, 2)
    assert caught.value.classes[0] == "ValueError"


@pytest.mark.parametrize(
    ("num_workers", "options"),
    [
        (2, {}),
        (1, {}),
        (4, {}),
        (2, {"reshard_after_forward": False}),
        (2, {"reduce_each_micro_batch": True}),
        (2, {"wrap": "size", "min_parameters": 1000}),
        (2, {"cpu_offload": True}),
        (4, {"replicate": 2}),
        (2, {"tensor_parallel": 2}),
        (4, {"tensor_parallel": 2}),
    ],
    ids=str,
)
def test_fsdp_equals_one_process(num_workers, options, ranks):
    cell = Cell(strategy={"name": "fsdp", **options}, num_workers=num_workers)
    assert_same(ranks.train(cell), ranks.alone(cell), SUMS)
