"""Batches that are read ahead by processes of their own change nothing but the time it takes."""

import signal

from desk import Desk, kill, pid_of
from test_faults import assert_nothing_left, assert_same_weights

from dtrain.runs import Run

TWO_EACH = "train.loading.workers=2"


def test_weights_are_those_without_loaders(desk: Desk, undisturbed: Run) -> None:
    run, _ = desk.submit(TWO_EACH)
    assert run.record.state == "succeeded", run.record
    assert run.plan.train.loading.workers == 2
    assert_same_weights(run, undisturbed)
    assert run.record.outcome["metrics"] == undisturbed.record.outcome["metrics"]
    assert_nothing_left(run)


def test_a_killed_loader_costs_an_attempt_and_no_step(desk: Desk, undisturbed: Run) -> None:
    run, _ = desk.submit(TWO_EACH, "train.steps=60", detach=True)
    desk.until_step(run, 10)
    kill(pid_of(run, "loader-1-0"), signal.SIGKILL)
    record = desk.ended(run)
    assert record.state == "succeeded", record
    assert len(record.attempts) == 2
    first = record.attempts[0]
    assert first.failure == "killed"
    assert "loader-1-0, which reads data ahead, was killed by SIGKILL" in first.cause
    assert_same_weights(run, undisturbed)
    assert_nothing_left(run)
