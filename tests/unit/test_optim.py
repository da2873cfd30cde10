"""Learning rates, parameter groups and seeds."""

import itertools
import math
import timeit

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dtrain.models import Task
from dtrain.spec.job import SGD, AdamW, Schedule
from dtrain.strategies.engine import trained_parameters
from dtrain.training.optim import build_optimizer, learning_rate
from dtrain.training.seeds import sample_seed, seed_everything, seed_torch


def rates(total: int = 100, **words: object) -> list[float]:
    schedule = Schedule(**words)
    return [learning_rate(schedule, 2.0, step, total) for step in range(total)]


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd"])
def test_warmup_rises_in_a_line_to_the_peak(name: str) -> None:
    assert rates(name=name, warmup_steps=10)[:10] == pytest.approx([0.2 * i for i in range(1, 11)])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_the_last_step_has_the_final_share(name: str, final: float) -> None:
    assert rates(name=name, warmup_steps=10, final=final)[-1] == pytest.approx(2.0 * final)


def test_shapes() -> None:
    assert rates(name="constant", warmup_steps=10)[10:] == [2.0] * 90
    linear = rates(name="linear", final=0.0)
    assert linear[49] == pytest.approx(1.0)
    cosine = rates(name="cosine", final=0.0)
    assert cosine[49] == pytest.approx(1.0)
    assert cosine[24] == pytest.approx(1 + math.cos(math.pi / 4))
    wsd = rates(name="wsd", warmup_steps=10, final=0.0)
    assert wsd[10:80] == [2.0] * 70
    assert wsd[84] == pytest.approx(2.0 * (1 - math.sqrt(5 / 20)))
    assert rates(name="wsd", decay_steps=40, final=0.5)[59] == 2.0
    assert rates(name="wsd", decay_steps=40, final=0.5)[60] < 2.0


@given(
    name=st.sampled_from(["constant", "cosine", "linear", "wsd"]),
    warmup_steps=st.integers(0, 300),
    decay_steps=st.none() | st.integers(1, 300),
    final=st.floats(0, 1),
    total=st.integers(1, 200),
)
def test_a_rate_stays_within_bounds_and_falls_after_warmup(
    name: str, warmup_steps: int, decay_steps: int | None, final: float, total: int
) -> None:
    found = rates(total, name=name, warmup_steps=warmup_steps, decay_steps=decay_steps, final=final)
    assert all(0.0 <= rate <= 2.0 for rate in found)
    after = found[warmup_steps:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))


def named(network: nn.Module) -> list[tuple[str, nn.Parameter, float]]:
    task = Task({"model": network})
    return [(name, parameter, 1.0) for name, parameter in trained_parameters(task, task.phases[0])]


def module() -> nn.Module:
    network = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3), nn.Linear(3, 2))
    network[3].weight.requires_grad_(False)
    return network


@pytest.mark.parametrize(
    "spec", [AdamW(name="adamw", lr=0.1, weight_decay=0.3), SGD(name="sgd", lr=0.1, weight_decay=0.3)]
)
def test_only_matrices_decay(spec: AdamW | SGD) -> None:
    network = module()
    optimizer = build_optimizer(spec, named(network))
    decayed, plain = optimizer.param_groups
    assert decayed["weight_decay"] == 0.3 and plain["weight_decay"] == 0.0
    assert {id(p) for p in decayed["params"]} == {id(network[0].weight), id(network[2].weight)}
    assert {id(p) for p in plain["params"]} == {
        id(p) for p in (*network[1].parameters(), network[2].bias, network[3].bias)
    }
    assert all(group["fused"] for group in optimizer.param_groups)


def test_a_share_of_the_learning_rate_makes_a_group_of_its_own() -> None:
    network = module()
    shared = [(name, parameter, 0.5 if name.startswith("model.0.") else 1.0) for name, parameter, _ in named(network)]
    optimizer = build_optimizer(AdamW(name="adamw", lr=0.1, weight_decay=0.3), shared)
    found = {(group["lr"], group["lr_share"], group["weight_decay"]) for group in optimizer.param_groups}
    assert found == {(0.05, 0.5, 0.3), (0.1, 1.0, 0.3), (0.1, 1.0, 0.0)}
    (slow,) = [group for group in optimizer.param_groups if group["lr_share"] == 0.5]
    assert [id(p) for p in slow["params"]] == [id(network[0].weight)]


def test_fused_adamw_is_adamw() -> None:
    def trained(fused: bool) -> torch.Tensor:
        torch.manual_seed(0)
        network = nn.Linear(5, 3)
        spec = AdamW(name="adamw", lr=0.01)
        optimizer = (
            build_optimizer(spec, named(network))
            if fused
            else torch.optim.AdamW(
                [{"params": [network.weight]}, {"params": [network.bias], "weight_decay": 0.0}],
                lr=0.01,
                betas=spec.betas,
                eps=spec.eps,
                weight_decay=spec.weight_decay,
                foreach=False,
            )
        )
        for _ in range(20):
            optimizer.zero_grad()
            network(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-6, atol=1e-7)


def test_seeds_differ_in_every_word_and_repeat() -> None:
    words = [(s, t, m, w) for s in (0, 1) for t in range(20) for m in range(5) for w in range(5)]
    seeds = {sample_seed(*four) for four in words}
    assert len(seeds) == len(words)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, 2, 3, 4) == sample_seed(1, 2, 3, 4)


def test_seeding_repeats_and_costs_microseconds() -> None:
    seed_everything(5)
    first = torch.rand(3)
    seed_torch(5)
    assert torch.equal(first, torch.rand(3))
    assert min(timeit.repeat(lambda: seed_torch(sample_seed(1, 2, 3, 4)), number=100, repeat=5)) / 100 < 100e-6
