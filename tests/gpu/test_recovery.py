"""A worker that is killed in the middle of computing on a GPU: a new one goes on from the snapshot in host memory."""

import os
import signal
import time
from pathlib import Path

import pytest
from node import Node, needs_gpu

from dtrain.checkpoint.shared_memory import FOLDER, prefix
from dtrain.runs import Run

JOB = Path(__file__).resolve().parents[1] / "ray" / "job.yaml"
SETTINGS = ("train.steps=400", "evaluate.every_steps=null", "checkpoint.every_steps=null", "model.dropout=0")
KILL_AT = 100

pytestmark = needs_gpu


def rank_of(run: Run) -> int:
    """Pid of the run's only rank: what writes to its log under that name."""
    log = str(run.logs / "rank-0.log")
    for entry in Path("/proc").iterdir():
        try:
            is_rank = entry.name.isdigit() and (entry / "comm").read_text().strip() == "rank-0"
            if is_rank and os.readlink(entry / "fd" / "1") == log:
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError("there is no rank")


def kill_after(step: int):
    def meddle(run: Run) -> None:
        deadline = time.monotonic() + 600
        while not any(line.get("step", 0) >= step for line in run.metrics()):
            assert time.monotonic() < deadline, "the run comes to nothing"
            time.sleep(0.005)
        os.kill(rank_of(run), signal.SIGKILL)

    return meddle


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_worker_is_replaced_and_learns_the_same(strategy: str) -> None:
    import torch

    with Node() as node:
        plan = node.plan(JOB, f"strategy.name={strategy}", *SETTINGS)
        assert plan.workers.device == "cuda"
        undisturbed, killed = node.run(plan), node.run(plan, kill_after(KILL_AT))
        first, second = killed.attempts
        assert first["failure"] == "killed"
        assert second["source"] == "snapshot", "all of the state was in the host's memory"
        assert KILL_AT - plan.checkpoint.snapshot_every_steps <= second["from_step"] < 400
        one, two = undisturbed.weights(), killed.weights()
        assert one.keys() == two.keys()
        # Kernels that add in any order may leave the last digits to chance; a lost step would show in the second.
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, atol=2e-3, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        losses = [ended.outcome["outcome"]["metrics"]["loss"] for ended in (undisturbed, killed)]
        assert losses[0] == pytest.approx(losses[1], abs=0.01)
        assert not list(FOLDER.glob(f"{Path(prefix(killed.run.path, 0)).name}-*")), "shared memory is given back"
