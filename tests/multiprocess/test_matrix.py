"""Every family of models under every strategy: after five steps the weights are those of one plain process.

Tolerance: gradients are summed in another order, fp32 rounds each sum by 6e-8 of it, and AdamW divides by the root of
the mean square (its eps is 1e-3 here, see world.py): what is left after five steps of 1e-2 is about 1e-6. Batch norm
divides by a standard deviation over a few numbers: 1e-5 for models that have it.
"""

import pytest
from world import TOKENS, TRANSFORMER, Cell, assert_same

from dtrain.data import DataShape
from dtrain.errors import InputError

IMAGES = DataShape("images", num_classes=4, channels=1, height=8, width=8)
MODELS = {
    "mlp": ({"name": "mlp", "hidden": [16, 16]}, DataShape("table", num_features=6, num_classes=3)),
    "cnn": ({"name": "cnn", "width": 4}, IMAGES),
    "rnn": (
        {"name": "rnn", "cell": "lstm", "width": 8},
        DataShape("series", sequence_length=8, num_features=2, horizon=2),
    ),
    "gpt": (TRANSFORMER, TOKENS),
    "bert": (TRANSFORMER, DataShape("masked", vocabulary_size=50, sequence_length=12)),
    "translation": (TRANSFORMER, DataShape("pairs", vocabulary_size=50, sequence_length=12)),
    "vit": ({"name": "transformer", "num_layers": 2, "num_heads": 4, "width": 16, "patch_size": 4}, IMAGES),
    "gan": ({"name": "gan", "latent_size": 8, "generator_width": 4, "discriminator_width": 4}, IMAGES),
    "vae": ({"name": "autoencoder"}, IMAGES),
}
STRATEGIES = {
    "ddp": {"name": "ddp"},
    "fsdp": {"name": "fsdp"},
    "zero1": {"name": "deepspeed", "stage": 1},
    "zero2": {"name": "deepspeed", "stage": 2},
    "zero3": {"name": "deepspeed", "stage": 3},
    "accelerate": {"name": "accelerate"},
}
TOLERANCES = {"cnn": 1e-5, "gan": 1e-5, "vae": 1e-5}
REFUSED: dict[tuple[str, str], str] = {}
"""Cells that planning refuses, and the words of the refusal."""
MESH = {"name": "fsdp", "tensor_parallel": 2}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("model", MODELS)
def test_the_weights_are_those_of_one_process(model, strategy, ranks):
    options, shape = MODELS[model]
    cell = Cell(model=options, shape=shape, strategy=STRATEGIES[strategy])
    if (model, strategy) in REFUSED:
        with pytest.raises(InputError, match=REFUSED[model, strategy]):
            cell.plan()
        return
    assert_same(ranks.train(cell), ranks.alone(cell), TOLERANCES.get(model, 1e-6))


@pytest.mark.parametrize("model", ["gpt", "bert", "translation", "vit"])
def test_sharding_and_tensor_parallelism_on_a_mesh_of_four(model, ranks):
    options, shape = MODELS[model]
    cell = Cell(model=options, shape=shape, strategy=MESH, num_workers=4)
    assert_same(ranks.train(cell), ranks.alone(cell), 1e-6)


@pytest.mark.parametrize("model", ["mlp", "cnn", "rnn", "gan", "vae"])
def test_tensor_parallelism_of_other_models_is_refused(model):
    options, shape = MODELS[model]
    with pytest.raises(InputError, match="tensor_parallel"):
        Cell(model=options, shape=shape, strategy=MESH, num_workers=4).plan()
