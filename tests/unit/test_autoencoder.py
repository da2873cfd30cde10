"""Autoencoders: their arithmetic, their start, both of their losses, and what they make."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import ValidationError
from torch.distributions import Normal, kl_divergence

from dtrain.data import DataShape
from dtrain.errors import InputError
from dtrain.models import Request
from dtrain.models.autoencoder import Options, Reconstruction, build, describe
from dtrain.models.networks.noise import normal
from dtrain.spec.job import Train

DIGITS = DataShape("images", num_classes=10, channels=1, height=8, width=8)
ODD = DataShape("images", num_classes=7, channels=3, height=21, width=30)
TABLE = DataShape("table", num_features=9)
SHAPES = [DIGITS, ODD, TABLE]
SMALL: dict[str, Any] = {"latent_size": 5, "width": 4, "hidden": (12, 7)}


def task(seed: int = 0, shape: DataShape = DIGITS, **words: object) -> Reconstruction:
    return build(Options(**{**SMALL, **words}), shape, Train(steps=1, seed=seed))


def a_batch(num: int = 8, shape: DataShape = DIGITS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    draws = torch.randint(-(2**62), 2**62, (num,), generator=generator)
    if shape.kind == "table":
        return {"features": torch.randn((num, 9), generator=generator), "draws": draws}
    size = (num, shape.channels, shape.height, shape.width)
    return {"images": torch.randn(size, generator=generator), "draws": draws}


def inputs(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(iter(batch.values()))


@pytest.mark.parametrize("variational", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, DataShape("images", num_classes=2, channels=3, height=64, width=64)])
def test_the_parameter_count_is_true(shape: DataShape, variational: bool) -> None:
    made = task(shape=shape, variational=variational).parts["model"]
    size = describe(Options(**SMALL, variational=variational), shape)
    assert size.num_parameters == sum(p.numel() for p in made.parameters())


@pytest.mark.parametrize("shape", [TABLE, DataShape("images", num_classes=2, channels=3, height=32, width=32)])
def test_operations_and_memory_are_those_of_the_network(shape: DataShape) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    words: dict[str, Any] = {"width": 16, "hidden": (200, 100), "latent_size": 40}
    made, batch, kept = task(shape=shape, **words), a_batch(4, shape), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs(batch).requires_grad_()
    weights = {p.untyped_storage().data_ptr() for p in made.parts["model"].parameters()}
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = made.loss("train", made.parts, batch)
        held = sum(count for place, count in kept.items() if place not in weights)
        loss.backward()
    claimed = describe(Options(**{**SMALL, **words}), shape)
    assert 4 * claimed.flops_per_sample == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert 4 * claimed.activation_bytes_per_sample == pytest.approx(held, rel=0.25)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_start_is_a_function_of_the_seed(shape: DataShape) -> None:
    made = task(3, shape).parts["model"]
    torch.manual_seed(99)  # what the process drew before must not matter
    again, other = task(3, shape).parts["model"], task(4, shape).parts["model"]
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
        assert torch.isfinite(tensor).all(), name
        assert tensor.ndim < 2 or not torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plain_one_is_judged_by_squared_error(shape: DataShape) -> None:
    made, batch = task(shape=shape, variational=False), a_batch(shape=shape)
    network = made.parts["model"].eval()
    again = network.decoder(network.encoder(inputs(batch)))
    expected = (again - inputs(batch)).square().mean()
    torch.testing.assert_close(made.loss("train", made.parts, batch), expected)
    sums = {key: value.item() for key, value in made.evaluate(made.parts, batch).items()}
    assert made.finish_evaluation(sums) == pytest.approx(
        {"loss": expected.item(), "squared_error": expected.item()}, rel=1e-5
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_a_variational_one_bounds_the_likelihood(shape: DataShape, kl_weight: float) -> None:
    made, batch = task(shape=shape, kl_weight=kl_weight), a_batch(shape=shape)
    network = made.parts["model"].eval()
    with torch.no_grad():
        network.log_noise.fill_(-0.4)
        mean, log_variance = network.encoder(inputs(batch)).chunk(2, dim=1)
        told = Normal(mean, (0.5 * log_variance).exp())
        again = network.decoder(mean + told.stddev * normal(batch["draws"], 5))
        nats = -Normal(again, math.exp(-0.4)).log_prob(inputs(batch)).flatten(1).sum(1)
        beyond = kl_divergence(told, Normal(0.0, 1.0)).sum(1)
        num = inputs(batch)[0].numel()
        loss = made.loss("train", made.parts, batch)
        torch.testing.assert_close(loss, ((nats + kl_weight * beyond) / num).mean())
        sums = {key: value.item() for key, value in made.evaluate(made.parts, batch).items()}
    metrics = made.finish_evaluation(sums)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["kl"] == pytest.approx(beyond.mean().item(), rel=1e-5)
    assert metrics["squared_error"] == pytest.approx((again - inputs(batch)).square().mean().item(), rel=1e-5)


def test_the_noise_learns_to_be_what_is_missed() -> None:
    made, batch = task(), a_batch(32)
    network = made.parts["model"].eval()
    optimizer = torch.optim.Adam([network.log_noise], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        made.loss("train", made.parts, batch).backward()
        optimizer.step()
    error = network(inputs(batch), normal(batch["draws"], 5))[0].sub(inputs(batch)).square().mean().sqrt()
    assert network.log_noise.exp().item() == pytest.approx(error.item(), rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variational", [False, True])
def test_a_batch_may_be_split(shape: DataShape, variational: bool) -> None:
    made, batch = task(shape=shape, variational=variational), a_batch(shape=shape)
    made.parts["model"].eval()  # batch statistics are those of what is computed together
    halves = [
        made.loss("train", made.parts, {k: v[part] for k, v in batch.items()}) for part in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(made.loss("train", made.parts, batch), (halves[0] + halves[1]) / 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variational", [False, True])
def test_every_parameter_has_a_gradient_and_it_learns(shape: DataShape, variational: bool) -> None:
    made, batch = task(shape=shape, variational=variational, width=8, hidden=(32,)), a_batch(shape=shape)
    optimizer = torch.optim.AdamW(made.parts["model"].parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = made.loss("train", made.parts, batch)
        loss.backward()
        assert all(p.grad is not None for p in made.parts["model"].parameters())
        losses.append(loss.item())
        optimizer.step()
    if variational:
        assert losses[-1] < losses[0] - 0.5
    else:
        assert losses[-1] < 0.2 * losses[0]


def test_under_autocast_the_loss_is_fp32() -> None:
    for variational in (False, True):
        made, batch = task(variational=variational), a_batch()
        with torch.autocast("cpu", torch.bfloat16):
            loss = made.loss("train", made.parts, batch)
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
        loss.backward()
        assert {p.grad.dtype for p in made.parts["model"].parameters()} == {torch.float32}


class Pixels:
    """What a source of pictures offers."""

    class held_out:  # noqa: N801
        num_samples = 20

        @staticmethod
        def batch(indices: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
            assert draws.dtype == np.uint64
            images = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 1, 8, 8)
            return {"images": images * (1 + indices[:, None, None, None].astype(np.float32)) / 20}

    def to_pixels(self, images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.float32
        return np.clip(images * 100 + 100, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def test_a_variational_one_draws_new_pictures_from_the_seed_alone() -> None:
    made = task()
    made.parts["model"].eval()
    first, again, other = (made.sample(Pixels(), Request(count=5, seed=seed)).pictures for seed in (1, 1, 2))
    assert first.shape == (5, 8, 8, 1) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert made.sample(Pixels(), Request(count=300)).pictures.shape[0] == 300


def test_a_plain_one_shows_held_out_pictures_and_what_it_makes_of_them() -> None:
    made = task(variational=False)
    network = made.parts["model"].eval()
    pictures = made.sample(Pixels(), Request(count=6)).pictures
    held_out = Pixels.held_out.batch(np.arange(3), np.zeros(3, dtype=np.uint64))["images"]
    assert np.array_equal(pictures[0::2], Pixels().to_pixels(held_out))
    again = network(torch.from_numpy(held_out))[0].detach().numpy()
    assert np.array_equal(pictures[1::2], Pixels().to_pixels(again))
    assert made.sample(Pixels(), Request(count=64)).pictures.shape[0] == 40


def test_of_tables_there_is_nothing_to_show() -> None:
    assert task(shape=TABLE).sample(Pixels(), Request()) is None


def test_blocks_are_the_stages() -> None:
    for shape, number in ((ODD, 4), (TABLE, 4)):
        made = task(shape=shape)
        modules = set(made.parts["model"].modules())
        assert len(made.blocks()) == number and all(block in modules for block in made.blocks())


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"latent_size": 0}, "`int` >= 1.*latent_size"),
        ({"variational": False, "kl_weight": 2.0}, "leave it out, or set variational: true"),
        ({"beta": 3}, "unknown field `beta`"),
    ],
)
def test_options_that_cannot_be_are_refused(words: dict[str, object], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        Options(**words)


def test_data_that_it_cannot_learn_from_is_refused() -> None:
    with pytest.raises(InputError, match="learns from images or a table, not from series"):
        describe(Options(), DataShape("series"))
