"""A sharded state: no worker can restore the part of another, so all go back to the snapshot, without a trace."""

import pytest
from desk import Desk, kill, pid_of
from test_faults import assert_nothing_left, assert_same_weights

from dtrain.checkpoint import store

STEPS = 160


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["strategy.name=fsdp"], id="fsdp"),
        pytest.param(["strategy.name=deepspeed", "strategy.stage=3"], id="zero3", marks=pytest.mark.slow),
    ],
)
def test_a_lost_worker_leaves_no_trace(desk: Desk, settings: list[str]) -> None:
    settings = [*settings, f"train.steps={STEPS}"]
    undisturbed, _ = desk.submit(*settings)
    assert undisturbed.record.state == "succeeded", undisturbed.record
    run, _ = desk.submit(*settings, detach=True)
    desk.until_step(run, 40)
    kill(pid_of(run, "rank-1"))
    record = desk.ended(run)
    assert record.state == "succeeded", record
    first, second = record.attempts
    assert first.failure == "killed"
    assert second.from_step >= 40
    assert second.source == "snapshot" or second.source.startswith("step-"), "a copy may have been torn"
    assert_same_weights(run, undisturbed, STEPS)
    assert_nothing_left(run)


def test_what_one_strategy_wrote_another_reads(desk: Desk) -> None:
    """The same job under fsdp and under ddp comes to the same names and shapes, and nearly the same numbers."""
    import torch
    from test_faults import weights

    one, _ = desk.submit("strategy.name=fsdp")
    two, _ = desk.submit()
    sharded, replicated = weights(one), weights(two)
    assert sharded.keys() == replicated.keys()
    for name, tensor in sharded.items():
        torch.testing.assert_close(tensor, replicated[name], rtol=1e-3, atol=1e-3)
    assert store.read_manifest(store.path_of(one.checkpoints, 60))["num_workers"] == 2
