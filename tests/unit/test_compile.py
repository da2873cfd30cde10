"""Blocks that are compiled stay compiled: torch gives up on code that it has compiled too often for one class."""

import pytest
import torch
from making import a_plan
from torch._dynamo import config

from dtrain import component
from dtrain.data import DataShape
from dtrain.strategies.engine import restructure

# torch's compiler imports what torch itself calls deprecated, and hides from people what it looks at.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
PICTURES = DataShape("images", num_classes=10, channels=3, height=32, width=32)
RESNET = {"name": "cnn", "architecture": "resnet50", "width": 2, "stem": "imagenet"}
GAN = {"name": "gan", "latent_size": 8, "generator_width": 2, "discriminator_width": 2}


@pytest.fixture
def limits():
    """Nothing is compiled yet, nothing stays, and a limit that is hit is an error rather than a warning."""
    torch._dynamo.reset()
    before = config.recompile_limit
    with config.patch(fail_on_recompile_limit_hit=True), torch.compiler.set_stance("default", force_backend="eager"):
        yield
    config.recompile_limit = before
    torch._dynamo.reset()


@pytest.mark.parametrize("model", [RESNET, GAN], ids=["resnet50", "gan"])
def test_blocks_of_many_shapes_are_compiled_for_training_and_for_evaluation(model, limits):
    plan = a_plan(train={"compile": True})
    module = component.load("models", model["name"])
    task = module.build(component.with_name(model["name"], module.Options)(**model), PICTURES, plan.train)
    restructure(task, plan)
    for num in (4, 4, 2):
        batch = {
            "images": torch.randn(num, 3, 32, 32),
            "labels": torch.zeros(num, dtype=torch.int64),
            "draws": torch.arange(num),
        }
        for part in task.parts.values():
            part.train()
        for phase in task.phases:
            task.loss(phase.name, task.parts, batch).backward()
        for part in task.parts.values():
            part.eval()
        with torch.no_grad():
            task.evaluate(task.parts, batch)
