"""Recurrent networks: their arithmetic, their start, forecasts of series, and language."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.data import DataShape
from dtrain.errors import InputError, TrainingError
from dtrain.models import Request, Task
from dtrain.models.rnn import Options, build, describe
from dtrain.spec.job import Train

SERIES = DataShape("series", sequence_length=12, num_features=3, horizon=4)
TOKENS = DataShape("tokens", vocabulary_size=40, sequence_length=12)
CELLS = ["rnn", "gru", "lstm"]


def task(shape: DataShape = SERIES, seed: int = 0, **words: object) -> Task:
    return build(Options(**{"width": 16, **words}), shape, Train(steps=1, seed=seed))


def stretches(num: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Sines of different frequency and phase on a slope; the first column is predicted."""
    generator = torch.Generator().manual_seed(seed)
    phase, speed, slope = (torch.rand(num, 1, generator=generator) for _ in range(3))
    time = torch.arange(16)
    values = (phase * 6 + (0.3 + 0.4 * speed) * time).sin() + slope * time * 0.1
    inputs = torch.stack([values, values.square(), values.cos()], dim=2)[:, :12]
    return {"inputs": inputs, "last": values[:, 11].clone(), "targets": values[:, 12:].clone()}


def texts(num: int = 4) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 40, (num, 13), generator=torch.Generator().manual_seed(0))
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:].clone()}


def loss(made: Task, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return made.loss("train", made.parts, batch)


@given(
    kind=st.sampled_from([SERIES, TOKENS]),
    cell=st.sampled_from(CELLS),
    num_layers=st.integers(1, 3),
    width=st.integers(1, 20),
    flag=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_the_parameter_count_is_true(kind: DataShape, flag: bool, **words: object) -> None:
    options = Options(**words, **({"bidirectional": flag} if kind is SERIES else {"tie_weights": flag}))
    network = build(options, kind, Train(steps=1)).parts["model"]
    assert describe(options, kind).num_parameters == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_operations_are_those_that_are_done(cell: str, bidirectional: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    options = Options(cell=cell, bidirectional=bidirectional, width=32)
    shape = DataShape("series", sequence_length=50, num_features=2, horizon=4)
    made = build(options, shape, Train(steps=1))
    made.parts["model"].double()  # for which there are no fused cells, that hide what they do
    batch = {"inputs": torch.randn(1, 50, 2).double(), "last": torch.randn(1), "targets": torch.randn(1, 4)}
    with FlopCounterMode(display=False) as counter:
        loss(made, batch).backward()
    assert describe(options, shape).flops_per_sample == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("shape", [SERIES, TOKENS])
def test_weights_are_a_function_of_the_seed(shape: DataShape) -> None:
    state = task(shape, 3).parts["model"].state_dict()
    torch.manual_seed(99)
    again, other = (task(shape, seed).parts["model"].state_dict() for seed in (3, 4))
    for name, tensor in state.items():
        assert torch.equal(tensor, again[name]) and not torch.equal(tensor, other[name]), name
        is_input_bias = "bias_ih" in name
        assert tensor.abs().max() <= 0.25 + is_input_bias, name
        if is_input_bias:
            assert tensor[16:32].mean() == pytest.approx(1.0, abs=0.2), "forget gates begin open"


@pytest.mark.parametrize("cell", CELLS)
def test_a_forecast_learns_and_beats_the_last_value(cell: str) -> None:
    made = task(cell=cell)
    optimizer = torch.optim.AdamW(made.parts["model"].parameters(), lr=1e-2)
    for step in range(150):
        optimizer.zero_grad()
        loss(made, stretches(32, step)).backward()
        assert all(p.grad is not None for p in made.parts["model"].parameters())
        optimizer.step()
    sums = {key: value.item() for key, value in made.evaluate(made.parts, stretches(64, 10**6)).items()}
    metrics = made.finish_evaluation(sums)
    assert metrics["loss"] < 0.1 * metrics["naive_loss"]


def test_evaluation_counts_errors() -> None:
    made = task(bidirectional=True, num_layers=3)
    batch = stretches(6)
    with torch.no_grad():
        errors = made.predict(made.parts, batch) - batch["targets"]
        torch.testing.assert_close(loss(made, batch), errors.square().mean())
    metrics = made.finish_evaluation({k: v.item() for k, v in made.evaluate(made.parts, batch).items()})
    assert metrics["loss"] == pytest.approx(errors.square().mean().item(), rel=1e-5)
    assert metrics["mean_absolute_error"] == pytest.approx(errors.abs().mean().item(), rel=1e-5)
    naive = F.mse_loss(batch["last"][:, None].expand(6, 4), batch["targets"]).item()
    assert metrics["naive_loss"] == pytest.approx(naive, rel=1e-5)


def test_a_forecast_may_begin_at_the_last_value() -> None:
    difference, value = (task(from_last_value=flag) for flag in (True, False))
    batch = stretches(3)
    found = [made.predict(made.parts, batch) for made in (difference, value)]
    torch.testing.assert_close(found[0] - found[1], batch["last"][:, None].expand(3, 4))


def test_both_directions_have_read_all() -> None:
    """Changing the first time step changes what each direction says at its end."""
    net = task(bidirectional=True, num_layers=1).parts["model"]
    batch = stretches(1)
    ends = []
    net.head.register_forward_pre_hook(lambda _, given: ends.append(given[0].detach()))
    for place in (None, 0, 11):
        inputs = batch["inputs"].clone()
        if place is not None:
            inputs[0, place] += 1.0
        net(inputs)
    for end in ends[1:]:
        assert (end[0, :16] != ends[0][0, :16]).any() and (end[0, 16:] != ends[0][0, 16:]).any()


def test_a_forecast_is_shown_beside_what_came() -> None:
    arrays = {name: tensor.numpy() for name, tensor in stretches(5).items()}
    held_out = SimpleNamespace(num_samples=5, batch=lambda indices, _: {k: v[indices] for k, v in arrays.items()})
    source = SimpleNamespace(held_out=held_out, to_target=lambda values: values * 10)
    made = task()
    text = made.sample(source, Request(seed=7)).text
    last, predicted, came = (line.split() for line in text.splitlines())
    assert last == ["last", f"{arrays['last'][2] * 10:.2f}"]
    assert came == ["came", *(f"{value * 10:.2f}" for value in arrays["targets"][2])]
    batch = {name: torch.from_numpy(array[2:3]) for name, array in arrays.items()}
    expected = made.predict(made.parts, batch)[0].detach().numpy() * 10
    np.testing.assert_allclose([float(word) for word in predicted[1:]], expected, atol=0.006)


@pytest.mark.parametrize("words", [{}, {"tie_weights": True, "cell": "gru"}])
def test_a_language_model_costs_its_cross_entropy(words: dict[str, object]) -> None:
    made = task(TOKENS, **words)
    net, batch = made.parts["model"], texts()
    plain = F.cross_entropy(net(batch["inputs"]).flatten(0, 1), batch["targets"].flatten())
    found = loss(made, batch)
    torch.testing.assert_close(found, plain)
    assert found.item() == pytest.approx(math.log(40), abs=0.2)
    for name, parameter in net.named_parameters():
        (slope,) = torch.autograd.grad(found, parameter, retain_graph=True)
        (expected,) = torch.autograd.grad(plain, parameter, retain_graph=True)
        torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-6, msg=name)
    smoothed = loss(task(TOKENS, label_smoothing=0.4, **words), batch)
    expected = F.cross_entropy(net(batch["inputs"]).flatten(0, 1), batch["targets"].flatten(), label_smoothing=0.4)
    torch.testing.assert_close(smoothed, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_a_language_model_learns_and_generates(cell: str) -> None:
    made = task(TOKENS, cell=cell, width=32, num_layers=1)
    optimizer = torch.optim.AdamW(made.parts["model"].parameters(), lr=2e-2)
    tokens = (torch.arange(13) * 7 % 40).repeat(2, 1)
    for _ in range(120):
        optimizer.zero_grad()
        last = loss(made, {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]})
        last.backward()
        optimizer.step()
    assert last.item() < 0.1
    net = made.parts["model"]
    assert net.generate(tokens[0, :3].tolist(), 10, temperature=0.0) == tokens[0, 3:].tolist()
    assert net.training


@pytest.mark.parametrize("cell", CELLS)
def test_state_is_carried_from_token_to_token(cell: str) -> None:
    net = task(TOKENS, cell=cell).parts["model"].double()
    tokens = torch.randint(0, 40, (1, 12))
    states: list = []
    parts = [net(tokens[:, :5], states=states)] + [net(tokens[:, i : i + 1], states=states) for i in range(5, 12)]
    torch.testing.assert_close(torch.cat(parts, dim=1), net(tokens), rtol=1e-12, atol=1e-12)
    assert net.generate([1], 30, seed=1) == net.generate([1], 30, seed=1)
    assert net.generate([1], 30, seed=1) != net.generate([1], 30, seed=2)


def test_dropout_acts_in_training_only() -> None:
    made, batch = task(dropout=0.5), stretches(2)
    assert loss(made, batch) != loss(made, batch)
    made.parts["model"].eval()
    assert loss(made, batch) == loss(made, batch)


@pytest.mark.parametrize(
    ("shape", "words", "match"),
    [
        (TOKENS, {"bidirectional": True}, "model.bidirectional is for series, and the data holds tokens"),
        (TOKENS, {"from_last_value": False}, "model.from_last_value is for series"),
        (SERIES, {"tie_weights": True}, "model.tie_weights is for tokens, and the data holds series"),
        (SERIES, {"label_smoothing": 0.1}, "model.label_smoothing is for tokens"),
        (DataShape("images"), {}, "learns from a series or tokens, not from images"),
    ],
)
def test_what_means_nothing_for_the_data_is_refused(shape: DataShape, words: dict[str, object], match: str) -> None:
    for use in (describe, lambda options, data: build(options, data, Train(steps=1))):
        with pytest.raises(InputError, match=match):
            use(Options(**words), shape)


def test_packed_documents_are_refused() -> None:
    batch = texts()
    with pytest.raises(TrainingError, match=r"use data\.documents: joined"):
        loss(task(TOKENS), {**batch, "documents": torch.zeros_like(batch["inputs"])})


def test_a_series_may_hold_no_last_value() -> None:
    batch = {name: tensor for name, tensor in stretches(3).items() if name != "last"}
    with pytest.raises(TrainingError, match="has no `last`"):
        loss(task(), batch)
    made = task(from_last_value=False)
    metrics = made.finish_evaluation({k: v.item() for k, v in made.evaluate(made.parts, batch).items()})
    assert metrics["loss"] == pytest.approx(loss(made, batch).item(), rel=1e-5) and "naive_loss" not in metrics
