"""A Ray cluster somewhere, a bucket somewhere: one run goes through everything that can happen to its driver there."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from s3_server import Server, served

from dtrain import runs
from dtrain.backends import ray_jobs
from dtrain.checkpoint import remote, store
from dtrain.checkpoint.shared_memory import FOLDER
from dtrain.runs import Record, Run
from dtrain.runs.away import RemoteRun
from dtrain.runtime.own_folder import GOING, base

HERE = Path(__file__).parent
PATIENCE_S = 240.0


class Away:
    """Somebody at a terminal, with a cluster file."""

    def __init__(self, folder: Path, dashboard: str, s3: Server, num_cpus: int) -> None:
        self.place = f"s3://{s3.bucket}/runs"
        self.options = ray_jobs.Options(address=dashboard, python=sys.executable)
        self.cluster = folder / "cluster.yaml"
        machine = f"machine: {{cores: {num_cpus}, memory_gib: 4}}"
        backend = f"{{name: ray_jobs, address: '{dashboard}', python: {sys.executable}, {machine}}}"
        words = f"name: away\nbackend: {backend}\ndevice: cpu\nstorage: {self.place}\n"
        self.cluster.write_text(words)

    def dtrain(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dtrain", *words, "-c", str(self.cluster)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done

    def until(self, run: Run, condition: Callable[[Record], Any], patience_s: float = PATIENCE_S) -> Record:
        deadline = time.monotonic() + patience_s
        while not condition(record := run.stored_record()):
            if time.monotonic() > deadline or record.ended:
                raise AssertionError(self.story(run))
            time.sleep(0.2)
        return record

    def story(self, run: Run) -> str:
        run.refresh("logs/")
        logs = [f"{p.name}:\n{p.read_text(errors='replace')[-2000:]}" for p in run.logs.glob("*.log")]
        job = b"".join(ray_jobs.logs(run.id, self.options, "driver", False)).decode()[-3000:]
        return "\n".join([str(run.stored_record()), *map(str, run.events()), *logs, f"job:\n{job}"])


@contextmanager
def cluster(num_nodes: int, num_cpus: int) -> Iterator[Away]:
    with tempfile.TemporaryDirectory(prefix="dt-") as name, served() as s3:
        folder = Path(name)
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        command = [sys.executable, str(HERE / "ray_head.py"), str(folder / "ray"), str(num_nodes), str(num_cpus)]
        with (folder / "err").open("wb") as err:
            pipe = subprocess.PIPE
            head = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=err, text=True, env=environment)
        try:
            assert head.stdout is not None
            dashboard = head.stdout.readline().strip()
            assert dashboard, (folder / "err").read_text()[-3000:]
            yield Away(folder, dashboard, s3, num_cpus)
        finally:
            head.communicate(timeout=60)  # it ends with its standard input


@pytest.fixture
def away() -> Iterator[Away]:
    with cluster(num_nodes=1, num_cpus=2) as made:
        yield made


@pytest.fixture
def two_nodes() -> Iterator[Away]:
    with cluster(num_nodes=2, num_cpus=1) as made:
        yield made


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_write_and_read_the_parts_of_one_checkpoint(two_nodes: Away) -> None:
    """Sharded over nodes that see nothing of each other's folders; then one loses its agent, and with it its half."""
    away = two_nodes
    words = ["cluster.nodes=2", "cluster.workers_per_node=1", "strategy.name=fsdp", "train.steps=3000"]
    words += ["checkpoint.every_steps=40", "evaluate.every_steps=3000", "retry.hang_timeout_s=60"]
    name = away.dtrain("submit", str(HERE / "job.yaml"), "-d", *(f"--set={word}" for word in words)).stdout.strip()
    run = runs.find(away.place, name)
    assert isinstance(run, RemoteRun)
    away.until(run, lambda r: r.state == "running" and remote.steps(run.storage, run.id))
    (agent,) = [pid for pid in _named("agent-1") if f"-1/{run.id}" in _files_of(pid)]
    os.kill(agent, signal.SIGKILL)
    record = away.until(run, lambda r: len(r.attempts) == 2 and r.state == "running")
    assert record.attempts[0].failure == "agent"
    assert record.attempts[1].source.startswith("step-")
    away.dtrain("stop", run.id)
    record = run.stored_record()
    assert record.state == "stopped", away.story(run)
    newest = remote.steps(run.storage, run.id)[-1]
    assert newest > record.attempts[1].from_step
    run.fetch_checkpoint(f"step-{newest:08d}")
    manifest = store.verify(run.checkpoints / f"step-{newest:08d}")
    assert sum(file.endswith(".distcp") for file in manifest["files"]) == 2
    for rank in ("0", "1"):
        assert "--- attempt 2, from step" in away.dtrain("logs", run.id, "--rank", rank).stdout
    _nothing_is_left(run)


def _named(name: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if path.read_text().strip() == name:
                found.append(int(path.parent.name))
    return found


def _files_of(pid: int) -> str:
    with suppress(OSError):
        return " ".join(os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir())
    return ""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_outlives_its_node_its_driver_and_a_driver_that_only_slept(away: Away) -> None:
    settings = ["cluster.workers_per_node=2", "retry.hang_timeout_s=60"]
    settings += ["train.steps=1200", "checkpoint.every_steps=50", "evaluate.every_steps=600"]
    name = away.dtrain("submit", str(HERE / "job.yaml"), "-d", *(f"--set={word}" for word in settings)).stdout.strip()
    run = runs.find(away.place, name)
    assert isinstance(run, RemoteRun)
    first = away.until(run, lambda r: r.state == "running" and r.latest)
    assert json.loads(away.dtrain("ps", "--json").stdout)[0]["state"] == "running"

    # Its node goes away: a checkpoint, and on.
    subprocess.run([sys.executable, "-m", "dtrain.runtime.preempted", "--within", "0.1"], check=False)
    try:
        away.until(run, lambda r: r.state == "recovering" and "goes away" in r.cause)
    finally:
        (base() / GOING).unlink()
    moved = away.until(run, lambda r: len(r.attempts) == 2 and r.state == "running")
    assert (moved.driver_pid, moved.submissions) == (first.driver_pid, 1)
    assert moved.attempts[1].from_step > 0
    assert moved.attempts[0].failure is None, "no failure, and none is counted"

    # Its driver is killed.
    assert moved.driver_pid is not None
    _logged(away, run, 2)
    os.kill(moved.driver_pid, signal.SIGKILL)
    _handed_over(away, run)
    again = away.until(run, lambda r: r.driver_pid not in (None, moved.driver_pid) and r.state == "running")
    assert again.submissions == 2
    assert again.attempts[-1].source.startswith("step-")
    assert again.attempts[-1].from_step >= moved.attempts[1].from_step
    assert [a.number for a in again.attempts] == [1, 2, 3]

    # Its driver only slept, and was believed dead.
    assert again.driver_pid is not None
    _logged(away, run, 3)
    os.kill(again.driver_pid, signal.SIGSTOP)
    assert RemoteRun(run.storage, run.id).put_back("it was believed dead", again)
    os.kill(again.driver_pid, signal.SIGCONT)
    deadline = time.monotonic() + PATIENCE_S
    while not (sight := ray_jobs.look(run.id, away.options)) or not sight.is_over:
        assert time.monotonic() < deadline, away.story(run)
        time.sleep(0.2)
    assert "exit code 5" in sight.why
    untaken = run.stored_record()
    assert (untaken.state, untaken.driver_pid, untaken.submissions) == ("queued", None, 3)

    # It goes on, and is followed to its end.
    ray_jobs.send(ray_jobs.render(run.plan, Path(run.id)), away.options, print)
    followed = away.dtrain("status", run.id, "-f")
    record = run.stored_record()
    assert record.state == "succeeded", away.story(run)
    assert "succeeded" in followed.stdout
    assert record.outcome["steps"] == 1200
    assert max(line["step"] for line in run.metrics()) == 1200
    assert sum(event["event"] == "driver-lost" for event in run.events()) == 2, "once for each loss"
    assert remote.steps(run.storage, run.id)[-1] == 1200
    run.fetch_checkpoint("step-00001200")
    store.verify(run.checkpoints / "step-00001200")
    logs = away.dtrain("logs", run.id, "--rank", "0").stdout
    assert all(f"--- attempt {number}, from step" in logs for number in (1, 2, 3, 4))
    assert len(away.dtrain("sample", run.id, "--length", "20", "--temperature", "0").stdout) > 5
    assert run.id in away.dtrain("stop", run.id).stdout
    _nothing_is_left(run)


def _logged(away: Away, run: Run, attempt: int) -> None:
    """What is killed a moment after it has printed something takes that along: logs are carried every two seconds."""
    deadline = time.monotonic() + PATIENCE_S
    while f"--- attempt {attempt}, from step" not in away.dtrain("logs", run.id, "--rank", "0").stdout:
        assert time.monotonic() < deadline, away.story(run)


def _handed_over(away: Away, run: Run) -> None:
    """The cluster takes a moment to see that a driver is gone."""
    deadline = time.monotonic() + PATIENCE_S
    while f"{run.id}: " not in (said := away.dtrain("supervise", "--once").stderr):
        assert time.monotonic() < deadline, said
    assert "again" in said


def _nothing_is_left(run: Run) -> None:
    deadline = time.monotonic() + 30
    while left := [*_processes_of(run.id), *base().glob(f"runs/*/{run.id}"), *_memory_of(run.id)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def _processes_of(run_id: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if run_id in words and int(path.parent.name) != os.getpid():
            found.append(words)
    return found


def _memory_of(run_id: str) -> list[Path]:
    owners = FOLDER.glob(f"dtrain-{os.getuid()}-*-owner")
    return [owner for owner in owners if owner.read_text().endswith(f"/{run_id}")]
