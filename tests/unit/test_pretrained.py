"""Training on what others have trained: tiny models of transformers, saved to a folder, without a network."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from making import a_plan

from dtrain.checkpoint import store
from dtrain.data import DataShape, text, tokens
from dtrain.errors import InputError
from dtrain.models import Phase, Request, pretrained
from dtrain.models.pretrained import Lora, Options
from dtrain.settings import convert
from dtrain.spec.job import AdamW, Train
from dtrain.strategies import ddp
from dtrain.training.optim import build_optimizer

TOKENS = DataShape("tokens", vocabulary_size=300, sequence_length=16)
MASKED = DataShape("masked", vocabulary_size=300, sequence_length=16)
IMAGES = DataShape("images", num_classes=10, channels=1, height=8, width=8)
TRAIN = Train(steps=10)
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


def saved(folder, name, **settings):
    import transformers

    config_class = getattr(transformers, pretrained_config(name))
    torch.manual_seed(0)
    network = getattr(transformers, name)(config_class(**settings))
    network.save_pretrained(folder)
    return str(folder)


def pretrained_config(name):
    return {
        "GPT2": "GPT2Config",
        "Bert": "BertConfig",
        "ViTF": "ViTConfig",
        "Llam": "LlamaConfig",
        "ResN": "ResNetConfig",
    }[name[:4]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    from transformers.utils import logging

    logging.disable_progress_bar()
    bert = {**SMALL, "vocab_size": 300, "max_position_embeddings": 32}
    vit = {**SMALL, "image_size": 8, "patch_size": 4, "num_channels": 1}
    small_gpt = {"vocab_size": 300, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    small_gpt |= {"bos_token_id": 299, "eos_token_id": 299, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    return {
        "gpt": saved(folder / "gpt", "GPT2LMHeadModel", **small_gpt),
        "llama": saved(
            folder / "llama", "LlamaForCausalLM", **SMALL, vocab_size=300, max_position_embeddings=32,
            num_key_value_heads=1, tie_word_embeddings=False, initializer_range=0.2,
        ),
        "bert": saved(folder / "bert", "BertForMaskedLM", **bert),
        "encoder": saved(folder / "encoder", "BertModel", **bert),
        "vit": saved(folder / "vit", "ViTForImageClassification", **vit, num_labels=10),
        "vit of three": saved(folder / "vit3", "ViTForImageClassification", **vit, num_labels=3),
        "resnet": saved(
            folder / "resnet", "ResNetForImageClassification", num_channels=1, embedding_size=8, hidden_sizes=[8, 16],
            depths=[1, 2], layer_type="basic", num_labels=10,
        ),
    }  # fmt: skip


def built(source, data=TOKENS, seed=0, **options):
    return pretrained.build(Options(source=source, **options), data, Train(steps=10, seed=seed))


def batch(data=TOKENS, size=4, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, 2**60, (size,), generator=numbers)
    if data.kind == "images":
        images = torch.randn(size, data.channels, data.height, data.width, generator=numbers)
        labels = torch.randint(0, data.num_classes, (size,), generator=numbers)
        return {"images": images, "labels": labels, "draws": draws}
    shape = (size, data.sequence_length)
    inputs, targets = (torch.randint(0, 299, shape, generator=numbers) for _ in range(2))
    if data.kind == "masked":
        targets[:, 2:] = -1
    return {"inputs": inputs, "targets": targets, "draws": draws}


def trained_names(task):
    return {name for name, parameter in task.parts["model"].named_parameters() if parameter.requires_grad}


KINDS = [("gpt", TOKENS), ("llama", TOKENS), ("bert", MASKED), ("vit", IMAGES), ("resnet", IMAGES)]


# -- what is known before it is built ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "data"), [*KINDS, ("vit of three", IMAGES)])
def test_the_count_is_that_of_the_built_network(name, data, models):
    size = pretrained.describe(Options(source=models[name]), data)
    network = built(models[name], data).parts["model"]
    assert size.num_parameters == sum(p.numel() for p in network.parameters()) > 0
    assert size.num_frozen == 0
    assert (size.flops_per_sample > 0) == (size.activation_bytes_per_sample > 0) == (name != "resnet")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt", {"freeze": ("*.h.0.*", "*.wte.*")}),
        ("llama", {"freeze": ("*embed_tokens*",)}),
        ("gpt", {"lora": {"rank": 3, "targets": ["c_attn", "mlp.c_fc"]}}),
        ("llama", {"lora": {"rank": 3, "targets": ["q_proj", "v_proj"]}}),
    ],
)
def test_the_count_of_what_is_trained_and_what_is_frozen(name, options, models):
    size = pretrained.describe(convert({"source": models[name], **options}, Options), TOKENS)
    network = built(models[name], **options).parts["model"]
    assert size.num_parameters == sum(p.numel() for p in network.parameters() if p.requires_grad) > 0
    assert size.num_frozen == sum(p.numel() for p in network.parameters() if not p.requires_grad) > 0


def test_what_only_building_can_tell_is_not_guessed(models, tmp_path):
    nowhere = pretrained.describe(Options(source="/no/such/folder"), TOKENS)
    assert (nowhere.num_parameters, nowhere.flops_per_sample, nowhere.activation_bytes_per_sample) == (0, 0, 0)
    assert pretrained.describe(Options(source="openai/gpt2"), TOKENS).num_parameters == 0
    assert pretrained.describe(Options(source=models["encoder"]), MASKED).num_parameters == 0
    assert pretrained.describe(Options(source=models["gpt"], lora=Lora()), TOKENS).num_parameters == 0


def test_planning_needs_neither_torch_nor_transformers(models):
    code = """
        import sys
        from dtrain.data import DataShape
        from dtrain.models import pretrained
        size = pretrained.describe(pretrained.Options(source=sys.argv[1]), DataShape("tokens", 300, 16))
        assert size.num_parameters > 0
        assert not {"torch", "transformers", "numpy", "tokenizers", "peft"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), models["gpt"]], check=True, timeout=60)


def test_a_folder_is_taken_from_where_the_job_is_and_a_hub_name_stays(models, tmp_path):
    (tmp_path / "mine").mkdir()
    assert pretrained.resolve(Options(source="mine"), tmp_path).source == str(tmp_path / "mine")
    assert pretrained.resolve(Options(source="./gone"), tmp_path).source == str(tmp_path / "gone")
    assert pretrained.resolve(Options(source="openai/gpt2"), tmp_path).source == "openai/gpt2"


# -- losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "data"), KINDS)
def test_the_loss_is_the_cross_entropy_of_the_model_alone(name, data, models):
    import transformers
    from torch.nn.functional import cross_entropy

    task, samples = built(models[name], data), batch(data)
    head = {"tokens": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM"}
    plain = getattr(transformers, head.get(data.kind, "AutoModelForImageClassification")).from_pretrained(models[name])
    task.parts["model"].eval()
    if data.kind == "images":
        expected = cross_entropy(plain.eval()(pixel_values=samples["images"]).logits, samples["labels"])
    else:
        scores = plain.eval()(input_ids=samples["inputs"]).logits.flatten(0, 1)
        expected = cross_entropy(scores, samples["targets"].flatten(), ignore_index=-1)
    loss = task.loss("train", task.parts, samples)
    torch.testing.assert_close(loss, expected)
    with torch.no_grad():
        figures = task.finish_evaluation({k: float(v) for k, v in task.evaluate(task.parts, samples).items()})
    assert figures["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert ("accuracy" in figures) == (data.kind == "images")


def test_label_smoothing_trains_and_does_not_measure(models):
    for name, data in (("gpt", TOKENS), ("vit", IMAGES)):
        plain, smooth = built(models[name], data), built(models[name], data, label_smoothing=0.2)
        samples = batch(data)
        for task in (plain, smooth):
            task.parts["model"].eval()
        assert not torch.equal(*(t.loss("train", t.parts, samples) for t in (plain, smooth)))
        one, other = (t.evaluate(t.parts, samples)["nats"] for t in (plain, smooth))
        torch.testing.assert_close(one, other)


def test_packed_documents_see_nothing_of_each_other(models):
    for name, data in (("gpt", TOKENS), ("llama", TOKENS), ("bert", MASKED)):
        network = built(models[name], data).parts["model"].eval()
        one = torch.randint(0, 299, (2, 16), generator=torch.Generator().manual_seed(1))
        other = one.clone()
        other[:, :6] = 7
        documents = torch.tensor([[0] * 6 + [1] * 10] * 2)
        is_causal = data.kind == "tokens"
        first, second = (network(x, documents=documents, is_causal=is_causal) for x in (one, other))
        torch.testing.assert_close(first[:, 6:], second[:, 6:])
        assert not torch.allclose(first[:, :6], second[:, :6])
        # Beside others a document is read as it is alone.
        torch.testing.assert_close(first[:, 6:], network(one[:, 6:], is_causal=is_causal), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(network(one, is_causal=is_causal)[:, 6:], network(other, is_causal=is_causal)[:, 6:])


# -- new weights -------------------------------------------------------------------------------------------------


def test_a_head_for_other_classes_is_the_seeds_and_the_rest_the_folders(models):
    one, same, other = (built(models["vit of three"], IMAGES, seed=s).parts["model"].state_dict() for s in (0, 0, 1))
    torch.manual_seed(99)  # a generator that somebody else has used
    again = built(models["vit of three"], IMAGES, seed=0).parts["model"].state_dict()
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {"network.classifier.weight"}
    assert one["network.classifier.weight"].shape == (10, 16)
    assert all(torch.equal(one[name], same[name]) and torch.equal(one[name], again[name]) for name in one)


def test_building_leaves_the_generator_of_others_alone(models):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    built(models["vit of three"], IMAGES)
    assert torch.equal(torch.rand(1), expected)


# -- what is trained ---------------------------------------------------------------------------------------------


def test_lora_trains_its_matrices_only_and_begins_as_the_model_was(models):
    plain, task = built(models["gpt"]), built(models["gpt"], lora={"rank": 2, "targets": ["c_attn"]})
    names = trained_names(task)
    assert names == {
        f"network.transformer.h.{layer}.attn.c_attn.lora_{matrix}.default.weight" for layer in (0, 1) for matrix in "AB"
    }
    samples = batch()
    assert torch.equal(plain.loss("train", plain.parts, samples), task.loss("train", task.parts, samples))


def test_lora_on_all_linear_layers_leaves_the_head_alone(models):
    gpt, bert = built(models["gpt"], lora={}), built(models["bert"], MASKED, lora={})
    adapted = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in trained_names(gpt)}
    assert adapted == {"c_attn", "c_proj", "c_fc"}
    assert not any("decoder" in name for name in trained_names(bert))
    vit = built(models["vit of three"], IMAGES, lora={})
    assert {n for n in trained_names(vit) if "lora_" not in n} == {
        "network.classifier.weight",
        "network.classifier.bias",
    }
    assert not any("classifier.lora" in name for name in trained_names(vit))


def test_lora_matrices_are_the_seeds(models):
    one, same, other = (
        dict(built(models["gpt"], seed=s, lora={}).parts["model"].named_parameters()) for s in (0, 0, 1)
    )
    name = "network.transformer.h.0.attn.c_attn.lora_A.default.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])


def test_frozen_patterns_and_the_backbone(models):
    task = built(models["gpt"], freeze=("*.h.0.*", "*.wte.*", "*.wpe.*"))
    assert not any(".h.0." in name or "wte" in name for name in trained_names(task))
    assert any(".h.1." in name for name in trained_names(task))
    vit = built(models["vit"], IMAGES, freeze="backbone")
    assert trained_names(vit) == {"network.classifier.weight", "network.classifier.bias"}


def test_learning_rates_fall_from_layer_to_layer(models):
    task = built(models["gpt"], layer_decay=0.5)
    phase = Phase("train", ("model",))
    shares = {n: task.learning_rate_share(phase, f"model.{n}") for n, _ in task.parts["model"].named_parameters()}
    assert shares["network.transformer.wte.weight"] == 0.125
    assert shares["network.transformer.h.0.ln_1.weight"] == 0.25
    assert shares["network.transformer.h.1.ln_1.weight"] == 0.5
    assert shares["network.transformer.ln_f.weight"] == 1.0
    vit = built(models["vit"], IMAGES, layer_decay=0.5)
    assert vit.learning_rate_share(phase, "model.network.classifier.weight") == 1.0
    with_lora = built(models["gpt"], layer_decay=0.5, lora={})
    lora = "model.network.transformer.h.0.attn.c_attn.lora_A.default.weight"
    assert with_lora.learning_rate_share(phase, lora) == 0.25


@pytest.mark.parametrize(
    ("name", "data", "options"),
    [
        ("gpt", TOKENS, {"lora": {"rank": 4}}),
        ("gpt", TOKENS, {"freeze": ("*.h.0.*",), "layer_decay": 0.8}),
        ("vit of three", IMAGES, {"freeze": "backbone"}),
        ("bert", MASKED, {}),
    ],
)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_it_learns_one_batch_and_what_is_frozen_stays(name, data, options, checkpointing, models):
    task, samples = built(models[name], data, **options), batch(data)
    network = task.parts["model"]
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    plan = a_plan(train={"steps": 10, "activation_checkpointing": checkpointing})
    optimizer = AdamW(name="adamw", lr=0.02, weight_decay=0.1)
    made = ddp.prepare(task, plan, torch.device("cpu"), lambda parameters: build_optimizer(optimizer, parameters))
    engine, losses = made.engines["train"], []
    for _ in range(25):
        engine.begin(True)
        loss = task.loss("train", engine.parts, samples)
        engine.backward(loss)
        engine.step(0.02)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.15
    changed = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trained_names(task)
    kept = {piece.name for piece in made.state if piece.name.startswith("optimizer.")}
    assert {name.removeprefix("optimizer.train.model.").rpartition(".")[0] for name in kept} == trained_names(task)


def test_recomputed_activations_change_nothing(models):
    gradients = []
    for checkpointing in ("none", "full"):
        task = built(models["llama"])
        assert [type(block).__name__ for block in task.blocks()] == ["LlamaDecoderLayer"] * 2
        made = ddp.prepare(
            task,
            a_plan(train={"steps": 10, "activation_checkpointing": checkpointing}),
            torch.device("cpu"),
            lambda parameters: build_optimizer(AdamW(name="adamw", lr=0.1), parameters),
        )
        task.loss("train", made.engines["train"].parts, batch()).backward()
        gradients.append([p.grad for p in task.parts["model"].parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


# -- what is kept ------------------------------------------------------------------------------------------------


def prepared(task):
    make = lambda parameters: build_optimizer(AdamW(name="adamw", lr=0.02), parameters)  # noqa: E731
    return ddp.prepare(task, a_plan(train={"steps": 10}), torch.device("cpu"), make).keeping(task.is_kept)


def test_of_lora_the_matrices_are_kept_and_of_others_everything(models):
    names = {piece.name for piece in prepared(built(models["gpt"], lora={})).state}
    kept = {name for name in names if name.startswith("model.")}
    assert kept - {"model.model.source"} == {name for name in kept if "lora_" in name}
    assert "model.model.source" in kept
    vit = {piece.name for piece in prepared(built(models["vit of three"], IMAGES, lora={})).state}
    assert "model.model.network.classifier.weight" in vit
    plain = built(models["gpt"], freeze=("*.h.0.*",))
    assert {piece.name for piece in prepared(plain).state} >= {f"model.model.{n}" for n in trained_names(plain)}
    assert any(".h.0." in piece.name for piece in prepared(plain).state)


def test_a_checkpoint_of_lora_is_put_back_beside_the_same_weights_only(models, tmp_path):
    task, samples = built(models["gpt"], lora={"rank": 4}), batch()
    made = prepared(task)
    engine = made.engines["train"]
    for _ in range(5):
        engine.begin(True)
        engine.backward(task.loss("train", engine.parts, samples))
        engine.step(0.02)
    store.write(tmp_path, 5, made.state, {})
    expected = task.loss("train", task.parts, samples)

    again = built(models["gpt"], seed=9, lora={"rank": 4})
    store.read_into(store.path_of(tmp_path, 5), prepared(again).state)
    assert torch.equal(again.loss("train", again.parts, samples), expected)

    config = tmp_path / "other" / "config.json"
    shutil.copytree(models["gpt"], config.parent)
    weights = bytearray((config.parent / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (config.parent / "model.safetensors").write_bytes(weights)
    other = built(str(config.parent), lora={"rank": 4})
    other.loss("train", other.parts, samples)
    changed = built(str(config.parent), lora={"rank": 4})
    store.read_into(store.path_of(tmp_path, 5), prepared(changed).state)
    with pytest.raises(InputError, match="its files are not those that the checkpoint was trained beside"):
        changed.loss("train", changed.parts, samples)


def test_where_the_files_lie_does_not_matter(models, tmp_path):
    shutil.copytree(models["gpt"], tmp_path / "copy")
    one, other = (built(str(f), lora={}).parts["model"].source for f in (models["gpt"], tmp_path / "copy"))
    assert torch.equal(one, other)


# -- what does not go together -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "options", "said"),
    [
        ("gpt", DataShape("tokens", 4096, 16), {}, "knows 300 tokens, and data has 4096: .* set data.tokenizer: {n"),
        ("gpt", DataShape("tokens", 300, 64), {}, "sequence_length 64 is more than the 32 positions"),
        ("vit", DataShape("images", num_classes=10, channels=3, height=8, width=8), {}, "set data.channels: 1"),
        ("vit", DataShape("images", num_classes=10, channels=1, height=28, width=28), {}, "set data.size: 8"),
        ("gpt", DataShape("table", num_features=3), {}, "learns from tokens, masked tokens and images, not from table"),
        ("encoder", MASKED, {}, "was not saved with the head that predicts tokens"),
        ("vit", MASKED, {}, "cannot be loaded by transformers.AutoModelForMaskedLM"),
        ("gpt", TOKENS, {"freeze": ("*.g.0.*",)}, r"no parameter is called '\*.g.0.\*'; they are called"),
        ("gpt", TOKENS, {"freeze": "backbone"}, "leaves nothing to train"),
        ("gpt", TOKENS, {"lora": {"targets": ["q_proj"]}}, "no layer called q_proj; it has c_attn, c_fc, c_proj"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said(name, data, options, said, models):
    with pytest.raises(InputError, match=said):
        built(models[name], data, **options)


def test_a_folder_that_is_none(models, tmp_path):
    with pytest.raises(InputError, match="there is no folder /no/such/folder on this machine"):
        built("/no/such/folder")
    with pytest.raises(InputError, match=r"config.json cannot be read \(No such file"):
        built(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json is not JSON"):
        built(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 300}))
    with pytest.raises(InputError, match=r"cannot be loaded by transformers.AutoModelForCausalLM"):
        built(str(tmp_path))


def test_a_hub_name_without_a_network_says_what_to_do(models, monkeypatch, tmp_path):
    import huggingface_hub

    def refuse(*args, **words):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=r"nobody/nothing \(revision main\) is no folder here .*give its folder"):
        built("nobody/nothing")


def test_a_hub_name_is_had_at_its_revision(models, monkeypatch):
    import huggingface_hub

    def had(name, revision, allow_patterns):
        assert (name, revision) == ("somebody/gpt", "v2")
        assert allow_patterns == ["*.json", "*.safetensors"]
        return models["gpt"]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", had)
    network = built("somebody/gpt", revision="v2").parts["model"].state_dict()
    expected = built(models["gpt"]).parts["model"].state_dict()
    assert all(torch.equal(network[name], tensor) for name, tensor in expected.items())


def test_lora_and_freeze_exclude_each_other():
    with pytest.raises(ValueError, match="leave freeze out"):
        Options(source="x", lora=Lora(), freeze="backbone")


# -- with the model's own tokenizer ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A byte-level tokenizer as GPT-2's, of 300 tokens."""
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "[MASK]"],
        show_progress=False,
    )
    model.train_from_iterator([inspect.getsource(textwrap)], trainer)
    path = tmp_path_factory.mktemp("t") / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c")
    for number in range(4):
        line = f"the tokens of the model {number} é <|endoftext|> learn\n"
        (folder / f"{number}.txt").write_text(line * 30)
    return folder


def source_of(corpus, tokenizer_file, cache, **options):
    tokenizer = {"name": "file", "path": str(tokenizer_file), "vocab_size": 300}
    asked = {"source": str(corpus), "tokenizer": tokenizer, "sequence_length": 16, "held_out": 0.25, **options}
    return text.open(convert(asked, text.Options), cache)


def test_a_models_own_tokenizer(corpus, tokenizer_file, tmp_path):
    import tokenizers

    source = source_of(corpus, tokenizer_file, tmp_path)
    plain = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    said = "the model é 🙂 learns"
    assert source.encode(said) == plain.encode(said).ids
    assert source.decode(source.encode(said)) == said
    assert source.separator == plain.token_to_id("<|endoftext|>") == 0
    # What looks like the separator in a text is text.
    looks = source.encode("a<|endoftext|>b")
    assert source.separator not in looks
    assert source.decode(looks) == "a<|endoftext|>b"
    everything = source.held_out.batch(np.arange(source.held_out.num_samples), np.zeros(1, dtype=np.uint64))
    held_out_size = 30 * len(b"the tokens of the model 0 \xc3\xa9 <|endoftext|> learn\n")
    assert int(everything["target_bytes"].sum()) == held_out_size


def test_hidden_tokens_are_shown_as_the_models_own_mask(corpus, tokenizer_file, tmp_path):
    source = source_of(corpus, tokenizer_file, tmp_path, objective="masked", mask_share=0.25)
    assert source.mask == 1
    made = source.train.batch(np.arange(64), np.arange(64, dtype=np.uint64) * np.uint64(7919))
    hidden = made["targets"] >= 0
    assert int(hidden.sum(axis=1).min()) == int(hidden.sum(axis=1).max()) == 4
    assert 0.7 < float((made["inputs"][hidden] == 1).mean()) < 0.9
    assert int(made["inputs"].max()) < 300
    described = text.describe(text.Options(objective="masked", tokenizer=tokens.FromFile(path="x", vocab_size=300)))
    assert described.vocabulary_size == 300


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 301}, "vocab_size is 301, and .* knows 300 tokens; set it to 300"),
        ({"separator": "</s>"}, r"has no token '</s>'; its special ones are <\|endoftext\|>, \[MASK\]"),
        ({"path": "/no/tokenizer.json"}, r"/no/tokenizer.json cannot be read \(No such file"),
        ({"path": __file__}, "is no tokenizer.json"),
    ],
)
def test_a_tokenizer_that_is_not_what_the_job_says(changes, said, corpus, tokenizer_file, tmp_path):
    tokenizer = {"name": "file", "path": str(tokenizer_file), "vocab_size": 300, **changes}
    with pytest.raises(InputError, match=said):
        source_of(corpus, tokenizer_file, tmp_path, tokenizer=tokenizer)
    with pytest.raises(InputError, match=r"masked needs a token"):
        tokenizer = {"name": "file", "path": str(tokenizer_file), "vocab_size": 300, "mask": "<mask>"}
        source_of(corpus, tokenizer_file, tmp_path, tokenizer=tokenizer, objective="masked")


def test_text_is_tokenized_anew_when_the_tokenizers_file_changes(corpus, tokenizer_file, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer_file.read_text())
    first = source_of(corpus, path, tmp_path / "cache").fingerprint
    assert source_of(corpus, tokenizer_file, tmp_path / "cache").fingerprint == first
    path.write_text(tokenizer_file.read_text().replace('"use_regex": true', '"use_regex": false'))
    assert source_of(corpus, path, tmp_path / "cache").fingerprint != first


def test_the_size_of_a_tokenizer_is_read_without_its_library(tokenizer_file, tmp_path):
    assert tokens.size_of(tokenizer_file) == 300
    (tmp_path / "unigram.json").write_text('{"model": {"vocab": [["a", 0], ["b", -1]]}, "added_tokens": [{"id": 5}]}')
    assert tokens.size_of(tmp_path / "unigram.json") == 6
    assert tokens.size_of(tmp_path / "none.json") == 0


def test_a_model_refuses_the_tokens_of_another_tokenizer(models, tokenizer_file, tmp_path):
    """Fewer tokens than the model has rows would train without a complaint, on words it never learnt."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        os.link(f"{models['gpt']}/{file}", folder / file)
    (folder / "tokenizer.json").write_text(tokenizer_file.read_text())
    assert pretrained.describe(Options(source=str(folder)), TOKENS).num_parameters > 0
    with pytest.raises(InputError, match=rf"knows 300 tokens, and data has 257: .*path: {folder}/tokenizer.json"):
        pretrained.describe(Options(source=str(folder)), DataShape("tokens", 257, 16))


def test_it_writes_text_by_calls_through_the_module(models, corpus, tokenizer_file, tmp_path):
    source = source_of(corpus, tokenizer_file, tmp_path)
    task = built(models["gpt"])
    calls = []
    task.parts["model"].register_forward_pre_hook(lambda *_: calls.append(1))
    request = Request(prompt="the model", length=40, temperature=1.0, seed=5)
    made = task.sample(source, request)
    assert made.text.startswith("the model")
    assert len(calls) > 10
    assert task.sample(source, request).text == made.text
    assert task.sample(source, Request(prompt="", length=3)) is not None
    greedy = task.parts["model"].eval().generate([5, 6], 3, 16, 0.0, None, 0, -1)
    import transformers

    plain = transformers.AutoModelForCausalLM.from_pretrained(models["gpt"]).eval()
    expected = [5, 6]
    for _ in range(3):
        expected.append(int(plain(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
    assert greedy == expected[2:]
    assert built(models["bert"], MASKED).sample(source, request) is None


def test_the_shipped_job_trains_another_model_of_its_kind(models, corpus, tokenizer_file, tmp_path):
    """All of `jobs/finetune_lora.yaml` but its sizes: planned, tokenized, trained by the loop, measured; it writes."""
    from alone import train

    sizes = ["sequence_length=16", "tokenizer.vocab_size=300", f"tokenizer.path={tokenizer_file}", f"source={corpus}"]
    training, keeper, measured = train(
        "finetune_lora",
        tmp_path,
        f"model.source={models['llama']}",
        *(f"data.{size}" for size in sizes),
        "batch={global: 8, micro: 4}",
        "optimizer.lr=0.02",
        "train={steps: 40, precision: fp32, log_every_steps: 1}",
        "schedule.warmup_steps=2",
        "evaluate.samples=8",
    )
    losses = [report["loss"] for report in keeper.reports if "loss" in report]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.3
    assert measured.keys() == {"loss", "perplexity", "bits_per_byte"}
    trainable = sum(p.numel() for p in training.task.parts["model"].parameters() if p.requires_grad)
    assert training.plan.arithmetic.num_parameters == trainable
    assert training.task.sample(training.source, Request(prompt="the", length=5)).text.startswith("the")
