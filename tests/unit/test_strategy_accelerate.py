"""What Accelerate cannot do inside of dtrain is refused when a job is planned, with what to do instead."""

import re

import pytest
from making import FOUR_GPUS, a_job, a_plan

from dtrain.errors import InputError
from dtrain.models import ModelSize
from dtrain.strategies import accelerate


def engine(name, **options):
    return {"name": "accelerate", "engine": name, **options}


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed"])
def test_the_scale_of_losses_would_be_lost(name):
    message = (
        "train.precision fp16: strategy accelerate keeps the scale of its losses to itself, and a run that is resumed"
        " would lose it; use bf16, or strategy: {name: ddp}"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        a_plan(strategy=engine(name), train={"precision": "fp16"})


@pytest.mark.parametrize(
    ("strategy", "alternative"),
    [
        (engine("fsdp"), "strategy: {name: fsdp}"),
        (engine("deepspeed", stage=1), "strategy: {name: deepspeed, stage: 1}"),
    ],
)
def test_only_ddp_takes_several_networks(strategy, alternative):
    """The size is that of a GAN; all else of the job is of no account."""
    job, workers = a_job(strategy=strategy), a_plan().workers
    size = ModelSize(100, 600, 400, parts=("generator", "discriminator"))
    message = f"takes one network, and this model has 2 (generator, discriminator); use {alternative}"
    with pytest.raises(InputError, match=re.escape(message)):
        accelerate.check(job.strategy, job, workers, size)
    ddp = a_job(strategy=engine("ddp"))
    accelerate.check(ddp.strategy, ddp, workers, size)


def test_all_engines_are_planned_on_cores_and_on_gpus():
    for name in ("ddp", "fsdp", "deepspeed"):
        assert a_plan(strategy=engine(name)).strategy.engine == name
        assert a_plan(machine=FOUR_GPUS, strategy=engine(name), train={"precision": "bf16"}).workers.device == "cuda"
