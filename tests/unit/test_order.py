"""The order of samples: every sample once an epoch, whatever the number of workers, from any step."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.data.order import MAX_SAMPLES, Order, draws, permute, sample_indices


@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40), num_samples=st.integers(1, 5000))
@settings(max_examples=200, deadline=None)
def test_every_sample_stands_once_in_an_epoch(seed: int, epoch: int, num_samples: int) -> None:
    order = permute(seed, np.full(num_samples, epoch), np.arange(num_samples), num_samples)
    assert sorted(order.tolist()) == list(range(num_samples))


def test_seeds_and_epochs_give_other_orders() -> None:
    n = 1000
    orders = {permute(seed, np.full(n, epoch), np.arange(n), n).tobytes() for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_an_order_is_shuffled_evenly() -> None:
    n, epochs = 16, 20_000
    epoch = np.repeat(np.arange(epochs), n)
    order = permute(7, epoch, np.tile(np.arange(n), epochs), n).reshape(epochs, n)
    counts = np.stack([np.bincount(order[:, position], minlength=n) for position in range(n)])
    expected = epochs / n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 350  # 225 degrees of freedom: mean 225, standard deviation 21
    neighbours = (np.diff(order, axis=1) == 1).mean()
    assert abs(neighbours - 1 / n) < 0.01  # (n - 1) of n (n - 1) ordered pairs are neighbours


@pytest.mark.parametrize("step", [0, 3, 1_000_003])
def test_a_step_holds_the_same_samples_for_any_number_of_workers(step: int) -> None:
    def samples(num_workers: int, micro: int) -> list[int]:
        orders = [
            Order(
                seed=5,
                num_samples=101,
                global_size=24,
                micro=micro,
                accumulation=24 // (num_workers * micro),
                num_workers=num_workers,
                worker=worker,
            )
            for worker in range(num_workers)
        ]
        arrays = [order.micro_batch(step, number)[0] for number in range(orders[0].accumulation) for order in orders]
        assert [a.shape for a in arrays] == [(micro,)] * (24 // micro)
        return [int(i) for a in arrays for i in a]

    one = samples(1, 24)
    for num_workers, micro in [(1, 2), (2, 12), (2, 3), (3, 4), (4, 6), (8, 1)]:
        assert samples(num_workers, micro) == one


def test_steps_follow_each_other_through_epochs_without_a_gap() -> None:
    words = {
        "seed": 1,
        "num_samples": 30,
        "global_size": 8,
        "micro": 8,
        "accumulation": 1,
        "num_workers": 1,
        "worker": 0,
    }
    stream = np.concatenate([Order(**words).micro_batch(step, 0)[0] for step in range(15)])
    for epoch in range(4):
        assert sorted(stream[epoch * 30 : (epoch + 1) * 30].tolist()) == list(range(30))


def test_blocks_join_seamlessly() -> None:
    whole = sample_indices(3, 777, 0, 40_000)
    assert np.array_equal(whole[8000:25_000], sample_indices(3, 777, 8000, 17_000))
    assert sample_indices(3, 777, 5, 0).size == 0


def test_seeking_far_costs_no_more_than_seeking_near() -> None:
    started = time.perf_counter()
    far = sample_indices(11, 10**9, 10**12, 64)
    assert time.perf_counter() - started < 1.0
    assert far.min() >= 0 and far.max() < 10**9 and len(set(far.tolist())) == 64


def test_sizes_that_do_not_multiply_are_refused() -> None:
    with pytest.raises(ValueError, match="batch of 8"):
        Order(seed=0, num_samples=10, global_size=8, micro=3, accumulation=1, num_workers=2, worker=0)
    with pytest.raises(ValueError, match="num_samples"):
        permute(0, np.zeros(1), np.zeros(1), MAX_SAMPLES + 1)


def test_a_micro_batch_of_all_workers_is_that_of_one() -> None:
    """Batch statistics and draws then do not depend on how many workers there are."""
    one = Order(seed=3, num_samples=50, global_size=16, micro=8, accumulation=2, num_workers=1, worker=0)
    for number in range(2):
        parts = [Order(3, 50, 16, 2, 2, 4, worker).micro_batch(7, number) for worker in range(4)]
        for kind in (0, 1):
            assert np.array_equal(np.concatenate([p[kind] for p in parts]), one.micro_batch(7, number)[kind])


def test_draws_differ_by_seed_and_number() -> None:
    numbers = np.arange(10_000, dtype=np.uint64)
    assert len(set(draws(0, numbers)) | set(draws(1, numbers))) == 20_000
    assert 0.49 < float((draws(0, numbers) >> np.uint64(63)).mean()) < 0.51
