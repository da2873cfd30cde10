"""Noise of a sample's own: distributed as it should be, and a function of the sample's draw alone."""

import numpy as np
import pytest
import torch

from dtrain.models.networks.noise import normal, uniform

DRAWS = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63, 20_000))
MAKERS = [uniform, normal]


def splitmix64(state: int) -> int:
    """The next number of splitmix64 as published, in Python's exact integers."""
    mask = 2**64 - 1
    x = (state + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def finalized(x: int) -> int:
    return splitmix64((x - 0x9E3779B97F4A7C15) & (2**64 - 1))


@pytest.mark.parametrize("stream", [0, 1, 2, 5, 2**20, 2**62])
def test_it_is_splitmix64_in_signed_arithmetic(stream: int) -> None:
    """A draw's stream is the sequence of splitmix64 that begins at a state of its own; its upper 24 bits are used."""
    draws = [0, 1, -1, 2**63 - 1, -(2**63), 12345678901234567]
    found = uniform(torch.tensor(draws), 5, stream=stream)
    for row, draw in zip(found, draws, strict=True):
        state = finalized((draw + stream * 0x9E3779B97F4A7C15) % 2**64)
        for value in row.tolist():
            assert value == (splitmix64(state) >> 40) * 2.0**-24
            state = (state + 0x9E3779B97F4A7C15) % 2**64


@pytest.mark.parametrize("make", MAKERS)
def test_a_sample_s_noise_depends_on_its_draw_alone(make) -> None:
    whole = make(DRAWS[:10], 3, 4)
    assert whole.shape == (10, 3, 4) and whole.dtype == torch.float32
    assert torch.equal(torch.cat([make(DRAWS[:7], 3, 4), make(DRAWS[7:10], 3, 4)]), whole)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(make(DRAWS[:10][order], 3, 4), whole[order])
    torch.manual_seed(5)
    assert torch.equal(make(DRAWS[:10], 3, 4), whole)


@pytest.mark.parametrize("make", MAKERS)
def test_streams_and_draws_share_nothing(make) -> None:
    streams = [make(DRAWS, 2, stream=stream) for stream in range(4)]
    columns = torch.cat([s.double() for s in streams], dim=1)
    correlation = torch.corrcoef(columns.t()) - torch.eye(8)
    assert correlation.abs().max() < 0.03  # four standard deviations of a chance correlation of 20,000
    neighbours = make(torch.arange(20_000), 2).double()  # draws that are close together make noise that is not
    shifted = torch.corrcoef(torch.cat([neighbours[:-1], neighbours[1:]], dim=1).t()) - torch.eye(4)
    assert shifted.abs().max() < 0.03


def test_uniform_numbers_fill_the_interval() -> None:
    numbers = uniform(DRAWS, 10).flatten()
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    counts = torch.histc(numbers, 50, 0.0, 1.0)
    expected = numbers.numel() / 50
    chi_squared = ((counts - expected).square() / expected).sum().item()
    assert 20 < chi_squared < 90  # 49 degrees of freedom: below and above at 1 in 10,000 each
    assert uniform(torch.zeros(1, dtype=torch.int64)).shape == (1,)


def test_normal_numbers_are_normal() -> None:
    numbers = normal(DRAWS, 10).double().flatten()
    assert torch.isfinite(numbers).all()
    assert numbers.mean().abs() < 0.01
    assert numbers.var().item() == pytest.approx(1.0, abs=0.02)
    assert numbers.pow(3).mean().abs() < 0.05
    assert numbers.pow(4).mean().item() == pytest.approx(3.0, abs=0.1)
    for quantile, value in ((0.0228, -2.0), (0.1587, -1.0), (0.5, 0.0), (0.8413, 1.0), (0.9772, 2.0)):
        assert (numbers < value).double().mean().item() == pytest.approx(quantile, abs=0.003)
