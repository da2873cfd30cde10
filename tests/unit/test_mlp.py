"""Multilayer perceptrons: their arithmetic, their start, and both of their losses."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import ValidationError
from torch import nn

from dtrain.data import DataShape
from dtrain.errors import InputError
from dtrain.models import Task
from dtrain.models.classifier import Classifier
from dtrain.models.mlp import Options, Regressor, build, describe
from dtrain.models.networks.mlp import MLP
from dtrain.spec.job import Train

CLASSES = DataShape("table", num_features=5, num_classes=3)
NUMBER = DataShape("table", num_features=5)
PICTURES = DataShape("images", num_classes=4, channels=3, height=6, width=5)


def task(seed: int = 0, shape: DataShape = CLASSES, **words: object) -> Task:
    return build(Options(**{"hidden": (16, 8), **words}), shape, Train(steps=1, seed=seed))


def a_table(num: int = 32) -> torch.Tensor:
    return torch.randn((num, 5), generator=torch.Generator().manual_seed(1))


@given(
    options=st.builds(
        Options,
        hidden=st.lists(st.integers(1, 30), max_size=4).map(tuple),
        activation=st.sampled_from(["relu", "gelu", "silu", "tanh"]),
        dropout=st.sampled_from([0.0, 0.2]),
    ),
    shape=st.sampled_from([CLASSES, NUMBER, PICTURES]),
)
@settings(max_examples=60, deadline=None)
def test_the_parameter_count_is_true(options: Options, shape: DataShape) -> None:
    made = build(options, shape, Train(steps=1)).parts["model"]
    assert describe(options, shape).num_parameters == sum(p.numel() for p in made.parameters())


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_operations_and_memory_are_those_of_the_network(activation: str, dropout: float) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    words = {"hidden": (64, 128), "activation": activation, "dropout": dropout}
    made, held = task(shape=PICTURES, **words), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images = torch.randn(7, 3, 6, 5, requires_grad=True)
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        made.parts["model"](images).sum().backward()
    claimed = describe(Options(**words), PICTURES)
    assert 7 * claimed.flops_per_sample == counter.get_total_flops()
    weights = {p.untyped_storage().data_ptr() for p in made.parts["model"].parameters()}
    kept = sum(t.untyped_storage().nbytes() for place, t in held.items() if place not in weights)
    assert 7 * claimed.activation_bytes_per_sample == pytest.approx(kept, rel=0.3 if dropout else 0.01)


def test_the_start_is_a_function_of_the_seed() -> None:
    made = task(3).parts["model"]
    torch.manual_seed(99)  # what the process drew before must not matter
    again, other = task(3).parts["model"], task(4).parts["model"]
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
        assert tensor.ndim < 2 or not torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_start_keeps_the_scale_of_what_goes_through(activation: str) -> None:
    options = Options(hidden=(400, 400, 400), activation=activation)
    made = build(options, DataShape("table", num_features=300, num_classes=200), Train(steps=1)).parts["model"]
    scores = made(torch.randn(100, 300))
    assert 0.3 < scores.std().item() < 1.5
    gain = 1.0 if activation == "tanh" else math.sqrt(2)
    assert made.layers[1].linear.weight.std().item() == pytest.approx(gain / 20, rel=0.03)
    assert made.head.weight.std().item() == pytest.approx(1 / 20, rel=0.03)


@pytest.mark.parametrize("shape", [CLASSES, PICTURES])
def test_classes_are_told_by_cross_entropy(shape: DataShape) -> None:
    made = task(shape=shape, label_smoothing=0.2)
    assert isinstance(made, Classifier)
    labels = torch.arange(32) % 3
    if shape is PICTURES:
        inputs = torch.randn(32, 3, 6, 5)
        batch = {"images": inputs, "labels": labels}
    else:
        inputs = a_table()
        batch = {"features": inputs, "targets": labels}
    scores = made.parts["model"](inputs)
    expected = F.cross_entropy(scores, labels, label_smoothing=0.2)
    torch.testing.assert_close(made.loss("train", made.parts, batch), expected)
    sums = {key: value.item() for key, value in made.evaluate(made.parts, batch).items()}
    assert made.finish_evaluation(sums) == {
        "loss": pytest.approx(F.cross_entropy(scores, labels).item(), rel=1e-5),
        "accuracy": pytest.approx((scores.argmax(1) == labels).float().mean().item()),
    }


def test_mixup_mixes_rows() -> None:
    from dtrain.models.networks import mixing

    made, draws, rows, labels = task(mixup=0.5), torch.arange(32) * 13, a_table(), torch.arange(32) % 3
    mixed, share = mixing.mix(rows, draws, 0.5, 0.0)
    own = F.one_hot(labels, 3).float()
    targets = share[:, None] * own + (1 - share)[:, None] * mixing.partners(own)
    expected = F.cross_entropy(made.parts["model"](mixed), targets)
    found = made.loss("train", made.parts, {"features": rows, "targets": labels, "draws": draws})
    torch.testing.assert_close(found, expected)


def test_a_number_is_predicted_by_squared_error() -> None:
    made, rows = task(shape=NUMBER), a_table()
    assert isinstance(made, Regressor)
    targets = 3.0 + rows[:, 0] - 2 * rows[:, 1]
    predicted = made.parts["model"](rows)[:, 0]
    batch = {"features": rows, "targets": targets}
    expected = F.mse_loss(predicted, targets).item()
    assert made.loss("train", made.parts, batch).item() == pytest.approx(expected, rel=1e-5)
    totals: dict[str, float] = {}
    for half in (slice(0, 10), slice(10, 32)):
        for key, value in made.evaluate(made.parts, {name: t[half] for name, t in batch.items()}).items():
            totals[key] = totals.get(key, 0.0) + value.item()
    metrics = made.finish_evaluation(totals)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["mean_absolute_error"] == pytest.approx((predicted - targets).abs().mean().item(), rel=1e-5)
    assert metrics["r2"] == pytest.approx(1 - expected / targets.var(correction=0).item(), rel=1e-4)


@pytest.mark.parametrize("shape", [CLASSES, NUMBER])
def test_it_learns(shape: DataShape) -> None:
    made, rows = task(shape=shape), a_table()
    targets = rows[:, 0] * rows[:, 1]
    batch = {"features": rows, "targets": targets if shape is NUMBER else (targets > 0).long()}
    optimizer = torch.optim.AdamW(made.parts["model"].parameters(), lr=2e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss = made.loss("train", made.parts, batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_dropout_acts_in_training_only() -> None:
    made = task(dropout=0.5).parts["model"]
    rows = a_table()
    assert not torch.equal(made(rows), made(rows))
    made.eval()
    assert torch.equal(made(rows), made(rows))


def test_blocks_are_the_hidden_layers() -> None:
    for shape in (CLASSES, NUMBER):
        made = task(shape=shape)
        assert made.blocks() == list(made.parts["model"].layers)
        assert len(made.blocks()) == 2
    linear = MLP(Options(hidden=()), 5, 3)
    rows = a_table()
    assert isinstance(linear.head, nn.Linear)
    torch.testing.assert_close(linear(rows), linear.head(rows))


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"hidden": (0,)}, "`int` >= 1.*hidden"),
        ({"activation": "step"}, "Invalid enum value 'step'"),
        ({"dropout": 1.0}, "`float` < 1.0.*dropout"),
        ({"cutmix": 1.0}, "unknown field `cutmix`"),
    ],
)
def test_options_that_cannot_be_are_refused(words: dict[str, object], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        Options(**words)


def test_data_that_it_cannot_learn_from_is_refused() -> None:
    with pytest.raises(InputError, match="learns from a table or images, not from tokens"):
        describe(Options(), DataShape("tokens"))
    with pytest.raises(InputError, match="needs a class for each"):
        describe(Options(), DataShape("images", channels=1, height=8, width=8))
    with pytest.raises(InputError, match=r"model\.mixup is for classes"):
        describe(Options(mixup=0.1), NUMBER)
