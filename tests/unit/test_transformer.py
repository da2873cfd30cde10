"""The transformer: its arithmetic, its start, its loss, and generation with and without a cache."""

import fnmatch
import itertools
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import ValidationError

from dtrain.data import DataShape
from dtrain.models.language import LanguageModel
from dtrain.models.networks.attention import KeyValues, attend, rotate
from dtrain.models.networks.cross_entropy import IGNORED, _LinearCrossEntropy, linear_cross_entropy
from dtrain.models.networks.generation import choose
from dtrain.models.networks.transformer import Transformer
from dtrain.models.transformer import Options, build, describe
from dtrain.spec.job import Train

SMALL = {"num_layers": 2, "num_heads": 2, "width": 16}
SHAPE = DataShape("tokens", vocabulary_size=50, sequence_length=12)
VARIANTS = [
    {},
    {"positions": "rope", "qk_norm": True, "norm": "rmsnorm", "activation": "swiglu", "bias": False},
    {"activation": "relu2", "tie_weights": False, "pad_vocabulary_to": 1},
]


def task(seed: int = 0, shape: DataShape = SHAPE, **words: object) -> LanguageModel:
    return build(Options(**{**SMALL, **words}), shape, Train(steps=1, seed=seed))


def network(seed: int = 0, **words: object) -> Transformer:
    return task(seed, **words).parts["model"]


@given(
    options=st.builds(
        Options,
        num_layers=st.integers(1, 3),
        num_heads=st.sampled_from([1, 2, 4]),
        width=st.sampled_from([8, 16, 24]),
        mlp_ratio=st.floats(0.1, 5),
        activation=st.sampled_from(["gelu", "relu2", "swiglu"]),
        norm=st.sampled_from(["layernorm", "rmsnorm"]),
        positions=st.sampled_from(["learned", "rope"]),
        qk_norm=st.booleans(),
        bias=st.booleans(),
        tie_weights=st.booleans(),
        pad_vocabulary_to=st.sampled_from([1, 8, 64]),
    ),
    vocabulary_size=st.integers(2, 200),
    sequence_length=st.integers(1, 20),
)
@settings(max_examples=150, deadline=None)
def test_the_parameter_count_is_true(options: Options, vocabulary_size: int, sequence_length: int) -> None:
    with torch.device("meta"):
        net = Transformer(options, vocabulary_size, sequence_length)
    size = describe(options, DataShape("tokens", vocabulary_size, sequence_length))
    assert size.num_parameters == sum(p.numel() for p in net.parameters())


def test_the_defaults_are_gpt2() -> None:
    shape = DataShape("tokens", vocabulary_size=50257, sequence_length=1024)
    assert describe(Options(pad_vocabulary_to=1), shape).num_parameters == 124_439_808


@pytest.mark.parametrize("words", VARIANTS)
def test_operations_are_those_that_are_done(words: dict[str, object]) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    shape = DataShape("tokens", vocabulary_size=64, sequence_length=512)
    net = build(Options(**{**SMALL, "width": 64, **words}), shape, Train(steps=1)).parts["model"]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = net(torch.zeros(1, 512, dtype=torch.int64))
        F.cross_entropy(logits[0], torch.zeros(512, dtype=torch.int64)).backward()
    claimed = describe(Options(**{**SMALL, "width": 64, **words}), shape).flops_per_sample
    assert claimed == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("words", VARIANTS)
def test_the_start_is_gpt2s_and_a_function_of_the_seed(words: dict[str, object]) -> None:
    words = {**words, "num_layers": 4, "width": 128, "num_heads": 4}
    net = network(3, **words)
    for name, parameter in net.named_parameters():
        if parameter.ndim < 2:
            assert torch.all(parameter == (0.0 if name.endswith("bias") else 1.0)), name
            continue
        residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
        expected = 0.02 / math.sqrt(8) if residual else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
        assert abs(parameter.mean().item()) < 0.1 * expected, name
    torch.manual_seed(99)  # what the process drew before must not matter
    again, other = network(3, **words), network(4, **words)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
        assert tensor.ndim < 2 or not torch.equal(tensor, other.state_dict()[name]), name
    assert torch.isfinite(net(torch.zeros(1, 12, dtype=torch.int64))).all()


def test_the_first_loss_is_that_of_knowing_nothing() -> None:
    made = task()
    tokens = torch.randint(0, 50, (4, 13))
    loss = made.loss("train", made.parts, {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]})
    assert loss.item() == pytest.approx(math.log(50), abs=0.05)


@pytest.mark.parametrize("words", VARIANTS)
def test_the_loss_and_its_gradients_are_those_of_cross_entropy(words: dict[str, object]) -> None:
    made = task(**words)
    net = made.parts["model"]
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (3, 13))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[1, 5:] = IGNORED
    plain = F.cross_entropy(net(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    expected = torch.autograd.grad(plain, list(net.parameters()))
    loss = made.loss("train", made.parts, {"inputs": inputs, "targets": targets})
    torch.testing.assert_close(loss, plain)
    for (name, parameter), gradient in zip(net.named_parameters(), expected, strict=True):
        (found,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-7, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(made.loss("train", made.parts, {"inputs": inputs, "targets": targets}), plain)


@pytest.mark.parametrize("chunk", [1, 60, 10**9])
def test_cross_entropy_does_not_depend_on_its_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_LinearCrossEntropy, "CPU_CHUNK", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(17, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (17,))
    targets[3] = IGNORED
    plain = F.cross_entropy((hidden @ weight.t())[:, :7], targets, ignore_index=IGNORED, reduction="sum")
    found = linear_cross_entropy(hidden, weight, targets, 7)
    torch.testing.assert_close(found.double(), plain, rtol=1e-5, atol=1e-5)
    for tensor in (hidden, weight):
        (slope,) = torch.autograd.grad(found, tensor, retain_graph=True)
        (expected,) = torch.autograd.grad(plain, tensor, retain_graph=True)
        torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-5)


def test_under_autocast_matrices_multiply_in_bf16_and_gradients_are_fp32() -> None:
    made = task(width=64)
    tokens = torch.randint(0, 50, (4, 13))
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    exact = made.loss("train", made.parts, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = made.loss("train", made.parts, batch)
    assert loss.dtype == torch.float32 and loss.item() != exact.item()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    loss.backward()
    assert {p.grad.dtype for p in made.parts["model"].parameters()} == {torch.float32}


def test_no_position_sees_a_later_one() -> None:
    for words in VARIANTS:
        net = network(**words)
        tokens = torch.randint(0, 50, (1, 12))
        changed = tokens.clone()
        changed[0, 7] = (changed[0, 7] + 1) % 50
        before, after = net(tokens), net(changed)
        assert torch.equal(before[:, :7], after[:, :7])
        assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("words", VARIANTS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_is_the_same_with_a_cache(words: dict[str, object], temperature: float) -> None:
    net = network(init_std=0.5, **words).double()
    for prompt in ([1], [4, 5, 6], list(range(40))):
        made = [net.generate(prompt, 40, temperature, top_k=20, seed=1, cached=cached) for cached in (True, False)]
        assert made[0] == made[1]
        assert len(made[0]) == 40 and max(made[0]) < 50


def test_cached_logits_are_those_of_the_whole_text() -> None:
    for words in VARIANTS:
        net = network(init_std=0.2, **words).double()
        tokens = torch.randint(0, 50, (1, 12))
        caches = [KeyValues() for _ in net.decoder.blocks]
        parts = [net(tokens[:, :5], caches=caches)]
        parts += [net(tokens[:, i : i + 1], caches=caches) for i in range(5, 12)]
        torch.testing.assert_close(torch.cat(parts, dim=1), net(tokens)[:, 4:], rtol=1e-12, atol=1e-12)


def test_generation_draws_from_its_seed_alone() -> None:
    net = network()
    assert net.generate([1], 30, seed=1) == net.generate([1], 30, seed=1)
    assert net.generate([1], 30, seed=1) != net.generate([1], 30, seed=2)
    assert net.training


def test_choosing_keeps_to_the_likeliest() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    assert {choose(logits, 1.0, 2, generator) for _ in range(200)} == {1, 2}
    assert {choose(logits, 1.0, None, generator) for _ in range(400)} == {0, 1, 2, 3}
    assert {choose(logits, 0.0, None, generator) for _ in range(5)} == {1}
    cold = [choose(logits, 0.2, None, generator) for _ in range(300)]
    assert cold.count(1) > 280


def test_dropout_acts_in_training_only() -> None:
    net = network(dropout=0.5)
    tokens = torch.randint(0, 50, (1, 12))
    assert not torch.equal(net(tokens), net(tokens))
    assert net.generate([1], 30, temperature=0.0) == net.generate([1], 30, temperature=0.0)
    net.eval()
    assert torch.equal(net(tokens), net(tokens))
    attention = network(dropout=0.5).decoder.blocks[0].attention
    x = torch.randn(1, 12, 16)
    assert not torch.equal(attention(x, None, None), attention(x, None, None))


def test_rotation_turns_positions_into_distances() -> None:
    net = network(positions="rope")
    query, key = torch.randn(1, 1, 1, 8).double(), torch.randn(1, 1, 1, 8).double()
    cos, sin = net.decoder.cos.double(), net.decoder.sin.double()
    turned = [rotate(x.expand(1, 1, 12, 8), cos, sin)[0, 0] for x in (query, key)]
    torch.testing.assert_close(turned[0].norm(dim=1), query.norm().expand(12), rtol=1e-6, atol=0)
    scores = turned[0] @ turned[1].t()
    for distance in range(12):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores[0, 0], (query * key).sum())
    assert scores[0].std() > 0.01


def test_evaluation_gives_sums_and_then_metrics() -> None:
    made = task()
    tokens = torch.randint(0, 50, (4, 13))
    targets = tokens[:, 1:].clone()
    targets[0, :6] = IGNORED
    batch = {"inputs": tokens[:, :-1], "targets": targets, "target_bytes": torch.tensor([10, 20, 30, 40])}
    sums = {key: value.item() for key, value in made.evaluate(made.parts, batch).items()}
    assert sums["targets"] == 42 and sums["bytes"] == 100
    metrics = made.finish_evaluation(sums)
    assert metrics["loss"] == pytest.approx(sums["nats"] / 42)
    assert metrics["bits_per_byte"] == pytest.approx(sums["nats"] / math.log(2) / 100)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))


def test_a_transformer_learns() -> None:
    made = task(init_std=0.1)
    optimizer = torch.optim.AdamW(made.parts["model"].parameters(), lr=1e-2)
    tokens = (torch.arange(13) * 7 % 50).repeat(4, 1)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    for _ in range(60):
        optimizer.zero_grad()
        loss = made.loss("train", made.parts, batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"num_heads": 5}, "num_heads 5 does not divide width 16; nearest: 4"),
        ({"num_heads": 16, "positions": "rope"}, "even head width"),
        ({"width": 0}, "`int` >= 1.*width"),
        ({"dropout": 1.0}, "`float` < 1.0.*dropout"),
        ({"heads": 2}, "unknown field `heads`"),
    ],
)
def test_options_that_cannot_be_are_refused(words: dict[str, object], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        Options(**{**SMALL, **words})


def test_plain_attention_in_bf16_is_torchs_attention() -> None:
    torch.manual_seed(0)
    words = [torch.randn(3, 2, 24, 16, requires_grad=True) for _ in range(3)]
    low = [x.bfloat16() for x in words]
    found = attend(*low, is_causal=True, dropout=0.0)
    expected = F.scaled_dot_product_attention(*words, is_causal=True)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    slope = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, low, slope.bfloat16()), torch.autograd.grad(expected, words, slope), strict=True
    ):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("words", VARIANTS)
def test_a_block_is_split_over_devices_as_the_task_says(words: dict[str, object]) -> None:
    """Two slices of a block, each with half the heads and half the hidden numbers, add up to the whole."""
    made = task(init_std=0.3, **words)
    whole, slices = made.blocks()[0], [task(**words).blocks()[0] for _ in range(2)]
    x = torch.randn(2, 12, 16)
    rotation = None
    if words.get("positions") == "rope":
        decoder = made.parts["model"].decoder
        rotation = decoder.cos, decoder.sin
    split = made.tensor_parallel()
    names = {name: f"model.decoder.blocks.0.{name}" for name, _ in whole.named_modules()}
    for number, block in enumerate(slices):
        for name, module in whole.named_modules():
            how = [kind for pattern, kind in split.items() if fnmatch.fnmatchcase(names[name], pattern)]
            assert len(how) == int(isinstance(module, torch.nn.Linear) or "query_norm" in name or "key_norm" in name)
            for key, parameter in module.named_parameters(recurse=False):
                value = parameter.detach()
                if how == ["column"]:
                    value = value.chunk(2)[number]
                elif how == ["row"] and key == "weight":
                    value = value.chunk(2, dim=1)[number]
                elif how == ["row"]:
                    value = value / 2
                setattr(block.get_submodule(name), key, torch.nn.Parameter(value.clone()))
    parts = [block.attention(x, rotation) for block in slices]
    torch.testing.assert_close(parts[0] + parts[1], whole.attention(x, rotation), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slices[0].mlp(x) + slices[1].mlp(x), whole.mlp(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("words", VARIANTS)
def test_documents_in_one_window_are_as_if_each_were_alone(words: dict[str, object]) -> None:
    net = network(init_std=0.3, **words).double()
    tokens = torch.randint(0, 50, (2, 12))
    documents = torch.tensor([[3] * 5 + [4] * 1 + [9] * 6, [0] * 2 + [7] * 10])
    packed = net(tokens, documents=documents)
    for row, pieces in enumerate([(0, 5, 6, 12), (0, 2, 12)]):
        for start, stop in itertools.pairwise(pieces):
            alone = net(tokens[row : row + 1, start:stop])
            torch.testing.assert_close(packed[row : row + 1, start:stop], alone, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(packed, net(tokens))
    one = net(tokens, documents=torch.zeros_like(tokens))
    torch.testing.assert_close(one, net(tokens), rtol=1e-12, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        low = net.float()(tokens, documents=documents)
    torch.testing.assert_close(low.double(), packed, rtol=0.1, atol=0.1)


def test_packed_documents_reach_the_loss() -> None:
    made = task(init_std=0.3)
    tokens = torch.randint(0, 50, (2, 13))
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    packed = {**batch, "documents": torch.tensor([[0] * 6 + [1] * 6] * 2)}
    assert made.loss("train", made.parts, batch) != made.loss("train", made.parts, packed)
    assert made.evaluate(made.parts, batch)["nats"] != made.evaluate(made.parts, packed)["nats"]


def test_tied_weights_are_one_matrix() -> None:
    shape = DataShape("tokens", vocabulary_size=50, sequence_length=12)
    for is_tied in (True, False):
        net = network(tie_weights=is_tied)
        assert (net.head.weight is net.tokens.weight) == is_tied
        size = describe(Options(**SMALL, tie_weights=is_tied), shape)
        assert size.num_parameters == sum(p.numel() for p in net.parameters())
