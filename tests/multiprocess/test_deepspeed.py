"""ZeRO by DeepSpeed: what it computes, what of it survives, and what it says when it cannot."""

import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from msgspec.structs import replace
from torch import nn
from world import (
    TRANSFORMER,
    Cell,
    Keeper,
    RankError,
    Ranks,
    Trained,
    assemble,
    assert_same,
    copies,
    make_training,
)

from dtrain.checkpoint import store
from dtrain.checkpoint.snapshot import Snapshot, path_of
from dtrain.data import DataShape
from dtrain.models import Phase, Request, Task, transformer
from dtrain.models.networks import noise
from dtrain.plan import Plan
from dtrain.training import loop

SUMS = 1e-6
"""Sums of gradients in another order round differently: fp32 has 24 bits, weights are below 1, after 5 steps."""
STAGES = [1, 2, 3]
SMALL = {"reduce_bucket_mib": 0.001, "gather_bucket_mib": 0.001, "keep_below": 50}
SGD = {"name": "sgd", "lr": 0.1, "weight_decay": 0.1}


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


class Scaled(Task):
    """One of its parameters has no dimensions."""

    def __init__(self):
        super().__init__({"model": nn.Linear(12, 3)})
        self.parts["model"].scale = nn.Parameter(torch.ones(()))
        self.parts["model"].register_forward_hook(lambda module, inputs, output: output * module.scale)

    def loss(self, phase, parts, batch):
        return F.cross_entropy(parts["model"](batch["inputs"] / 25.0), batch["targets"][:, -1] % 3)


class Twice(Scaled):
    def __init__(self):
        super().__init__()
        self.phases = (Phase("one", ("model",)), Phase("two", ("model",)))


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


MADE = {task.__name__: functools.partial(made, task) for task in (Pictures, Rivals, Coder, Scaled, Twice, Forgetful)}
MADE["Transformer"] = language_model


def cell_of(name, **options):
    words = {key: options.pop(key) for key in ("train", "steps", "optimizer", "num_workers") if key in options}
    return Cell(strategy={"name": "deepspeed", **options}, task=MADE[name], **words)


@pytest.mark.parametrize(
    ("name", "stage"),
    [*((name, stage) for name in ("Rivals", "Coder") for stage in STAGES), ("Transformer", 3), ("Pictures", 3)],
)
def test_zero_equals_one_process(name, stage, ranks):
    """Clipped (the default), with two micro batches a step; stage 3 divides even the smallest of weights."""
    cell = cell_of(name, stage=stage, keep_below=0)
    trained = ranks.train(cell)
    assert_same(trained, ranks.alone(cell), SUMS)
    assert_same(trained, ranks.alone(cell), SUMS, "optimizer.")


@pytest.mark.parametrize(
    ("name", "stage", "options"),
    [
        ("Transformer", 1, {**SMALL, "overlap_comm": True}),
        ("Pictures", 2, {**SMALL, "offload_optimizer": "cpu"}),
        ("Rivals", 3, {**SMALL, "overlap_comm": True, "offload_optimizer": "cpu", "offload_parameters": True}),
        ("Transformer", 3, {"offload_parameters": True, "train": {"activation_checkpointing": "full"}}),
        ("Transformer", 2, {"train": {"clip_grad_norm": None}, "optimizer": SGD}),
        ("Pictures", 3, {"keep_below": 0, "num_workers": 1}),
    ],
    ids=["overlap", "offload", "offload all", "recomputed", "unclipped sgd", "one worker"],
)
def test_options_change_no_number(name, stage, options, ranks):
    cell = cell_of(name, stage=stage, **options)
    trained = ranks.train(cell)
    assert_same(trained, ranks.alone(cell), SUMS)
    assert_same(trained, ranks.alone(cell), SUMS, "optimizer.")


@pytest.mark.parametrize(("stage", "num_workers"), [(1, 2), (2, 1), (3, 2)])
def test_bf16_keeps_exact_weights(stage, num_workers, ranks):
    """Before the first step they are those of an fp32 run, bit for bit; networks compute with their rounded copies.

    Then against one process in bf16, which rounds neither weights nor gradients to 8 bits. Adam divides the size of
    gradients away, so rounding shows in the direction that weights go.
    """
    cell = cell_of("Rivals", stage=stage, keep_below=0, num_workers=num_workers, train={"precision": "bf16"})
    found = ranks.run(goes_on, num_workers, cell.plan().to_json(), cell.shape, cell.task)
    start, end, alone = whole(found, 4), whole(found), ranks.alone(cell).state
    built = cell.task(cell.shape, cell.plan().train).parts
    for name, weights in (
        (f"model.{part}.{k}", p.detach()) for part in built for k, p in built[part].named_parameters()
    ):
        assert torch.equal(start[name], weights)
        assert torch.equal(found[0][5][name], weights.bfloat16())
        way, expected = end[name] - start[name], alone[name] - start[name]
        assert float((way - expected).norm()) < 0.1 * float(expected.norm()) + 1e-4, name


def goes_on(rank, num_workers, plan_json, shape, task, start=0, checkpoint=None):
    """Train from a checkpoint. What `world` returns of it, what was read, and what the networks then compute with."""
    training = make_training(rank, num_workers, Plan.from_json(plan_json), shape, task)
    prepared, average = training.prepared, training.average
    state = [*prepared.state, *(average.state if average else ())]
    if checkpoint:
        store.read_into(checkpoint, state)
        prepared.refresh()
    read, seen = copies(state), {}
    for name, part in prepared.evaluation_parts.items():
        for key, weights in getattr(part, "part", part).named_parameters():
            if hasattr(weights, "all_gather"):
                weights.all_gather()
            seen[f"model.{name}.{key}"] = weights.detach().clone()
            if hasattr(weights, "partition"):
                weights.partition()
    keeper = Keeper()
    outcome = loop.train(training, start, keeper)
    return copies(state), outcome, keeper.reports, prepared.is_replicated, read, seen


def whole(found, which=0):
    return assemble([entry[which] for entry in found], is_replicated=found[0][3])


@pytest.mark.parametrize("stage", [1, 3])
def test_averages_are_evaluated_and_training_goes_on_unharmed(stage, ranks):
    """The average takes the place of the weights in all workers' networks, several times, and gives it back."""
    cell = cell_of("Transformer", stage=stage, keep_below=0, train={"ema": 0.9})
    plan = cell.plan()
    often = replace(plan, evaluate=replace(plan.evaluate, every_steps=2))
    found = ranks.run(goes_on, 2, often.to_json(), cell.shape, cell.task)
    trained = Trained(whole(found), found[0][1], found[0][2], [])
    alone = ranks.alone(cell)
    assert_same(trained, alone, SUMS)
    assert any(name.startswith("ema.model.") for name in trained.state)


def test_a_checkpoint_goes_from_strategy_to_strategy(ranks, tmp_path):
    """Two workers under stage 3, one under DDP, two under stage 1, four under stage 2: as one process all the way."""
    reached, path = 0, None
    for strategy, num_workers in (
        ({"name": "deepspeed", "stage": 3, "keep_below": 0}, 2),
        ({"name": "ddp"}, 1),
        ({"name": "deepspeed", "stage": 1}, 2),
        ({"name": "deepspeed", "stage": 2}, 4),
    ):
        cell = Cell(strategy=strategy, num_workers=num_workers, task=MADE["Rivals"], steps=reached + 1)
        found = ranks.run(goes_on, num_workers, cell.plan().to_json(), cell.shape, cell.task, reached, path)
        if path:
            read = whole(found, which=4)
            assert read.keys() == written.keys()  # noqa: F821 -- of the round before
            assert all(torch.equal(read[name], written[name]) for name in read)  # noqa: F821
        reached, written = reached + 1, whole(found)
        store.write(tmp_path, reached, [piece for entry in found for piece in entry[0]], {})
        path = store.path_of(tmp_path, reached)
    expected = ranks.alone(cell).state
    assert written.keys() == expected.keys()
    assert max(float((written[name].double() - expected[name].double()).abs().max()) for name in expected) < SUMS


def test_stage_3_shows_samples_before_it_was_trained(ranks):
    """Its weights are gathered where they are used, tied ones too, without a training step to learn from."""
    cell = cell_of("Transformer", stage=3, keep_below=0)
    sampled = ranks.run(samples, 2, cell.plan().to_json(), cell.shape, cell.task)
    alone = ranks.run(samples, 1, cell_of("Transformer", num_workers=1).plan().to_json(), cell.shape, cell.task)
    assert sampled[0] == sampled[1] == alone[0]
    assert len(alone[0].split()) == 3 + 5


@pytest.mark.parametrize("stage", [1, 3])
def test_networks_in_bf16_show_what_they_make(stage, ranks):
    """They are given random numbers in fp32, and are called outside of the loop's autocast."""
    cell = Cell(
        model={"name": "gan", "latent_size": 8, "generator_width": 4, "discriminator_width": 4},
        shape=DataShape("images", num_classes=4, channels=1, height=8, width=8),
        strategy={"name": "deepspeed", "stage": stage},
        train={"precision": "bf16"},
        steps=1,
        num_workers=1,
    )
    assert ranks.train(cell).outcome["steps"] == 1


def samples(rank, num_workers, plan_json, shape, task):
    training = make_training(rank, num_workers, Plan.from_json(plan_json), shape, task)
    made = transformer.LanguageModel.sample(training.task, training.source, Request(prompt="abc", length=5))
    return made.text


@pytest.mark.parametrize("stage", [1, 3])
def test_weights_that_a_loss_leaves_out_are_named(stage, ranks):
    with pytest.raises(RankError, match=r"phase 'train' does not depend on model.spare.bias, model.spare.weight;"):
        ranks.train(cell_of("Forgetful", stage=stage, num_workers=1))


def test_what_only_ranks_can_refuse(ranks):
    with pytest.raises(RankError, match=r"model.scale is a single number.* stage 3 cannot divide; give it the shape"):
        ranks.train(cell_of("Scaled", stage=3, num_workers=1))
    with pytest.raises(RankError, match=r"two phases train the part model: .* use strategy: {name: ddp}"):
        ranks.train(cell_of("Twice", stage=1, num_workers=1))
    cell = cell_of("Scaled", stage=2)
    assert_same(ranks.train(cell), ranks.alone(cell), SUMS)


def taken_up_again(rank, num_workers, plan_json, shape, task, folder):
    """The pieces after all steps, and again after going back to the snapshot of the second."""
    training = make_training(rank, num_workers, Plan.from_json(plan_json), shape, task)
    state = training.prepared.state
    snapshot = Snapshot.create(path_of(folder / "snapshot", rank, is_replicated=False), state, 1)

    class Copier(Keeper):
        def end_step(self, step):
            if step == 2:
                snapshot.write_share(0, step, snapshot.share(0, state))
            return False

    loop.train(training, 0, Copier())
    first = copies(state)
    assert snapshot.read_into(state) == 2
    training.prepared.refresh()
    loop.train(training, 2, Keeper())
    return first, copies(state)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_worker_goes_on_from_its_snapshot_bit_for_bit(stage, ranks, tmp_path):
    cell = cell_of("Rivals", stage=stage, keep_below=0, train={"precision": "bf16"}, steps=4)
    for first, again in ranks.run(taken_up_again, 2, cell.plan().to_json(), cell.shape, cell.task, tmp_path):
        assert [piece.name for piece in first] == [piece.name for piece in again]
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one.tensor, other.tensor), one.name
