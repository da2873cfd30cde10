"""The GAN: its arithmetic, its start, its losses and phases, spectral norms, and its figure on held-out pictures."""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from making import a_plan
from msgspec import ValidationError
from torch import nn

from dtrain.data import DataShape
from dtrain.errors import InputError
from dtrain.models import Request
from dtrain.models.gan import GAN, Options, build, describe
from dtrain.models.networks.gan import discriminator_nats, energy_score, generator_nats
from dtrain.models.networks.noise import normal
from dtrain.models.networks.pictures import SpectralConv2d, SpectralLinear, largest_singular_value
from dtrain.models.pictures import levels
from dtrain.spec.job import Train

DIGITS = DataShape("images", num_classes=10, channels=1, height=8, width=8)
ODD = DataShape("images", num_classes=7, channels=3, height=21, width=30)
SMALL = {"latent_size": 6, "generator_width": 4, "discriminator_width": 3}
NORMS = ["spectral", "batchnorm", "none"]


def task(seed: int = 0, shape: DataShape = DIGITS, **words: object) -> GAN:
    return build(Options(**{**SMALL, **words}), shape, Train(steps=1, seed=seed))


def a_batch(num: int = 8, shape: DataShape = DIGITS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "images": torch.randn((num, shape.channels, shape.height, shape.width), generator=generator),
        "labels": torch.zeros(num, dtype=torch.int64),
        "draws": torch.randint(-(2**62), 2**62, (num,), generator=generator),
    }


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [(4, 4), (8, 8), (21, 30), (28, 28), (32, 32), (64, 64), (128, 128)])
def test_pictures_have_the_size_of_the_data_and_the_count_is_true(norm: str, size: tuple[int, int]) -> None:
    shape = DataShape("images", num_classes=2, channels=3, height=size[0], width=size[1])
    made = task(shape=shape, discriminator_norm=norm, generator_width=2, discriminator_width=1)
    pictures = made.parts["generator"](torch.randn(2, 6))
    assert pictures.shape == (2, 3, *size)
    assert made.parts["discriminator"](pictures)[0].shape == (2,)
    counted = sum(p.numel() for part in made.parts.values() for p in part.parameters())
    words = {**SMALL, "discriminator_norm": norm, "generator_width": 2, "discriminator_width": 1}
    assert describe(Options(**words), shape).num_parameters == counted


def test_levels_end_at_four_pixels_and_widths_are_bounded() -> None:
    of = levels(256, 128, 8)
    assert of.sizes == ((256, 128), (128, 64), (64, 32), (32, 16), (16, 8), (8, 4))
    assert of.channels == (8, 16, 32, 64, 128, 128)
    assert levels(7, 100, 8).sizes == ((7, 100),)


@pytest.mark.parametrize("norm", ["batchnorm", "none"])
def test_operations_are_those_of_both_phases(norm: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    words: dict[str, Any] = {"discriminator_norm": norm, "generator_width": 16, "discriminator_width": 16}
    shape = DataShape("images", num_classes=2, channels=3, height=32, width=32)
    made, batch = task(shape=shape, **words), a_batch(4, shape)
    with FlopCounterMode(display=False) as counter:
        made.loss("discriminator", made.parts, batch).backward()
        made.parts["discriminator"].requires_grad_(False)
        made.loss("generator", made.parts, batch).backward()
    claimed = describe(Options(**{**SMALL, **words}), shape)
    assert 4 * claimed.flops_per_sample == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert claimed.parts == tuple(made.parts)


@pytest.mark.parametrize("norm", ["batchnorm", "none"])
def test_memory_is_that_of_the_larger_phase(norm: str) -> None:
    words: dict[str, Any] = {"discriminator_norm": norm, "generator_width": 16, "discriminator_width": 16}
    shape = DataShape("images", num_classes=2, channels=3, height=32, width=32)
    made, batch = task(shape=shape, **words), a_batch(4, shape)
    weights = {p.untyped_storage().data_ptr() for part in made.parts.values() for p in part.parameters()}
    most = 0
    for phase in ("discriminator", "generator"):
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = made.loss(phase, made.parts, batch)
        most = max(most, sum(count for place, count in kept.items() if place not in weights))
        del loss
    claimed = describe(Options(**{**SMALL, **words}), shape)
    assert 4 * claimed.activation_bytes_per_sample == pytest.approx(most, rel=0.15)


@pytest.mark.parametrize("norm", NORMS)
def test_the_start_is_a_function_of_the_seed(norm: str) -> None:
    made = task(3, discriminator_norm=norm)
    torch.manual_seed(99)  # what the process drew before must not matter
    again, other = task(3, discriminator_norm=norm), task(4, discriminator_norm=norm)
    for part, network in made.parts.items():
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, again.parts[part].state_dict()[name]), name
            assert torch.isfinite(tensor).all(), name
            assert tensor.ndim < 2 or not torch.equal(tensor, other.parts[part].state_dict()[name]), name


@pytest.mark.parametrize("shape", [(16, 3, 4, 4), (7, 200), (200, 7), (1, 30), (64, 32, 4, 4)])
def test_the_largest_singular_value_is_found(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2), requires_grad=True)
    found = largest_singular_value(weight)
    exact = torch.linalg.matrix_norm(weight.detach().flatten(1), 2)
    assert found.item() == pytest.approx(exact.item(), rel=5e-3)
    found.backward()
    left, _, right = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
    slope = torch.outer(left[:, 0], right[0])
    assert F.cosine_similarity(weight.grad.flatten(), slope.flatten(), dim=0) > 0.99


def test_the_spectral_norm_of_tiny_and_of_empty_weights() -> None:
    weight = torch.randn(9, 5, generator=torch.Generator().manual_seed(2))
    exact = torch.linalg.matrix_norm(weight, 2).item()
    assert largest_singular_value(weight * 1e-8).item() == pytest.approx(exact * 1e-8, rel=5e-3)
    assert largest_singular_value(weight * 1e8).item() == pytest.approx(exact * 1e8, rel=5e-3)
    assert largest_singular_value(torch.zeros(3, 4)).item() == 0.0
    with torch.autocast("cpu", torch.bfloat16):
        assert largest_singular_value(weight).item() == pytest.approx(exact, rel=5e-3)


def test_spectral_layers_use_weights_of_norm_one_and_keep_plain_names() -> None:
    made = task(discriminator_norm="spectral").parts["discriminator"]
    assert sum(isinstance(m, SpectralConv2d) for m in made.modules()) == 2
    assert isinstance(made.encoder.head, SpectralLinear)
    plain = task(discriminator_norm="none").parts["discriminator"]
    assert made.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        for p in plain.parameters():
            if p.ndim > 1:
                p /= torch.linalg.matrix_norm(p.flatten(1), 2)
    images = a_batch()["images"]
    torch.testing.assert_close(made(images)[0], plain(images)[0], rtol=1e-2, atol=1e-4)


def test_scores_do_not_depend_on_the_length_of_spectral_weights() -> None:
    made, images = task().parts["discriminator"], a_batch()["images"]
    before = made(images)[0]
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim > 1:
                p *= 3.0
    torch.testing.assert_close(made(images)[0], before, rtol=1e-4, atol=1e-6)


def test_groups_are_scored_as_if_alone() -> None:
    real, fake = a_batch()["images"], torch.randn(5, 1, 8, 8)
    for norm in NORMS:
        scored = task(discriminator_norm=norm).parts["discriminator"]
        together = scored(real, fake)
        assert [len(scores) for scores in together] == [8, 5]
        for scores, group in zip(together, (real, fake), strict=True):
            torch.testing.assert_close(scores, scored(group)[0])


@pytest.mark.parametrize("loss", ["nonsaturating", "hinge"])
def test_the_losses_are_those_of_the_papers(loss: str) -> None:
    real, fake = torch.tensor([-2.0, 0.0, 0.5, 3.0]), torch.tensor([1.0, -0.5, 0.0, -4.0])
    if loss == "hinge":
        expected = (1 - real).clamp(min=0) + (1 + fake).clamp(min=0), -fake
    else:
        expected = -torch.sigmoid(real).log() - (1 - torch.sigmoid(fake)).log(), -torch.sigmoid(fake).log()
    torch.testing.assert_close(discriminator_nats(real, fake, loss), expected[0])
    torch.testing.assert_close(generator_nats(fake, loss), expected[1])
    made, batch = task(loss=loss), a_batch()
    for phase, stream in (("discriminator", 1), ("generator", 2)):
        pictures = made.parts["generator"](normal(batch["draws"], 6, stream=stream))
        scores, scores_real = (made.parts["discriminator"](x)[0] for x in (pictures, batch["images"]))
        cost = discriminator_nats(scores_real, scores, loss) if stream == 1 else generator_nats(scores, loss)
        torch.testing.assert_close(made.loss(phase, made.parts, batch), cost.mean())


def test_each_phase_trains_its_own_part() -> None:
    made, batch = task(), a_batch()
    assert [(phase.name, phase.parts) for phase in made.phases] == [
        ("discriminator", ("discriminator",)),
        ("generator", ("generator",)),
    ]
    made.loss("discriminator", made.parts, batch).backward()
    assert all(p.grad is not None for p in made.parts["discriminator"].parameters())
    assert all(p.grad is None for p in made.parts["generator"].parameters())
    made.parts["discriminator"].requires_grad_(False)
    made.loss("generator", made.parts, batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parts["generator"].parameters())


def test_the_discriminator_may_learn_faster() -> None:
    made = task(discriminator_lr_share=4.0)
    shares = {phase.name: made.learning_rate_share(phase, "x.weight") for phase in made.phases}
    assert shares == {"discriminator": 4.0, "generator": 1.0}


@pytest.mark.parametrize("norm", ["spectral", "none"])
def test_a_batch_may_be_split(norm: str) -> None:
    made, batch = task(discriminator_norm=norm), a_batch()
    made.parts["generator"].eval()  # batch statistics are those of what is computed together
    for phase in ("discriminator", "generator"):
        halves = [
            made.loss(phase, made.parts, {k: v[part] for k, v in batch.items()}) for part in (slice(0, 4), slice(4, 8))
        ]
        torch.testing.assert_close(made.loss(phase, made.parts, batch), (halves[0] + halves[1]) / 2)


def test_the_energy_score_is_least_for_the_true_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(4_000, 3, generator=generator)
    scores = {}
    for name, scale, shift in (("true", 1.0, 0.0), ("narrow", 0.5, 0.0), ("wide", 1.8, 0.0), ("off", 1.0, 0.7)):
        scores[name] = energy_score(real, scale * torch.randn(4_000, 4, 3, generator=generator) + shift).mean().item()
    scores["one point"] = energy_score(real, torch.zeros(4_000, 4, 3)).mean().item()
    assert min(scores, key=lambda name: scores[name]) == "true"
    # The distance of two draws of the true one is twice its score: sqrt(2) of a normal's mean length in 3 dimensions.
    assert scores["true"] == pytest.approx(math.sqrt(2) * math.sqrt(8 / math.pi) / math.sqrt(3) / 2, rel=0.03)


def test_evaluation_gives_sums_and_then_metrics() -> None:
    made = task()
    for part in made.parts.values():
        part.eval()
    batch = a_batch(9)
    with torch.no_grad():
        whole = {key: value.item() for key, value in made.evaluate(made.parts, batch).items()}
        parts = [
            made.evaluate(made.parts, {k: v[part] for k, v in batch.items()}) for part in (slice(0, 1), slice(1, 9))
        ]
        pictures = made.parts["generator"](normal(batch["draws"], 8, 6, stream=3).flatten(0, 1)).unflatten(0, (9, 8))
        scores = [made.parts["discriminator"](x)[0] for x in (batch["images"], pictures[:, 0])]
    assert whole == pytest.approx({key: sum(p[key].item() for p in parts) for key in whole}, rel=1e-5)
    metrics = made.finish_evaluation(whole)
    assert metrics["loss"] == pytest.approx(energy_score(batch["images"], pictures).mean().item(), rel=1e-5)
    cost = discriminator_nats(*scores, "nonsaturating").mean().item()
    assert metrics["discriminator_loss"] == pytest.approx(cost, rel=1e-5)
    assert metrics["generator_loss"] == pytest.approx(
        generator_nats(scores[1], "nonsaturating").mean().item(), rel=1e-5
    )


class Pixels:
    """What a source of pictures offers."""

    def to_pixels(self, images: np.ndarray) -> np.ndarray:
        return np.clip(images * 100 + 100, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def test_pictures_are_drawn_from_the_seed_alone() -> None:
    made = task(shape=ODD)
    made.parts["generator"].eval()
    first, again, other = (made.sample(Pixels(), Request(count=5, seed=seed)).pictures for seed in (1, 1, 2))
    assert first.shape == (5, 21, 30, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert made.sample(Pixels(), Request(count=300)).pictures.shape[0] == 300


def test_tanh_bounds_what_is_made() -> None:
    for output, is_bounded in (("tanh", True), ("linear", False)):
        generator = task(output=output).parts["generator"]
        with torch.no_grad():
            generator.last.weight *= 50
        assert (generator(torch.randn(20, 6)).abs().max().item() <= 1.0) == is_bounded


def test_under_autocast_losses_are_fp32() -> None:
    made, batch = task(), a_batch()
    for phase in ("discriminator", "generator"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = made.loss(phase, made.parts, batch)
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
        loss.backward()
    assert {p.grad.dtype for part in made.parts.values() for p in part.parameters()} == {torch.float32}


@pytest.mark.parametrize(("loss", "norm"), [("nonsaturating", "spectral"), ("hinge", "spectral")])
def test_it_learns(loss: str, norm: str) -> None:
    """Through the update that a run does, on pictures that are all alike but for their brightness."""
    from dtrain.strategies import ddp
    from dtrain.training.optim import build_optimizer

    plan = a_plan(optimizer={"name": "adamw", "lr": 2e-3, "betas": (0.5, 0.99), "weight_decay": 0.0})
    made = task(loss=loss, discriminator_norm=norm, generator_width=16, discriminator_width=16)
    prepared = ddp.prepare(made, plan, torch.device("cpu"), functools.partial(build_optimizer, plan.optimizer))
    pattern = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    generator, before = torch.Generator().manual_seed(0), None
    for step in range(80):
        draws = torch.randint(-(2**62), 2**62, (32,), generator=generator)
        bright = 1.0 + 0.1 * torch.randn(32, 1, 1, 1, generator=generator)
        batch = {"images": pattern * bright, "draws": draws}
        for phase, engine in prepared.engines.items():
            engine.begin(True)
            engine.backward(made.loss(phase, engine.parts, batch))
            engine.step(2e-3)
        if step == 0:
            before = made.finish_evaluation({k: v.item() for k, v in made.evaluate(made.parts, batch).items()})
    after = made.finish_evaluation({k: v.item() for k, v in made.evaluate(made.parts, batch).items()})
    assert before is not None
    assert after["loss"] < 0.5 * before["loss"]


def test_blocks_are_the_stages_of_both_networks() -> None:
    made = task(shape=ODD)
    assert len(made.blocks()) == 4
    modules = {m for part in made.parts.values() for m in part.modules()}
    assert all(isinstance(block, nn.Module) and block in modules for block in made.blocks())


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"latent_size": 0}, "`int` >= 1.*latent_size"),
        ({"loss": "wasserstein"}, "Invalid enum value 'wasserstein'"),
        ({"discriminator_norm": "layernorm"}, "Invalid enum value 'layernorm'"),
        ({"width": 3}, "unknown field `width`"),
    ],
)
def test_options_that_cannot_be_are_refused(words: dict[str, object], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        Options(**words)


def test_other_data_than_images_is_refused() -> None:
    with pytest.raises(InputError, match="learns from images, not from table"):
        describe(Options(), DataShape("table", num_features=3))
