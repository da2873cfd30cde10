"""What ZeRO cannot do is refused when a job is planned, with what to do instead; its settings come from the plan."""

import json
import re

import pytest
from making import FOUR_GPUS, a_plan

from dtrain.errors import InputError
from dtrain.strategies import deepspeed


def zero(**options):
    return {"name": "deepspeed", **options}


@pytest.mark.parametrize(
    ("strategy", "train", "message"),
    [
        (zero(stage=1), {"precision": "fp16"}, ("train.precision fp16: strategy deepspeed (stage 1) computes in fp32"
            " and bf16; use bf16,")),
        (zero(offload_optimizer="nvme"), {}, ("strategy.offload_optimizer nvme: a run is kept alive from a copy of its"
            " state in memory, so a state too large for memory cannot be kept; use offload_optimizer: cpu,")),
        (zero(stage=2, offload_parameters=True), {}, ("strategy.offload_parameters: only stage 3 divides weights, and"
            " this is stage 2; use stage: 3")),
    ],
)  # fmt: skip
def test_refusals_name_the_key_and_the_alternative(strategy, train, message):
    with pytest.raises(InputError, match=re.escape(message)):
        a_plan(strategy=strategy, train=train)


def test_all_stages_are_planned_on_cores_and_on_gpus():
    for stage in (1, 2, 3):
        assert a_plan(strategy=zero(stage=stage)).strategy.stage == stage
        plan = a_plan(machine=FOUR_GPUS, strategy=zero(stage=stage, offload_optimizer="cpu"), train={"compile": True})
        assert plan.workers.device == "cuda"


def test_settings_leave_nothing_to_deepspeed():
    plan = a_plan(strategy=zero(stage=3, offload_parameters=True), batch={"global": 16, "micro": 2})
    settings = deepspeed.configuration(plan, plan.strategy)
    assert "auto" not in json.dumps(settings)
    micro, accumulation = settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]
    assert (micro, accumulation, settings["train_batch_size"]) == (2, 4, 16)
    assert settings["gradient_clipping"] == 1.0
    assert settings["bf16"] == {"enabled": False}
    assert settings["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": False}
    assert settings["zero_optimization"]["reduce_bucket_size"] == 128 * 2**20 // 4


def test_settings_follow_precision_and_device():
    plan = a_plan(
        machine=FOUR_GPUS,
        strategy=zero(stage=2, offload_optimizer="cpu", gather_bucket_mib=1.0),
        train={"precision": "bf16", "clip_grad_norm": None},
    )
    settings = deepspeed.configuration(plan, plan.strategy)
    assert settings["bf16"] == {"enabled": True}
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["gradient_clipping"] == 0.0
    assert settings["zero_optimization"]["allgather_bucket_size"] == 2**20 // 2
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
