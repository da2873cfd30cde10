"""Several nodes: Ray Train places one agent on each, the agents agree about every attempt, a lost one is replaced."""

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from desk import kill, pid_of

from dtrain.checkpoint import store
from dtrain.runs import Record, Run


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param([], id="ddp", marks=pytest.mark.slow),
        pytest.param(["strategy.name=fsdp", "checkpoint.every_steps=40"], id="fsdp"),
    ],
)
def test_two_nodes_lose_a_worker_and_then_an_agent(settings: list[str]) -> None:
    """Under fsdp each node holds half of the state: it is in both snapshots, and both write each checkpoint."""
    with tempfile.TemporaryDirectory(prefix="dt-") as folder:
        storage = Path(folder)
        with (storage / "out").open("wb") as out:
            command = [sys.executable, str(Path(__file__).parent / "two_nodes.py"), folder, *settings]
            launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=out, text=True)
        try:
            _follow(launcher, storage, is_sharded=bool(settings))
        finally:
            if launcher.poll() is None:
                launcher.send_signal(signal.SIGINT)  # it takes its cluster down
            launcher.communicate(timeout=60)


def _follow(launcher: "subprocess.Popen[str]", storage: Path, *, is_sharded: bool) -> None:
    assert launcher.stdout is not None
    run = Run(Path(launcher.stdout.readline().strip()))
    assert run.path.parent == storage, (storage / "out").read_text()[-3000:]
    _until(run, lambda record: record.state == "running" and bool(run.metrics()), 120)
    assert run.record.num_workers == 2
    if is_sharded:
        _until(run, lambda record: bool(store.steps(run.checkpoints)), 60)
    kill(pid_of(run, "rank-1"))
    _until(run, lambda record: len(record.attempts) == 2 and record.state == "running", 30)
    first, second = run.record.attempts
    assert first.failure == "killed"
    assert "rank 1 was killed by SIGKILL" in (first.cause or "")
    if not is_sharded or not second.source.startswith("step-"):  # its two halves may be of different steps
        assert second.source == "snapshot"
    assert second.from_step > 0
    kill(pid_of(run, "agent-1"))
    _until(run, lambda record: len(record.attempts) == 3 and record.state == "running", 120)
    *_, lost, third = run.record.attempts
    assert lost.failure == "agent"
    if is_sharded:
        # What the lost node held is gone with it.
        assert third.source.startswith("step-")
        assert third.from_step > 0
    else:
        assert third.from_step >= second.from_step
    run.request_stop("the test")
    record = _until(run, lambda record: record.ended, 60)
    assert record.state == "stopped", record
    newest = max(store.steps(run.checkpoints))
    manifest = store.verify(store.path_of(run.checkpoints, newest))
    assert f"checkpoint of step {newest}" in record.cause
    assert sum(name.endswith(".distcp") for name in manifest["files"]) == (2 if is_sharded else 1)


def _until(run: Run, condition, timeout: float) -> Record:
    deadline = time.monotonic() + timeout
    while not condition(record := run.record):
        said = "\n".join(p.read_text()[-2000:] for p in [*run.logs.glob("*.log"), run.path.parent / "out"])
        assert not record.ended, (record, said)
        assert time.monotonic() < deadline, (record, run.events(), said)
        time.sleep(0.05)
    return record
