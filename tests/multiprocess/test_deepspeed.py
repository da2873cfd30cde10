"""ZeRO by DeepSpeed: what it computes, what of it survives, and what it says when it cannot."""

import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from world import TRANSFORMER, Cell, Ranks, assert_same

from dtrain.data import DataShape
from dtrain.models import Phase, Task, transformer
from dtrain.models.networks import noise

SUMS = 1e-6
"""Sums of gradients in another order round differently: fp32 has 24 bits, weights are below 1, after 5 steps."""
STAGES = [1, 2, 3]
IMAGES = DataShape("images", channels=1, height=8, width=8, num_classes=3)


@pytest.fixture(scope="module")
def ranks():
    """As `conftest.ranks`, with DeepSpeed imported, which takes longer than training a cell does."""
    with Ranks(preload=("deepspeed.runtime.zero.muon.muon_optimizer",)) as started:
        yield started


class Convolutions(nn.Module):
    """Batch norm, weights in another memory format, and a parameter that stands alone."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(2, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.ones(1))
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        return self.head(F.relu(self.norm(self.convolution(images))).mean((2, 3))) * self.scale


class Pictures(Task):
    """Tokens, twice, as pictures of 3 x 4: the labels are the last ones."""

    def __init__(self):
        super().__init__({"model": Convolutions()})

    def loss(self, phase, parts, batch):
        pictures = batch["inputs"].view(-1, 1, 3, 4).repeat(1, 2, 1, 1) / 25.0 - 1.0
        return F.cross_entropy(parts["model"](pictures).float(), batch["targets"][:, -1] % 5)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 10, bias=False)
        self.norm = nn.BatchNorm1d(10)
        self.last = nn.Linear(10, 12)

    def forward(self, latent):
        return torch.tanh(self.last(F.relu(self.norm(self.first(latent)))))


class Rivals(Task):
    """Two parts, two phases: the gradient of each phase flows through the other's part, or stops there."""

    def __init__(self):
        critic = nn.Sequential(nn.Linear(12, 9), nn.LeakyReLU(0.2), nn.Linear(9, 1))
        phases = [Phase("critic", ("critic",)), Phase("generator", ("generator",))]
        super().__init__({"generator": Generator(), "critic": critic}, phases)

    def loss(self, phase, parts, batch):
        made = parts["generator"](noise.normal(batch["draws"], 4))
        judged = parts["critic"](made).float()
        if phase == "generator":
            return F.softplus(-judged).mean()
        real = batch["inputs"] / 25.0 - 1.0
        return F.softplus(judged).mean() + F.softplus(-parts["critic"](real).float()).mean()


class Coder(Task):
    """One phase of two parts that are called one after the other; one of them is frozen in part, and learns slower."""

    def __init__(self):
        super().__init__({"encoder": nn.Sequential(nn.Linear(12, 5), nn.Tanh()), "decoder": nn.Linear(5, 12)})
        self.parts["decoder"].bias.requires_grad_(False)

    def loss(self, phase, parts, batch):
        real = batch["inputs"] / 25.0 - 1.0
        return F.mse_loss(parts["decoder"](parts["encoder"](real)).float(), real)

    def learning_rate_share(self, phase, name):
        return 0.5 if name.startswith("decoder") else 1.0


class Forgetful(Task):
    def __init__(self):
        super().__init__({"model": nn.ModuleDict({"used": nn.Linear(12, 3), "spare": nn.Linear(12, 3)})})
        self.parts["model"].forward = lambda inputs: self.parts["model"]["used"](inputs)

    def loss(self, phase, parts, batch):
        return parts["model"](batch["inputs"].float()).mean()


def made(task, shape, train):
    torch.manual_seed(train.seed)
    return task()


def language_model(shape, train):
    """Tied weights. It shows no sample: a text takes longer than all else here, token by token."""
    task = transformer.build(transformer.Options(**{k: v for k, v in TRANSFORMER.items() if k != "name"}), shape, train)
    task.sample = lambda source, request: None
    return task


MADE = {task.__name__: functools.partial(made, task) for task in (Pictures, Rivals, Coder, Forgetful)}
MADE["Transformer"] = language_model


def cell_of(name, **options):
    words = {key: options.pop(key) for key in ("train", "steps", "optimizer", "num_workers") if key in options}
    return Cell(strategy={"name": "deepspeed", **options}, task=MADE[name], **words)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["Transformer", "Pictures", "Rivals", "Coder"])
def test_zero_equals_one_process(name, stage, ranks):
    """Clipped (the default), with two micro batches a step; stage 3 divides even the smallest of weights."""
    cell = cell_of(name, stage=stage, keep_below=0)
    trained = ranks.train(cell)
    assert_same(trained, ranks.alone(cell), SUMS)
    assert_same(trained, ranks.alone(cell), SUMS, "optimizer.")
