"""The moving average of weights: what it holds, and that the networks' own weights come back after it."""

import pytest
import torch

from dtrain.checkpoint.pieces import Piece, of_range, whole
from dtrain.strategies import Prepared
from dtrain.training.averaging import Average


def prepared(state, refreshed=None):
    return Prepared({}, {}, state, True, *([lambda: refreshed.append(1)] if refreshed is not None else []))


def strange(*shape):
    """Every kind of number that a careless copy would change."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    numbers.view(-1)[:5] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42, 16777217.0])
    return numbers


def test_it_follows_weights_and_nothing_else():
    state = [
        whole("model.main.weight", torch.ones(2, 3)),
        whole("model.main.count", torch.tensor(3)),
        whole("optimizer.train.main.weight.exp_avg", torch.ones(2, 3)),
        Piece("model.main.bias", torch.ones(2), (4,), (2,), is_primary=False),
    ]
    kept = Average(prepared(state), 0.9).state
    assert [piece.name for piece in kept] == ["ema.model.main.weight", "ema.model.main.bias"]
    assert (kept[1].whole, kept[1].at, kept[1].is_primary) == ((4,), (2,), False)


def test_it_begins_with_the_weights_and_is_no_view_of_them():
    weight = torch.ones(3)
    average = Average(prepared([whole("model.w", weight)]), 0.9)
    weight.zero_()
    assert average.state[0].tensor.tolist() == [1.0, 1.0, 1.0]


def test_it_is_the_moving_average_that_its_formula_says():
    weight = torch.zeros(4, dtype=torch.float64)
    average = Average(prepared([whole("model.w", weight)]), 0.95)
    expected = 0.0
    for step in range(1, 301):
        weight.fill_(step**0.5)
        average.update(step)
        decay = min(0.95, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step**0.5
    assert average.state[0].tensor.tolist() == pytest.approx([expected] * 4, rel=1e-12)
    assert 16.0 < expected < 17.3  # behind the last, by about 20 steps


def test_of_constant_weights_it_is_these_weights():
    weight = torch.full((3,), 0.1)
    average = Average(prepared([whole("model.w", weight)]), 0.999)
    for step in range(1, 2000):
        average.update(step)
    assert torch.equal(average.state[0].tensor, weight)


def test_in_place_networks_compute_with_it_and_get_their_own_weights_back_bit_for_bit():
    network = torch.nn.Linear(7, 5, dtype=torch.float32)
    with torch.no_grad():
        network.weight.copy_(strange(5, 7))
    flat = torch.arange(10.0)
    pieces = [whole("model.main.weight", network.weight), whole("model.main.bias", network.bias)]
    pieces += of_range("model.flat", flat, (4, 5), 3)
    refreshed = []
    average = Average(prepared(pieces, refreshed), 0.5)
    averages = [piece.tensor for piece in average.state]
    for tensor in averages:
        tensor.fill_(2.0)
    live = [piece.tensor for piece in pieces]
    before = [tensor.detach().clone().numpy().tobytes() for tensor in live]
    places = [tensor.data_ptr() for tensor in live]
    with average.in_place():
        assert network(torch.ones(1, 7)).tolist() == [[16.0] * 5]
        assert flat.tolist() == [2.0] * 10
        assert len(refreshed) == 1
    assert [tensor.detach().numpy().tobytes() for tensor in live] == before
    assert [tensor.data_ptr() for tensor in live] == places
    assert all(bool((tensor == 2.0).all()) for tensor in averages)
    assert len(refreshed) == 2


def test_the_weights_come_back_when_an_evaluation_fails():
    weight = strange(9)
    before = weight.clone().numpy().tobytes()
    average = Average(prepared([whole("model.w", weight)]), 0.5)
    average.state[0].tensor.zero_()
    with pytest.raises(ValueError, match="corrupt"), average.in_place():
        assert weight.tolist() == [0.0] * 9
        raise ValueError("corrupt")
    assert weight.numpy().tobytes() == before


def test_training_goes_on_as_if_it_had_never_been_in_place():
    def trained(looks):
        torch.manual_seed(0)
        network = torch.nn.Linear(3, 3)
        pieces = [whole("model.weight", network.weight), whole("model.bias", network.bias)]
        average = Average(prepared(pieces), 0.9)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        for step in range(1, 9):
            network(torch.full((2, 3), float(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(step)
            if step in looks:
                with average.in_place(), torch.no_grad():
                    network(torch.ones(1, 3))
        return [*network.parameters(), *(piece.tensor for piece in average.state)]

    for one, other in zip(trained(()), trained((1, 2, 5, 8)), strict=True):
        assert torch.equal(one, other)


def test_a_worker_that_holds_nothing_of_the_model():
    average = Average(prepared([whole("optimizer.train.w.step", torch.tensor(1.0))]), 0.9)
    average.update(1)
    with average.in_place():
        pass
    assert list(average.state) == []
