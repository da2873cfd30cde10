"""Models of transformers under every strategy: frozen parts, LoRA and rates by layer as in one plain process."""

import pytest
import torch
from world import TOKENS, Cell, Ranks, assert_same, make_training

from dtrain.data import DataShape
from dtrain.models import Request

SUMS = 1e-6
"""Sums of gradients in another order round differently: fp32 has 24 bits, weights are below 1, after 5 steps."""
IMAGES = DataShape("images", num_classes=10, channels=1, height=8, width=8)
STRATEGIES = [
    {"name": "ddp"},
    {"name": "fsdp"},
    {"name": "deepspeed", "stage": 1, "keep_below": 0},
    {"name": "deepspeed", "stage": 2, "keep_below": 0},
    {"name": "deepspeed", "stage": 3, "keep_below": 0},
]
MODELS = {
    "gpt, LoRA": ("gpt", TOKENS, {"lora": {"rank": 2}}),
    "gpt, frozen": ("gpt", TOKENS, {"freeze": ["*.wte.*", "*.h.0.*"], "layer_decay": 0.7}),
    "vit": ("vit", IMAGES, {"layer_decay": 0.7, "label_smoothing": 0.1}),
    "vit, head": ("vit", IMAGES, {"freeze": "backbone"}),
}


@pytest.fixture(scope="module")
def ranks():
    """As `conftest.ranks`, with the libraries imported, which takes longer than training a cell does."""
    models = ("transformers.models.gpt2.modeling_gpt2", "transformers.models.vit.modeling_vit")
    with Ranks(("deepspeed", "peft", *models)) as started:
        yield started


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    calm = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 49, "eos_token_id": 49}
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=12, n_embd=16, n_layer=2, n_head=2, **calm)).save_pretrained(
        folder / "gpt"
    )
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(
        ViTConfig(**shape, image_size=8, patch_size=4, num_channels=1, num_labels=3)
    ).save_pretrained(folder / "vit")
    return folder


def cell_of(models, name, **words):
    source, shape, options = MODELS[name]
    return Cell(model={"name": "pretrained", "source": str(models / source), **options}, shape=shape, **words)


CELLS = [
    *((name, strategy) for name in ("gpt, LoRA", "vit") for strategy in STRATEGIES),
    *((name, strategy) for name in ("gpt, frozen", "vit, head") for strategy in (STRATEGIES[1], STRATEGIES[4])),
]


@pytest.mark.parametrize(
    ("name", "strategy"), CELLS, ids=[f"{name}-{'-'.join(map(str, s.values()))}" for name, s in CELLS]
)
def test_it_equals_one_process(name, strategy, ranks, models):
    cell = cell_of(models, name, strategy=strategy)
    trained, alone = ranks.train(cell), ranks.alone(cell)
    assert_same(trained, alone, SUMS)
    assert_same(trained, alone, SUMS, "optimizer.")


@pytest.mark.parametrize("strategy", STRATEGIES[:2], ids=lambda s: s["name"])
def test_recomputed_activations_change_nothing(strategy, ranks, models):
    cell = cell_of(models, "gpt, LoRA", strategy=strategy)
    again = cell_of(models, "gpt, LoRA", strategy=strategy, train={"activation_checkpointing": "full"})
    assert_same(ranks.train(again), ranks.alone(cell), SUMS)


def written(rank, num_workers, plan_json, shape):
    from dtrain.plan import Plan
    from dtrain.training.sample import made

    training = make_training(rank, num_workers, Plan.from_json(plan_json), shape)
    found = made(training.task, training.source, Request(prompt="abc", length=9, seed=3))
    return found.text


@pytest.mark.parametrize("strategy", [STRATEGIES[0], STRATEGIES[1], STRATEGIES[4]], ids=lambda s: s["name"])
def test_all_workers_of_a_sharded_model_write_the_same_text(strategy, ranks, models):
    cell = cell_of(models, "gpt, LoRA", strategy=strategy)
    plan = cell.plan().to_json()
    one, other = ranks.run(written, 2, plan, TOKENS)
    [alone] = ranks.run(written, 1, cell_of(models, "gpt, LoRA").plan().to_json(), TOKENS)
    assert one == other == alone
