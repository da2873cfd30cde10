"""Convolutional networks: their arithmetic, their start, their loss with and without mixtures, and that they learn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from msgspec import ValidationError
from torch import nn

from dtrain.data import DataShape
from dtrain.errors import InputError, TrainingError
from dtrain.models.classifier import Classifier
from dtrain.models.cnn import Options, build, describe
from dtrain.models.networks import mixing
from dtrain.spec.job import Train

DIGITS = DataShape("images", num_classes=10, channels=1, height=8, width=8)
ODD = DataShape("images", num_classes=7, channels=3, height=21, width=33)
IMAGENET = DataShape("images", num_classes=1000, channels=3, height=224, width=224)
ARCHITECTURES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "vgg16"]


def task(seed: int = 0, shape: DataShape = DIGITS, **words: object) -> Classifier:
    return build(Options(**{"width": 4, **words}), shape, Train(steps=1, seed=seed))


def network(options: Options, shape: DataShape) -> nn.Module:
    from dtrain.models.networks import cnn

    with torch.device("meta"):
        return (cnn.VGG if options.architecture == "vgg16" else cnn.ResNet)(options, shape)


def a_batch(num: int = 8, shape: DataShape = DIGITS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = (num, shape.channels, shape.height, shape.width)
    return {
        "images": torch.randn(size, generator=generator),
        "labels": torch.randint(0, shape.num_classes, (num,), generator=generator),
        "draws": torch.randint(-(2**62), 2**62, (num,), generator=generator),
    }


@pytest.mark.parametrize(
    ("architecture", "number"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
        ("vgg16", 138_365_992),
    ],
)
def test_on_imagenet_they_are_the_published_networks(architecture: str, number: int) -> None:
    options = Options(architecture=architecture)
    size = describe(options, IMAGENET)
    assert size.num_parameters == number
    assert sum(p.numel() for p in network(options, IMAGENET).parameters()) == number


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("shape", [DIGITS, ODD])
def test_the_parameter_count_is_true(architecture: str, stem: str, shape: DataShape) -> None:
    options = Options(architecture=architecture, stem=stem, width=3)
    made = network(options, shape)
    assert describe(options, shape).num_parameters == sum(p.numel() for p in made.parameters())


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "vgg16"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("size", [(32, 32), (70, 45)])
def test_operations_and_memory_are_those_of_the_network(architecture: str, stem: str, size: tuple[int, int]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    shape = DataShape("images", num_classes=10, channels=3, height=size[0], width=size[1])
    made = task(shape=shape, architecture=architecture, stem=stem)
    images, kept = torch.randn(2, 3, *size), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in made.parts["model"].parameters()}
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        scores = made.parts["model"](images.requires_grad_())
        held = sum(count for place, count in kept.items() if place not in weights)
        scores.sum().backward()
    claimed = describe(Options(architecture=architecture, stem=stem, width=4), shape)
    assert 2 * claimed.flops_per_sample == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert 2 * claimed.activation_bytes_per_sample == pytest.approx(held, rel=0.1)


def test_the_stem_goes_by_the_size_of_pictures() -> None:
    options = Options()
    assert [options.stem_for(*size) for size in [(32, 32), (95, 200), (96, 96)]] == ["cifar", "cifar", "imagenet"]
    assert Options(stem="cifar").stem_for(224, 224) == "cifar"


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "vgg16"])
def test_the_start_is_a_function_of_the_seed(architecture: str) -> None:
    made = task(3, architecture=architecture).parts["model"]
    torch.manual_seed(99)  # what the process drew before must not matter
    again, other = (task(seed, architecture=architecture).parts["model"] for seed in (3, 4))
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
        assert torch.isfinite(tensor).all(), name
        assert tensor.ndim < 2 or not torch.equal(tensor, other.state_dict()[name]), name


def test_the_start_is_he_s() -> None:
    made = task(width=64).parts["model"]
    second = made.blocks[0].layers[1]
    assert second.convolution.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.03)
    assert torch.equal(second.norm.weight, torch.zeros(64))
    assert torch.equal(made.blocks[0].layers[0].norm.weight, torch.ones(64))
    assert torch.equal(task(zero_init=False).parts["model"].blocks[0].layers[1].norm.weight, torch.ones(4))


def test_blocks_change_nothing_at_first() -> None:
    made = task().parts["model"].eval()
    x = torch.rand(2, 4, 5, 5)
    assert torch.equal(made.blocks[0](x), x)
    assert not torch.equal(task(zero_init=False).parts["model"].eval().blocks[0](x), x)


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "vgg16"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_channels_last_computes_the_same(architecture: str, stem: str) -> None:
    batch = a_batch(4, ODD)
    losses, slopes = [], []
    for channels_last in (False, True):
        made = task(shape=ODD, architecture=architecture, stem=stem, channels_last=channels_last, zero_init=False)
        made.parts["model"].eval()  # batch statistics of so few pixels would amplify rounding
        loss = made.loss("train", made.parts, batch)
        loss.backward()
        losses.append(loss)
        slopes.append([p.grad for p in made.parts["model"].parameters()])
        assert all(p.is_contiguous() for p in made.parts["model"].parameters())
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-5)


def test_channels_last_reaches_the_convolutions() -> None:
    seen = []
    for channels_last, architecture in ((False, "resnet18"), (True, "resnet18"), (True, "vgg16")):
        made = task(channels_last=channels_last, architecture=architecture).parts["model"]
        last = [m for m in made.blocks[-2].modules() if isinstance(m, nn.Conv2d)][-1]
        last.register_forward_hook(
            lambda _, inputs, __: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
        made(torch.randn(2, 1, 16, 16))
    assert seen == [False, True, True]


def test_the_loss_is_smoothed_cross_entropy() -> None:
    batch = a_batch()
    plain, smooth = task(), task(label_smoothing=0.1)
    scores = plain.parts["model"](batch["images"])
    found = [made.loss("train", made.parts, batch).item() for made in (plain, smooth)]
    logs = F.log_softmax(scores, dim=1)
    own = -logs.gather(1, batch["labels"][:, None])[:, 0]
    assert found[0] == pytest.approx(own.mean().item(), rel=1e-5)
    assert found[1] == pytest.approx((0.9 * own - 0.1 * logs.mean(1)).mean().item(), rel=1e-5)


def test_under_autocast_the_loss_is_fp32() -> None:
    made = task()
    with torch.autocast("cpu", torch.bfloat16):
        loss = made.loss("train", made.parts, a_batch())
    assert loss.dtype == torch.float32
    loss.backward()
    assert {p.grad.dtype for p in made.parts["model"].parameters()} == {torch.float32}


def test_evaluation_gives_sums_and_then_metrics() -> None:
    made = task(label_smoothing=0.3, mixup=1.0, cutmix=1.0, dropout=0.5)
    made.parts["model"].eval()
    batch = a_batch(9)
    sums = {key: value.item() for key, value in made.evaluate(made.parts, batch).items()}
    scores = made.parts["model"](batch["images"])
    metrics = made.finish_evaluation(sums)
    assert sums["samples"] == 9
    assert metrics["loss"] == pytest.approx(F.cross_entropy(scores, batch["labels"]).item(), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((scores.argmax(1) == batch["labels"]).float().mean().item())


def test_dropout_acts_in_training_only() -> None:
    for architecture, stem in (("resnet18", "cifar"), ("vgg16", "cifar"), ("vgg16", "imagenet")):
        made = task(architecture=architecture, stem=stem, dropout=0.5, width=16).parts["model"]
        made.head.apply(lambda m: nn.init.normal_(m.weight) if isinstance(m, nn.Linear) else None)
        images = a_batch()["images"]
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        assert not torch.equal(made(images), made(images))
        made.eval()
        assert torch.equal(made(images), made(images))


@pytest.mark.parametrize("a", [0.05, 0.2, 0.5, 1.0])
def test_shares_are_beta_distributed(a: float) -> None:
    draws = torch.arange(50_000) * 7919
    shares = mixing.beta(draws, a).double()
    assert shares.min() >= 0 and shares.max() <= 1
    assert shares.mean().item() == pytest.approx(0.5, abs=0.01)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * a + 1)), rel=0.02)
    fourth = (shares - 0.5).pow(4).mean().item()
    assert fourth == pytest.approx(3 / (16 * (2 * a + 1) * (2 * a + 3)), rel=0.03)


def test_mixup_adds_partners_up() -> None:
    batch = a_batch()
    mixed, share = mixing.mix(batch["images"], batch["draws"], 0.4, 0.0)
    others = batch["images"][[1, 0, 3, 2, 5, 4, 7, 6]]
    wide = share.view(-1, 1, 1, 1)
    torch.testing.assert_close(mixed, wide * batch["images"] + (1 - wide) * others)
    assert share.unique().numel() == 8


def test_cutmix_takes_a_rectangle_from_the_partner() -> None:
    draws = torch.arange(2_000) * 31
    images = torch.arange(2_000.0).view(-1, 1, 1, 1).expand(-1, 2, 9, 13).contiguous()
    mixed, share = mixing.mix(images, draws, 0.0, 1.0)
    partners = torch.arange(2_000).view(-1, 2).flip(1).flatten()
    is_own = mixed == images
    assert torch.equal(is_own[:, 0], is_own[:, 1])
    assert torch.equal(mixed[~is_own], partners.float().view(-1, 1, 1, 1).expand_as(mixed)[~is_own])
    torch.testing.assert_close(is_own.float().mean((1, 2, 3)), share)
    for cut in ~is_own[:200, 0].numpy():
        rows, columns = (np.flatnonzero(cut.any(axis)) for axis in (1, 0))
        assert cut.sum() == len(rows) * len(columns)
        assert len(rows) == 0 or rows[-1] - rows[0] + 1 == len(rows)
    assert 0.55 < share.mean() < 0.8 and share.min() < 0.2  # rectangles at the border are cut short
    cut_at = (~is_own[:, 0]).float().mean(0)
    assert cut_at.min() > 0.1


def test_with_both_a_coin_decides() -> None:
    draws = torch.arange(2_000) * 31
    images = torch.arange(2_000.0).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    mixed, _ = mixing.mix(images, draws, 1.0, 1.0)
    is_even = (mixed == mixed[:, :, :1, :1]).all((1, 2, 3))
    is_whole = ((mixed == images) | (mixed == mixing.partners(images))).all((1, 2, 3))
    assert 0.42 < (is_even & ~is_whole).float().mean() < 0.58


@pytest.mark.parametrize("words", [{"mixup": 0.3}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_a_mixture_costs_what_both_labels_cost(words: dict[str, float]) -> None:
    made, batch = task(label_smoothing=0.1, **words), a_batch()
    loss = made.loss("train", made.parts, batch)
    mixed, share = mixing.mix(batch["images"], batch["draws"], words.get("mixup", 0.0), words.get("cutmix", 0.0))
    scores = made.parts["model"](mixed)
    own = F.one_hot(batch["labels"], 10).float()
    targets = share[:, None] * own + (1 - share)[:, None] * own[[1, 0, 3, 2, 5, 4, 7, 6]]
    torch.testing.assert_close(loss, F.cross_entropy(scores, targets, label_smoothing=0.1))


def test_mixtures_do_not_depend_on_the_number_of_workers() -> None:
    batch = a_batch()
    whole, share = mixing.mix(batch["images"], batch["draws"], 0.5, 0.5)
    halves = [mixing.mix(batch["images"][part], batch["draws"][part], 0.5, 0.5) for part in (slice(4), slice(4, 8))]
    assert torch.equal(whole, torch.cat([h[0] for h in halves]))
    assert torch.equal(share, torch.cat([h[1] for h in halves]))


def test_mixtures_of_an_odd_number_are_refused() -> None:
    made = task(mixup=0.2)
    with pytest.raises(TrainingError, match=r"a worker has 3 at a time; set batch.micro to an even number"):
        made.loss("train", made.parts, a_batch(3))


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "vgg16"])
def test_it_learns(architecture: str) -> None:
    made, batch = task(architecture=architecture, width=8), a_batch(16)
    optimizer = torch.optim.AdamW(made.parts["model"].parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = made.loss("train", made.parts, batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_every_parameter_has_a_gradient_and_blocks_are_those_of_the_network() -> None:
    for architecture, num_blocks in (("resnet50", 16), ("vgg16", 5)):
        made = task(architecture=architecture)
        made.loss("train", made.parts, a_batch()).backward()
        assert all(p.grad is not None for p in made.parts["model"].parameters())
        assert len(made.blocks()) == num_blocks
        modules = set(made.parts["model"].modules())
        assert all(block in modules for block in made.blocks())


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"architecture": "resnet19"}, "Invalid enum value 'resnet19'"),
        ({"stem": "small"}, "Invalid enum value 'small'"),
        ({"mixup": 1.5}, "`float` <= 1.0.*mixup"),
        ({"label_smoothing": 1.0}, "`float` < 1.0.*label_smoothing"),
        ({"layers": 2}, "unknown field `layers`"),
    ],
)
def test_options_that_cannot_be_are_refused(words: dict[str, object], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        Options(**words)


def test_data_that_it_cannot_learn_from_is_refused() -> None:
    with pytest.raises(InputError, match="learns from images, not from tokens"):
        describe(Options(), DataShape("tokens"))
    with pytest.raises(InputError, match="needs a class for each"):
        describe(Options(), DataShape("images", channels=1, height=8, width=8))
