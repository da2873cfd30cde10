"""Where batches keep their shapes cuDNN looks for the quickest algorithm of each convolution, and nowhere else."""

from types import SimpleNamespace

import pytest
import torch
from making import FOUR_GPUS, TWO_CORES, a_plan
from msgspec.structs import replace

from dtrain.models import Task
from dtrain.strategies.engine import restructure


@pytest.fixture
def setting():
    """What it was before comes back."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    yield
    torch.backends.cudnn.benchmark = before
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("machine", [FOUR_GPUS, TWO_CORES], ids=["gpus", "cores"])
@pytest.mark.parametrize("is_exact", [False, True])
def test_algorithms_are_tried_on_gpus_unless_the_same_ones_are_wanted(machine, is_exact, setting):
    torch.use_deterministic_algorithms(is_exact)
    restructure(Task({}), a_plan(machine=machine))
    assert torch.backends.cudnn.benchmark == (machine is FOUR_GPUS and not is_exact)


@pytest.mark.parametrize("section", ["model", "data"])
def test_what_users_wrote_may_have_other_shapes_in_every_step(section, setting):
    plan = a_plan(machine=FOUR_GPUS)
    restructure(Task({}), replace(plan, **{section: SimpleNamespace(name="custom")}))
    assert not torch.backends.cudnn.benchmark
