"""A cluster that is just starting: its first run begins before Ray is there, and still comes before all others."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from desk import Desk

from dtrain.backends import local
from dtrain.machine import probe
from dtrain.runs import Run

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def cold():
    root = Path(tempfile.mkdtemp(prefix="dt-"))
    desk = Desk(root)
    try:
        yield desk
    finally:
        desk.dtrain("cluster", "down", "-c", str(desk.cluster), check=False)
        shutil.rmtree(root, ignore_errors=True)


def test_the_second_run_of_a_cold_cluster_waits_for_the_first(cold):
    every_core = f"cluster.workers_per_node={min(probe().num_cores, 2)}"
    cold.submit(every_core, "train.steps=150", "evaluate.every_steps=null", "name=first", detach=True)
    cold.submit(every_core, "train.steps=4", "name=second", detach=True)
    first, second = (Run(next(cold.storage.glob(f"{name}-*"))) for name in ("first", "second"))
    assert cold.ended(first, 120).state == "succeeded"
    assert cold.ended(second, 120).state == "succeeded"
    assert second.record.started_at > first.record.ended_at


def test_a_head_that_dies_while_it_starts_ends_the_run_with_a_reason(cold):
    run, _ = cold.submit("train.steps=100000", detach=True)
    os.kill(local.cluster_status(cold.options)["pid"], signal.SIGKILL)
    record = cold.ended(run, 60)
    assert (record.state, record.error_kind) == ("failed", "cluster")
    assert "is gone" in record.cause
