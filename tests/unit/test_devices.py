"""No step waits for its device: not for a number, not for how many there are of something, not for a forgotten tensor.

torch's `meta` device stands for a GPU. It holds no numbers, so whatever would read one fails, and it refuses to compute
with tensors that lie elsewhere.
"""

import contextlib

import pytest
import torch
from torch import nn

from dtrain import component
from dtrain.data import DataShape
from dtrain.spec.job import Train
from dtrain.training.metrics import StepMetrics

DEVICE = torch.device("meta")
NUM = 4
LONG, REAL = torch.int64, torch.float32
TOKENS = {"vocabulary_size": 50, "sequence_length": 12}
IMAGES = DataShape("images", num_classes=4, channels=3, height=16, width=16)
TEXT = {"inputs": ((12,), LONG), "targets": ((12,), LONG)}
PACKED = {**TEXT, "documents": ((12,), LONG)}
PICTURES = {"images": ((3, 16, 16), REAL), "labels": ((), LONG)}
TABLE = {"features": ((6,), REAL), "targets": ((), LONG)}
SERIES = {"inputs": ((8, 2), REAL), "last": ((), REAL), "targets": ((2,), REAL)}
TRANSFORMER = {"name": "transformer", "num_layers": 2, "num_heads": 2, "width": 16}
MODERN = {"positions": "rope", "qk_norm": True, "norm": "rmsnorm", "activation": "swiglu", "dropout": 0.1}
GAN = {"name": "gan", "latent_size": 8, "generator_width": 4, "discriminator_width": 4}
RNN = {"name": "rnn", "width": 8}
CASES = {
    "gpt": (TRANSFORMER, DataShape("tokens", **TOKENS), TEXT),
    "packed": ({**TRANSFORMER, **MODERN}, DataShape("tokens", **TOKENS), PACKED),
    "bert": (TRANSFORMER, DataShape("masked", **TOKENS, num_targets=3), {**PACKED, "places": ((3,), LONG)}),
    "translation": (TRANSFORMER, DataShape("pairs", **TOKENS), {**TEXT, "source": ((9,), LONG)}),
    "vit": ({**TRANSFORMER, "patch_size": 4, "mixup": 0.5, "cutmix": 0.5}, IMAGES, PICTURES),
    "cnn": ({"name": "cnn", "width": 4, "mixup": 0.2, "channels_last": True}, IMAGES, PICTURES),
    "vgg": ({"name": "cnn", "architecture": "vgg16", "width": 4, "dropout": 0.1}, IMAGES, PICTURES),
    "series": (RNN, DataShape("series", sequence_length=8, num_features=2, horizon=2), SERIES),
    "rnn": (RNN, DataShape("tokens", **TOKENS), TEXT),
    "mlp": ({"name": "mlp"}, DataShape("table", num_features=6, num_classes=3), TABLE),
    "number": ({"name": "mlp"}, DataShape("table", num_features=6), {**TABLE, "targets": ((), REAL)}),
    "gan": (GAN, IMAGES, PICTURES),
    "hinge": ({**GAN, "discriminator_norm": "batchnorm", "loss": "hinge"}, IMAGES, PICTURES),
    "vae": ({"name": "autoencoder"}, IMAGES, PICTURES),
    "autoencoder": ({"name": "autoencoder", "variational": False}, DataShape("table", num_features=6), TABLE),
}


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """Which does not know this device."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_read_back_and_nothing_lies_elsewhere(case):
    words, shape, held = CASES[case]
    module = component.load("models", words["name"])
    options = component.with_name(words["name"], module.Options)(**words)
    task = module.build(options, shape, Train(steps=1))
    for part in task.parts.values():
        part.to(DEVICE)
    batch = {name: torch.empty((NUM, *size), dtype=kind, device=DEVICE) for name, (size, kind) in held.items()}
    batch["draws"] = torch.empty(NUM, dtype=LONG, device=DEVICE)
    metrics = StepMetrics(DEVICE, [phase.name for phase in task.phases], 1, 1)
    for phase in task.phases:
        loss = task.loss(phase.name, task.parts, batch)
        assert loss.device == DEVICE and loss.shape == ()
        loss.backward()
        metrics.add(phase.name, loss)
    parameters = [parameter for part in task.parts.values() for parameter in part.parameters()]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
    metrics.end_step(norm)
    for part in task.parts.values():
        part.eval()
    with torch.no_grad():
        sums = task.evaluate(task.parts, batch)
    assert {value.device for value in sums.values()} == {DEVICE}


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x + torch.ones(3),
    ],
    ids=["item", "bool", "tolist", "nonzero", "mask", "elsewhere"],
)
def test_what_would_wait_fails_here(step):
    with pytest.raises((RuntimeError, NotImplementedError)):
        step(torch.empty(3, device=DEVICE))
