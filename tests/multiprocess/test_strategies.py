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
