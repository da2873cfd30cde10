"""What the transformer is for other data than running text: encoder, encoder and decoder, and for images."""

import fnmatch
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dtrain.data import DataShape
from dtrain.errors import InputError
from dtrain.models import Request, Task
from dtrain.models.networks.attention import attend
from dtrain.models.networks.cross_entropy import IGNORED, linear_cross_entropy
from dtrain.models.transformer import Options, build, describe
from dtrain.spec.job import Train

SMALL = {"num_layers": 2, "num_heads": 2, "width": 16}
TEXT = {"vocabulary_size": 50, "sequence_length": 12}
SHAPES = {
    "tokens": DataShape("tokens", **TEXT),
    "masked": DataShape("masked", **TEXT, num_targets=3),
    "pairs": DataShape("pairs", **TEXT),
    "images": DataShape("images", num_classes=10, channels=3, height=8, width=4),
}
MODERN = {"positions": "rope", "qk_norm": True, "norm": "rmsnorm", "activation": "swiglu", "bias": False}
VARIANTS = [{}, MODERN]


def words_for(kind: str, words: dict[str, object]) -> dict[str, object]:
    if kind == "images":
        return {**SMALL, "patch_size": 2, **{k: v for k, v in words.items() if k != "positions"}}
    return {**SMALL, **words}


def task(kind: str, seed: int = 0, **words: object) -> Task:
    return build(Options(**words_for(kind, words)), SHAPES[kind], Train(steps=1, seed=seed))


def batch(kind: str, seed: int = 0, num: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, 2**62, (num,), generator=generator)
    if kind == "images":
        images = torch.randn(num, 3, 8, 4, generator=generator)
        return {"images": images, "labels": torch.randint(0, 10, (num,), generator=generator), "draws": draws}
    tokens = torch.randint(0, 50, (num, 13), generator=generator)
    if kind == "masked":
        hidden = torch.rand(num, 12, generator=generator).argsort(1) < 3
        inputs = torch.where(hidden, 49, tokens[:, 1:])
        return {"inputs": inputs, "targets": torch.where(hidden, tokens[:, 1:], IGNORED), "draws": draws}
    inputs, targets = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    if kind == "pairs":
        source = torch.randint(0, 50, (num, 9), generator=generator)
        for row in range(1, num):
            inputs[row, -2 * row :] = targets[row, -2 * row :] = source[row, -row:] = -1
        return {"source": source, "inputs": inputs, "targets": targets, "draws": draws}
    return {"inputs": inputs, "targets": targets, "draws": draws}


def loss(made: Task, samples: dict[str, torch.Tensor]) -> torch.Tensor:
    return made.loss("train", made.parts, samples)


@given(
    kind=st.sampled_from(sorted(SHAPES)),
    num_layers=st.integers(1, 3),
    num_heads=st.sampled_from([1, 2, 4]),
    activation=st.sampled_from(["gelu", "swiglu"]),
    norm=st.sampled_from(["layernorm", "rmsnorm"]),
    positions=st.sampled_from(["learned", "rope"]),
    qk_norm=st.booleans(),
    bias=st.booleans(),
    tie_weights=st.booleans(),
    patch_size=st.sampled_from([1, 2, 4]),
    pooling=st.sampled_from(["class_token", "mean"]),
)
@settings(max_examples=40, deadline=None)
def test_the_parameter_count_is_true(kind: str, patch_size: int, pooling: str, **words: object) -> None:
    if kind == "images":
        words = {**words, "patch_size": patch_size, "pooling": pooling, "positions": "learned", "tie_weights": True}
    options = Options(width=16, **words)
    made = build(options, SHAPES[kind], Train(steps=1)).parts["model"]
    assert describe(options, SHAPES[kind]).num_parameters == sum(p.numel() for p in made.parameters())


def test_known_sizes() -> None:
    """BERT base without its segments and output bias; ViT-B/16 (86,567,656) to the last number."""
    images = DataShape("images", num_classes=1000, channels=3, height=224, width=224)
    assert describe(Options(), images).num_parameters == 86_567_656
    # google-bert/bert-base-uncased for masked words has 109,514,298: with two segments (1,536), a norm of the
    # embeddings (1,536, here at the end of the stack) and a bias of the vocabulary (30,522).
    texts = DataShape("masked", vocabulary_size=30522, sequence_length=512, num_targets=77)
    assert describe(Options(pad_vocabulary_to=1), texts).num_parameters == 109_514_298 - 1_536 - 30_522


@pytest.mark.parametrize("words", VARIANTS)
@pytest.mark.parametrize("kind", ["masked", "pairs", "images"])
def test_operations_are_those_that_are_done(kind: str, words: dict[str, object]) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    shape = DataShape("images", num_classes=10, channels=1, height=64, width=64)
    if kind != "images":
        shape = DataShape(kind, vocabulary_size=64, sequence_length=256, num_targets=40)
    options = Options(**{**words_for(kind, words), "width": 64})
    made = build(options, shape, Train(steps=1))
    tokens = torch.randint(0, 64, (1, 256))
    if kind == "images":
        samples = {"images": torch.randn(1, 1, 64, 64), "labels": torch.zeros(1, dtype=torch.int64)}
    elif kind == "masked":
        samples = {"inputs": tokens, "targets": torch.where(torch.arange(256) < 40, tokens, IGNORED)}
    else:
        samples = {"source": tokens, "inputs": tokens, "targets": tokens}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss(made, samples).backward()
    assert describe(options, shape).flops_per_sample == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_weights_are_a_function_of_the_seed(kind: str) -> None:
    state = task(kind, 3).parts["model"].state_dict()
    torch.manual_seed(99)
    again, other = (task(kind, seed).parts["model"].state_dict() for seed in (3, 4))
    for name, tensor in state.items():
        assert torch.equal(tensor, again[name]), name
        assert tensor.ndim < 2 or not torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("words", VARIANTS)
@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_it_learns_and_every_parameter_has_a_gradient(kind: str, words: dict[str, object]) -> None:
    made = task(kind, init_std=0.1, **words)
    optimizer = torch.optim.AdamW(made.parts["model"].parameters(), lr=1e-2)
    samples = batch(kind)
    first = loss(made, samples).item()
    num_classes = 10 if kind == "images" else 50
    assert first == pytest.approx(math.log(num_classes), rel=0.35)
    for _ in range(60):
        optimizer.zero_grad()
        last = loss(made, samples)
        last.backward()
        assert all(p.grad is not None and p.grad.any() for p in made.parts["model"].parameters())
        optimizer.step()
    assert last.item() < 0.1


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_the_mean_over_micro_batches_is_the_mean_over_all(kind: str) -> None:
    made = task(kind, init_std=0.3)
    samples = batch(kind)
    parts = [{key: value[start : start + 2] for key, value in samples.items()} for start in (0, 2)]
    found = sum(loss(made, part) for part in parts) / 2
    torch.testing.assert_close(found, loss(made, samples))
    sums = [made.evaluate(made.parts, part) for part in parts]
    total = made.evaluate(made.parts, samples)
    for key, value in total.items():
        torch.testing.assert_close(sums[0][key] + sums[1][key], value, msg=key)


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_smoothing_spreads_a_share_of_each_target_while_training_only(kind: str) -> None:
    plain, smoothed = (task(kind, init_std=0.3, label_smoothing=share) for share in (0.0, 0.3))
    samples = batch(kind)
    assert abs(loss(smoothed, samples).item() - loss(plain, samples).item()) > 1e-3
    found, expected = (made.evaluate(made.parts, samples)["nats"] for made in (smoothed, plain))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_smoothed_and_weighted_cross_entropy_is_torchs(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtrain.models.networks.cross_entropy import _LinearCrossEntropy

    monkeypatch.setattr(_LinearCrossEntropy, "CPU_CHUNK", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(17, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(0, 7, (17,)), torch.rand(17)
    targets[3], weights[3] = IGNORED, 0.0
    logits = (hidden @ weight.t())[:, :7]
    nats = F.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=0.2, reduction="none")
    for given_weights, plain in ((None, nats.sum()), (weights, (nats * weights).sum())):
        found = linear_cross_entropy(hidden, weight, targets, 7, 0.2, given_weights)
        torch.testing.assert_close(found.double(), plain, rtol=1e-5, atol=1e-5)
        for tensor in (hidden, weight):
            (slope,) = torch.autograd.grad(found, tensor, retain_graph=True)
            (expected,) = torch.autograd.grad(plain, tensor, retain_graph=True)
            torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("words", VARIANTS)
def test_hidden_tokens_cost_their_cross_entropy(words: dict[str, object]) -> None:
    made = task("masked", init_std=0.3, **words)
    samples = batch("masked")
    net = made.parts["model"]
    plain = F.cross_entropy(net(samples["inputs"]).flatten(0, 1), samples["targets"].flatten(), ignore_index=IGNORED)
    found = loss(made, samples)
    torch.testing.assert_close(found, plain)
    for name, parameter in net.named_parameters():
        (slope,) = torch.autograd.grad(found, parameter, retain_graph=True)
        (expected,) = torch.autograd.grad(plain, parameter, retain_graph=True)
        torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-6, msg=name)
    sums = {key: value.item() for key, value in made.evaluate(made.parts, samples).items()}
    metrics = made.finish_evaluation(sums)
    assert metrics["loss"] == pytest.approx(plain.item(), rel=1e-5) and sums["targets"] == 12
    answers = net(samples["inputs"]).argmax(2)
    assert metrics["accuracy"] == pytest.approx((answers == samples["targets"]).sum().item() / 12)


@pytest.mark.parametrize("words", VARIANTS)
def test_known_places_of_hidden_tokens_change_nothing_and_need_no_wait(words: dict[str, object]) -> None:
    """How many elements are nonzero is known to the device alone: asking it stops everything until it has answered."""
    made, samples = task("masked", init_std=0.3, **words), batch("masked")
    samples["documents"] = torch.arange(12).expand(4, 12) // 5
    places = (samples["targets"] != IGNORED).nonzero()[:, 1].view(4, 3)
    results = []
    for one in (samples, {**samples, "places": places}):
        made.parts["model"].zero_grad()
        asked = Asked()
        with asked:
            found = loss(made, one)
            found.backward()
            sums = made.evaluate(made.parts, one)
        slopes = [parameter.grad for parameter in made.parts["model"].parameters()]
        results.append((asked.number, [found.detach(), *sums.values(), *slopes]))
    (before, expected), (after, values) = results
    assert before > 0 and after == 0
    assert all(torch.equal(one, other) for one, other in zip(values, expected, strict=True))


class Asked(TorchDispatchMode):
    """Counts the operations whose result is as large as the device finds."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten.nonzero.default or self._has_mask(function, args)
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _has_mask(function, args) -> bool:
        is_index = function is torch.ops.aten.index.Tensor
        return is_index and any(one is not None and one.dtype == torch.bool for one in args[1])


def test_what_was_filled_in_is_shown_beside_what_was_there() -> None:
    made = task("masked", init_std=0.1)
    samples = {"inputs": torch.arange(12)[None].clone(), "targets": torch.full((1, 12), IGNORED)}
    for place in (0, 4, 5):
        samples["targets"][0, place], samples["inputs"][0, place] = place, 49
    optimizer = torch.optim.AdamW(made.parts["model"].parameters(), lr=1e-2)
    for _ in range(60):
        loss(made, samples).backward()
        optimizer.step()
        optimizer.zero_grad()
    samples["targets"][0, 5] = 20  # what is there now is not what it learnt
    arrays = {name: tensor.numpy() for name, tensor in samples.items()}
    source = SimpleNamespace(
        held_out=SimpleNamespace(num_samples=3, batch=lambda indices, _: arrays if indices == [1] else {}),
        decode=lambda tokens: "".join(chr(97 + token) for token in tokens),
    )
    assert made.sample(source, Request(seed=4)).text == "[a]bcd[e][f|u]ghijkl"


def test_an_encoder_sees_both_ways_and_a_decoder_back() -> None:
    for kind, words in itertools.product(("masked", "tokens"), VARIANTS):
        net = task(kind, init_std=0.3, **words).parts["model"]
        tokens = torch.randint(0, 50, (1, 12))
        changed = tokens.clone()
        changed[0, 7] = (changed[0, 7] + 1) % 50
        differs = (net(tokens) != net(changed)).any(dim=2)[0].tolist()
        assert differs == [kind == "masked" or place >= 7 for place in range(12)]


@pytest.mark.parametrize("words", VARIANTS)
def test_documents_of_an_encoder_are_as_if_each_were_alone(words: dict[str, object]) -> None:
    net = task("masked", init_std=0.3, **words).parts["model"].double()
    tokens = torch.randint(0, 50, (1, 12))
    packed = net(tokens, documents=torch.tensor([[0] * 5 + [1] * 7]))
    for start, stop in ((0, 5), (5, 12)):
        torch.testing.assert_close(packed[:, start:stop], net(tokens[:, start:stop]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("words", VARIANTS)
def test_a_translation_costs_the_mean_over_samples_of_their_means(words: dict[str, object]) -> None:
    made = task("pairs", init_std=0.3, **words)
    samples = batch("pairs")
    net = made.parts["model"]
    singly = []
    for row in range(4):
        num = int((samples["targets"][row] >= 0).sum())
        num_read = int((samples["source"][row] >= 0).sum())
        # No padding at all: what was padded must be the same.
        logits = net(samples["source"][row : row + 1, :num_read], samples["inputs"][row : row + 1, :num])
        singly.append(F.cross_entropy(logits[0], samples["targets"][row, :num]))
    torch.testing.assert_close(loss(made, samples), torch.stack(singly).mean())
    sums = made.evaluate(made.parts, samples)
    assert sums["targets"] == sum(12 - 2 * row for row in range(4))


@pytest.mark.parametrize("words", VARIANTS)
def test_a_translation_is_written_token_by_token_as_it_is_scored_whole(words: dict[str, object]) -> None:
    net = task("pairs", init_std=0.7, tie_weights=False, **words).parts["model"].double()
    source = [4, 9, 1, 30, 2]
    made = net.generate(source, 49, 40, temperature=0.0)
    assert len(made) == 12 and net.training
    logits = net(torch.tensor([source]), torch.tensor([[49, *made[:-1]]]))[0]
    assert logits.argmax(1).tolist() == made
    assert len(set(made)) > 2 and net.generate([7, 7], 49, 12, temperature=0.0) != made
    assert net.generate(source, 49, 12, seed=1) == net.generate(source, 49, 12, seed=1)
    assert net.generate(source, 49, 12, seed=1) != net.generate(source, 49, 12, seed=2)


def test_a_translator_learns_to_reverse() -> None:
    """Words of two to five letters; held-out ones come out reversed, and end."""

    class Letters:
        separator = 49

        def encode(self, text: str) -> list[int]:
            return [ord(letter) - 97 for letter in text]

        def decode(self, tokens: list[int]) -> str:
            return "".join(chr(97 + token) for token in tokens)

    generator = torch.Generator().manual_seed(0)
    made = task("pairs", init_std=0.1, num_layers=2, width=64, num_heads=4)
    optimizer = torch.optim.AdamW(made.parts["model"].parameters(), lr=3e-3)
    for _ in range(250):
        source, inputs, targets = (torch.full((32, 6), -1) for _ in range(3))
        for row in range(32):
            word = torch.randint(0, 6, (int(torch.randint(2, 6, (), generator=generator)),), generator=generator)
            source[row, : len(word)] = word
            inputs[row, 0], targets[row, len(word)] = 49, 49
            inputs[row, 1 : len(word) + 1] = targets[row, : len(word)] = word.flip(0)
        optimizer.zero_grad()
        last = loss(made, {"source": source, "inputs": inputs, "targets": targets})
        last.backward()
        optimizer.step()
    assert last.item() < 0.1
    for word in ("abcd", "fade", "bee", "decaf"):
        assert made.sample(Letters(), Request(prompt=word, temperature=0.0)).text == word[::-1]


def test_patches_are_squares_of_the_picture_row_by_row() -> None:
    patches = task("images").parts["model"].patches
    images = torch.randn(2, 3, 8, 4)
    weight = patches.embedding.weight.view(16, 3, 2, 2)
    expected = F.conv2d(images, weight, patches.embedding.bias, stride=2).flatten(2).transpose(1, 2)
    found = patches(images)
    torch.testing.assert_close(found[:, 1:], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, 0], patches.class_token.expand(2, 16))
    assert task("images", pooling="mean").parts["model"].patches(images).shape == (2, 8, 16)


def test_a_picture_may_be_mixed_with_another() -> None:
    samples = batch("images")
    plain = loss(task("images", init_std=0.3), samples)
    for words in ({"mixup": 0.8}, {"cutmix": 1.0}):
        assert loss(task("images", init_std=0.3, **words), samples) != plain


@pytest.mark.parametrize("words", VARIANTS)
@pytest.mark.parametrize("kind", ["masked", "pairs", "images"])
def test_blocks_are_split_over_devices_as_the_task_says(kind: str, words: dict[str, object]) -> None:
    """Two slices of each part of a block add up to the whole part."""
    made = task(kind, init_std=0.3, **words)
    halves = [task(kind, **words) for _ in range(2)]
    split = made.tensor_parallel()
    for number, half in enumerate(halves):
        theirs = half.parts["model"]
        for name, module in made.parts["model"].named_modules():
            how = [kind for pattern, kind in split.items() if fnmatch.fnmatchcase(f"model.{name}", pattern)]
            is_split = ".blocks." in name and (isinstance(module, nn.Linear) or name.endswith(("y_norm",)))
            assert len(how) == int(is_split), name
            for key, parameter in module.named_parameters(recurse=False):
                value = parameter.detach()
                if how == ["column"]:
                    value = value.chunk(2)[number]
                elif how == ["row"]:
                    value = value.chunk(2, dim=1)[number] if key == "weight" else value / 2
                setattr(theirs.get_submodule(name), key, nn.Parameter(value.clone()))
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    for whole, first, second in zip(made.blocks(), *(half.blocks() for half in halves), strict=True):
        for name in ("attention", "mlp", "reading"):
            if getattr(whole, name, None) is None:
                continue
            given_words = {"memory": memory} if name == "reading" else {}
            parts = [getattr(block, name)(x, **given_words) for block in (first, second)]
            expected = getattr(whole, name)(x, **given_words)
            torch.testing.assert_close(parts[0] + parts[1], expected, rtol=1e-4, atol=1e-6)
    assert any(block.reading is not None for block in made.blocks()) == (kind == "pairs")


@pytest.mark.parametrize("kind", ["tokens", "pairs"])
def test_generation_calls_the_network_and_its_blocks_as_modules(kind: str) -> None:
    """What shards a model gathers its weights when a module is called, and not when a method of it is."""
    net = task(kind).parts["model"]
    calls: dict[str, int] = {}
    for name, module in net.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    if kind == "tokens":
        net.generate([1, 2], 5)
    else:
        net.generate([1, 2], 49, 5)
    holding = [name for name, module in net.named_modules() if any(True for _ in module.parameters(recurse=False))]
    for name in ["", *holding, *(f"decoder.blocks.{i}" for i in range(2))]:
        expected = 1 if name.startswith("encoder") else 5
        if name == "tokens" and kind == "pairs":
            expected = 6
        if "reading.key" in name or "reading.value" in name:
            expected = 1
        assert calls.get(name) == expected, name


@pytest.mark.parametrize("is_masked", [True, False])
def test_plain_attention_in_bf16_is_torchs_attention(is_masked: bool) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(3, 2, n, 16, requires_grad=True) for n in (20, 24, 24)]
    low = [x.bfloat16() for x in exact]
    mask = (torch.rand(3, 1, 20, 24) < 0.5) | (torch.arange(24) == 0) if is_masked else None
    found = attend(*low, is_causal=False, dropout=0.0, mask=mask)
    expected = F.scaled_dot_product_attention(*exact, attn_mask=mask)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    slope = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, low, slope.bfloat16()), torch.autograd.grad(expected, exact, slope), strict=True
    ):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("kind", "words", "match"),
    [
        ("images", {"patch_size": 3}, "patch_size 3 does not divide images of 8 x 4 pixels; nearest: [24]"),
        ("images", {"patch_size": 2, "positions": "rope"}, "rope is for texts, and the data holds images"),
        ("images", {"patch_size": 2, "tie_weights": False}, "tie_weights is for tokens or hidden tokens or pairs"),
        ("tokens", {"patch_size": 2}, "model.patch_size is for images, and the data holds tokens; leave it out"),
        ("masked", {"mixup": 0.5}, "model.mixup is for images, and the data holds hidden tokens"),
        ("pairs", {"pooling": "mean"}, "model.pooling is for images"),
    ],
)
def test_options_that_mean_nothing_for_the_data_are_refused(kind: str, words: dict[str, object], match: str) -> None:
    for use in (describe, lambda options, data: build(options, data, Train(steps=1))):
        with pytest.raises(InputError, match=match):
            use(Options(**{**SMALL, **words}), SHAPES[kind])


def test_data_it_cannot_learn_from_is_refused() -> None:
    with pytest.raises(InputError, match="learns from tokens, pairs of texts, or images, not from series"):
        describe(Options(), DataShape("series"))
    with pytest.raises(InputError, match="needs a class for each of the images"):
        describe(Options(), DataShape("images", channels=1, height=16, width=16))
