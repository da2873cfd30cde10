"""Every failure of the first level: the run ends well or with a typed error, and the weights tell of none of it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from desk import JOB, Desk, kill, pid_of

from dtrain.backends import local
from dtrain.checkpoint import store
from dtrain.checkpoint.shared_memory import FOLDER, prefix
from dtrain.runs import Run


@pytest.fixture(autouse=True)
def no_fault_is_left(desk: Desk) -> Iterator[None]:
    yield
    for path in desk.faults.iterdir():
        path.unlink()


def weights(run: Run, step: int = 60) -> dict:
    import torch
    from torch.distributed.checkpoint import FileSystemReader

    path = store.path_of(run.checkpoints, step)
    store.verify(path)
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.zeros(m.size, dtype=m.properties.dtype) for name, m in metadata.items()}
    store.read_into(path, tensors)
    return tensors


def assert_same_weights(run: Run, other: Run, step: int = 60) -> None:
    import torch

    one, two = weights(run, step), weights(other, step)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert any(tensor.abs().sum() > 0 for tensor in one.values())


def assert_nothing_left(run: Run) -> None:
    """Soon: whoever cleans up may share the machine with much else."""
    base = Path(prefix(run.path, 0)).name
    deadline = time.monotonic() + 30

    def left() -> list[str]:
        held = ["the run's lease"] if run.is_owned() else []
        return [*(p.name for p in FOLDER.glob(base + "*")), *map(str, _processes_of(run)), *held]

    while left() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left() == []


def _processes_of(run: Run) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                links = [os.readlink(link) for link in (entry / "fd").iterdir()]
                if any(link.startswith(str(run.path)) for link in links):
                    found.append((entry / "comm").read_text().strip())
            except OSError:
                continue
    return found


def test_an_undisturbed_run_succeeds(desk: Desk, undisturbed: Run) -> None:
    record = undisturbed.record
    assert record.exit_code == 0
    assert len(record.attempts) == 1
    assert record.outcome["checkpoint"] == "step-00000060"
    assert {"loss", "bits_per_byte"} <= record.outcome["metrics"].keys()
    assert "gzip -9" in record.outcome["yardsticks"]["bits_per_byte"]
    assert record.outcome["sample"]
    assert store.steps(undisturbed.checkpoints) == [20, 40, 60]
    steps = [line["step"] for line in undisturbed.metrics() if "loss" in line]
    assert steps == list(range(5, 61, 5))
    assert_nothing_left(undisturbed)


@pytest.mark.parametrize(
    ("what", "failure", "cause"),
    [
        ("kill", "killed", "rank 1 was killed by SIGKILL"),
        ("segfault", "killed", "rank 1 was killed by SIGSEGV"),
        ("exit", "exited", "rank 1 left with exit code 0"),
        ("hang", "hung", "rank 1 hung reading data in step 33"),
        ("stop", "hung", "rank 1 was stopped by a signal"),
    ],
)
def test_a_lost_worker_is_replaced_without_a_trace(
    desk: Desk, undisturbed: Run, what: str, failure: str, cause: str
) -> None:
    desk.fault(what, batch=33)
    run, done = desk.submit()
    record = run.record
    assert record.state == "succeeded", (record, done.stdout)
    first, second = record.attempts
    assert first.failure == failure
    assert cause in (first.cause or "")
    assert (second.from_step, second.source) == (32, "snapshot"), "the survivor's state is one step old at most"
    assert_same_weights(run, undisturbed)
    assert_nothing_left(run)


def test_a_hung_worker_says_where_it_is(desk: Desk) -> None:
    desk.fault("hang", batch=10)
    run, _ = desk.submit("train.steps=20")
    assert run.record.state == "succeeded"
    assert "in strike" in (run.logs / "rank-1.log").read_text()


def test_all_workers_lost_at_once(desk: Desk, undisturbed: Run) -> None:
    desk.fault("kill", batch=33, rank=0)
    desk.fault("kill", batch=33, rank=1)
    run, _ = desk.submit()
    record = run.record
    assert record.state == "succeeded", record
    second = record.attempts[1]
    assert second.source == "snapshot"
    assert 20 <= second.from_step <= 32, "the last snapshot that did not meet the writer, or a state saved in time"
    assert_same_weights(run, undisturbed)


def test_workers_lost_in_the_last_evaluation(desk: Desk, undisturbed: Run) -> None:
    desk.fault("kill", batch=3, rank=0, of="held_out")
    desk.fault("kill", batch=3, rank=1, of="held_out")
    run, _ = desk.submit("evaluate.every_steps=null")
    record = run.record
    assert record.state == "succeeded", record
    assert [a.from_step for a in record.attempts] == [0, 60]
    assert record.outcome["metrics"] == undisturbed.record.outcome["metrics"]
    assert_same_weights(run, undisturbed)


def test_an_error_of_the_user_stops_at_once_with_the_users_traceback(desk: Desk) -> None:
    desk.fault("raise", batch=12)
    run, done = desk.submit(check=False)
    record = run.record
    assert done.returncode == record.exit_code == 3
    assert record.error_kind == "training"
    assert len(record.attempts) == 1
    assert "rank 1, step 12: ValueError: sample 12 is bad" in record.cause
    assert "bad_sample" in record.error
    for wrapping in ("site-packages", "dtrain/training/loop.py", "dtrain/runtime"):
        assert wrapping not in record.error
    assert "sample 12 is bad" in done.stdout + done.stderr
    assert_nothing_left(run)


def test_a_loss_that_is_not_a_number_stops_with_advice(desk: Desk) -> None:
    run, done = desk.submit(
        "optimizer.name=sgd", "optimizer.lr=1000", "train.clip_grad_norm=null", "schedule.name=constant", check=False
    )
    assert done.returncode == 3
    assert run.record.error_kind == "training"
    assert "lower optimizer.lr" in run.record.cause


def test_a_worker_that_always_dies_ends_the_run_in_time(desk: Desk) -> None:
    desk.fault("exit", batch=10)
    run, done = desk.submit("retry.exited=0", check=False)
    assert done.returncode == 4
    assert run.record.error_kind == "retries-exhausted"
    assert "retry.exited allows 0" in run.record.cause
    assert store.steps(run.checkpoints), "the state of the last snapshot is on storage all the same"


def test_the_agent_killed(desk: Desk, undisturbed: Run) -> None:
    desk.fault("hang", batch=33)
    run, _ = desk.submit("retry.hang_timeout_s=60", detach=True)
    desk.until_step(run, 30)
    kill(pid_of(run, "agent-0"))
    record = desk.ended(run)
    assert record.state == "succeeded", (record, run.events())
    assert record.attempts[0].failure == "agent"
    assert_same_weights(run, undisturbed)
    assert_nothing_left(run)


def test_the_driver_killed(desk: Desk, undisturbed: Run) -> None:
    run, _ = desk.submit("train.steps=600", detach=True)
    desk.until_step(run, 30)
    driver = run.record.driver_pid
    assert driver is not None
    kill(driver)
    record = desk.until(run, lambda r: r.driver_pid not in (None, driver) and r.state == "running")
    assert record.submissions == 2
    assert record.attempts[-1].from_step >= 30
    assert "the driver is gone" in desk.tell(run, "driver-lost")[0]
    desk.dtrain("stop", run.id, "--storage", str(desk.storage))
    assert_nothing_left(run)


def test_the_command_killed_changes_nothing(desk: Desk, undisturbed: Run) -> None:
    command = [sys.executable, "-m", "dtrain", "submit", str(JOB), "-c", str(desk.cluster)]
    terminal = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    from dtrain import runs

    before = len(runs.list_runs(desk.storage))
    while len(runs.list_runs(desk.storage)) == before:
        time.sleep(0.02)
    run = runs.list_runs(desk.storage)[-1]
    desk.until_step(run, 10)
    os.killpg(terminal.pid, signal.SIGKILL)
    terminal.communicate()
    record = desk.ended(run)
    assert record.state == "succeeded"
    assert_same_weights(run, undisturbed)


def test_stop_and_resume(desk: Desk) -> None:
    # Long enough not to be over before `dtrain stop` has come up.
    settings = ["checkpoint.every_steps=5000", "train.steps=500", "evaluate.every_steps=500"]
    undisturbed, _ = desk.submit(*settings)
    run, _ = desk.submit(*settings, detach=True)
    desk.until_step(run, 10)
    stopped = desk.dtrain("stop", run.id, "--storage", str(desk.storage))
    record = run.record
    assert record.state == "stopped", (record, stopped.stdout)
    assert record.exit_code == 130
    (step,) = store.steps(run.checkpoints)
    assert 10 <= step < 500
    again = desk.dtrain("stop", run.id, "--storage", str(desk.storage))
    assert again.returncode == 0
    desk.dtrain("resume", run.id, "--storage", str(desk.storage))
    record = run.record
    assert record.state == "succeeded"
    assert record.attempts[-1].source == f"step-{step:08d}"
    assert_same_weights(run, undisturbed, 500)


def test_a_damaged_checkpoint_is_passed_over(desk: Desk, undisturbed: Run) -> None:
    run, _ = desk.submit("train.steps=600", detach=True)
    desk.until_step(run, 45)
    desk.dtrain("stop", run.id, "--storage", str(desk.storage))
    *_, good, bad = store.steps(run.checkpoints)
    shard = max(store.path_of(run.checkpoints, bad).glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    desk.dtrain("resume", run.id, "--storage", str(desk.storage), "--detach")
    desk.until(run, lambda r: r.state == "running")
    (rejected,) = desk.tell(run, "checkpoint-rejected")
    assert shard.name in rejected
    assert f"step-{bad:08d}" in rejected
    assert run.record.attempts[-1].source == f"step-{good:08d}"
    desk.dtrain("stop", run.id, "--storage", str(desk.storage))


def test_a_full_disk_while_checkpointing(desk: Desk) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = desk.root / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let us mount a small file system")
    try:
        words = ["submit", str(JOB), "-c", str(desk.cluster), "--detach", "--set", "train.steps=100000"]
        desk.dtrain(*words, "--set", f"cluster.storage={small}")
        from dtrain import runs

        (run,) = runs.list_runs(small)
        desk.until(run, lambda r: bool(desk.tell(run, "checkpoint-failed")))
        assert "No space left on device" in desk.tell(run, "checkpoint-failed")[0]
        assert run.record.state == "running", "training goes on"
        step = max(store.steps(run.checkpoints))
        store.verify(store.path_of(run.checkpoints, step))
        for extra in store.steps(run.checkpoints)[:-1]:
            shutil.rmtree(store.path_of(run.checkpoints, extra))
        desk.dtrain("stop", run.id, "--storage", str(small))
        assert run.record.state == "stopped"
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_runs_wait_their_turn(desk: Desk) -> None:
    first, _ = desk.submit("train.steps=2000", detach=True)
    desk.until(first, lambda r: r.state == "running")
    second, _ = desk.submit("train.steps=20", detach=True)
    record = desk.until(second, lambda r: "waiting for" in r.cause and "CPU" in r.cause)
    assert record.state == "queued"
    assert "other runs hold them" in record.cause
    desk.dtrain("stop", first.id, "--storage", str(desk.storage))
    assert desk.ended(second).state == "succeeded"
    starts = second.record.attempts[0].started_at
    assert starts >= first.record.ended_at - 1


def test_a_corpus_that_is_not_there(desk: Desk) -> None:
    run, done = desk.submit("data.source=/nowhere/corpus.txt", check=False)
    assert done.returncode == 2
    assert run.record.error_kind == "input"
    assert "/nowhere/corpus.txt" in run.record.cause
    assert "Traceback" not in done.stdout + done.stderr


def test_more_workers_than_cores(desk: Desk) -> None:
    run, done = desk.submit("cluster.workers_per_node=4", "train.steps=20")
    assert run.record.state == "succeeded"
    assert run.record.num_workers == 4
    assert "slower" in done.stdout + done.stderr


def test_driver_and_agent_killed_together(desk: Desk, undisturbed: Run) -> None:
    run, _ = desk.submit("train.steps=3000", detach=True)
    desk.until_step(run, 45)
    agent, driver = pid_of(run, "agent-0"), run.record.driver_pid
    assert driver is not None
    os.kill(agent, signal.SIGSTOP)  # so that it cannot put the state on storage when the driver goes
    kill(driver)
    kill(agent)
    assert_nothing_left(run)
    record = run.record
    assert (record.state, record.exit_code) == ("lost", 5)
    assert f"dtrain resume {run.id}" in record.cause
    newest = max(store.steps(run.checkpoints))
    desk.dtrain("resume", run.id, "--storage", str(desk.storage), "--detach")
    record = desk.until(run, lambda r: r.state == "running")
    assert record.attempts[-1].source == f"step-{newest:08d}"
    desk.dtrain("stop", run.id, "--storage", str(desk.storage))


def test_the_zygote_killed(desk: Desk, undisturbed: Run) -> None:
    desk.fault("hang", batch=33)
    run, _ = desk.submit("retry.hang_timeout_s=60", detach=True)
    desk.until_step(run, 30)
    zygote = int((local._Home(desk.options).folder / "zygote.pid").read_text())
    kill(zygote)
    record = desk.ended(run)
    assert record.state == "succeeded", (record, run.events())
    assert record.attempts[0].failure == "killed"
    assert_same_weights(run, undisturbed)
    assert_nothing_left(run)


def test_the_head_gone_is_said_in_seconds_and_the_run_resumes(desk: Desk) -> None:
    run, _ = desk.submit("train.steps=3000", detach=True)
    desk.until_step(run, 10)
    head = local.cluster_status(desk.options)["pid"]
    began = time.monotonic()
    os.killpg(head, signal.SIGKILL)
    record = desk.ended(run, timeout=30)
    assert time.monotonic() - began < 30, "seconds, not minutes"
    assert (record.state, record.error_kind, record.exit_code) == ("failed", "cluster", 5)
    assert "Ray head" in record.cause
    assert f"dtrain resume {run.id}" in record.cause
    step = max(store.steps(run.checkpoints))
    desk.dtrain("resume", run.id, "--storage", str(desk.storage), "--detach")
    record = desk.until(run, lambda r: r.state == "running")
    assert record.attempts[-1].from_step == step
    desk.dtrain("stop", run.id, "--storage", str(desk.storage))
    assert_nothing_left(run)


def test_nothing_waits_for_a_head_that_is_gone(desk: Desk) -> None:
    desk.submit("train.steps=5")
    desk.dtrain("cluster", "down", "-c", str(desk.cluster))
    folder = str(local._Home(desk.options).folder).encode()
    deadline = time.monotonic() + 10
    while left := [p for p in Path("/proc").glob("[0-9]*/cmdline") if folder in _read(p)]:
        assert time.monotonic() < deadline, [_read(p) for p in left]
        time.sleep(0.05)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
