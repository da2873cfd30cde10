"""The run folder: who owns a run, what is believed of one whose owner died, and storage that refuses."""

import fcntl
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from making import a_plan, a_run

from dtrain import runs
from dtrain.errors import ClusterError, InputError, StorageError

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def owner() -> Iterator[object]:
    """Starts processes that own a run until they are told to go; all are gone afterwards."""
    started = []

    def start(run: runs.Run) -> multiprocessing.Process:
        ready = FORK.Event()

        def drive() -> None:
            run.acquire()
            run.update(state="running", cause="under way", driver_pid=os.getpid())
            ready.set()
            time.sleep(60)

        process = FORK.Process(target=drive, daemon=True)
        process.start()
        started.append(process)
        assert ready.wait(10)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


# -- the lease ---------------------------------------------------------------------------------------------


def test_a_run_has_one_owner(tmp_path, owner):
    run = a_run(tmp_path)
    assert not run.is_owned()
    process = owner(run)
    assert run.is_owned()
    assert run.record.state == "running"
    with pytest.raises(StorageError, match="already being driven"):
        run.acquire()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    run.acquire()
    run.release()


def test_a_run_whose_owner_was_killed_is_lost_and_can_be_resumed(tmp_path, owner):
    run = a_run(tmp_path)
    process = owner(run)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    record = run.record
    assert (record.state, record.exit_code, record.error_kind) == ("lost", 5, "cluster")
    assert str(process.pid) in record.cause
    assert f"dtrain resume {run.id}" in record.cause
    assert run.stored_record().state == "running"  # reading writes nothing
    run.requeue("resumed")
    record = run.record
    assert (record.state, record.cause, record.driver_pid, record.submissions) == ("queued", "resumed", None, 2)


def test_the_lease_lives_on_in_whoever_inherits_it(tmp_path):
    run = a_run(tmp_path)
    descriptor = run.acquire()
    child = subprocess.Popen(["sleep", "60"], pass_fds=[descriptor])
    run.release()
    try:
        assert run.is_owned()
    finally:
        child.kill()
        child.wait()
    assert not run.is_owned()


def test_looking_at_a_run_never_keeps_it_from_its_owner(tmp_path):
    run = a_run(tmp_path)
    run.acquire()
    run.release()
    look = (run.path / "lease").open("r+")
    fcntl.flock(look, fcntl.LOCK_SH)  # what `is_owned` does, caught in the middle of it
    threading.Timer(0.2, look.close).start()
    run.acquire()
    run.release()


# -- between drivers ---------------------------------------------------------------------------------------


def test_a_run_that_succeeded_is_not_resumed(tmp_path):
    run = a_run(tmp_path, state="succeeded", exit_code=0)
    with pytest.raises(InputError, match="has succeeded"):
        run.requeue("resumed")
    assert run.record.submissions == 1


def test_a_run_under_way_is_not_resumed(tmp_path, owner):
    run = a_run(tmp_path)
    with pytest.raises(InputError, match="is queued"):
        run.requeue("resumed")
    owner(run)
    with pytest.raises(InputError, match="is running"):
        run.requeue("resumed")


def test_resuming_forgets_how_the_run_ended_and_keeps_its_attempts(tmp_path):
    attempt = runs.Attempt(number=1, started_at=1.0, from_step=0, source="scratch", ended_at=2.0, last_step=7)
    run = a_run(
        tmp_path, state="stopped", exit_code=130, error="x", error_kind="stopped", ended_at=2.0, attempts=(attempt,)
    )
    run.request_stop("somebody")
    run.requeue("resumed")
    record = run.record
    assert record.attempts == (attempt,)
    assert (record.exit_code, record.error, record.error_kind, record.ended_at) == (None, None, None, None)
    assert run.stop_requested is None


def test_of_two_who_resume_a_run_at_once_one_does(tmp_path):
    run = a_run(tmp_path, state="failed", exit_code=3)

    class Slower(runs.Run):
        def acquire(self, dead=None):
            runs.Run(self.path).requeue("resumed by another")
            return super().acquire(dead)

    with pytest.raises(StorageError, match="somebody else resumed run"):
        Slower(run.path).requeue("resumed")
    assert (run.record.cause, run.record.submissions) == ("resumed by another", 2)


def test_stopping_a_run_that_no_driver_has_taken_up_ends_it(tmp_path):
    run = a_run(tmp_path)
    run.ask_to_stop("me")
    assert (run.record.state, run.record.exit_code) == ("stopped", 130)
    run.ask_to_stop("me")  # twice is fine


def test_stopping_a_driven_run_leaves_its_end_to_the_driver(tmp_path, owner):
    run = a_run(tmp_path)
    owner(run)
    run.ask_to_stop("me")
    assert run.stop_requested == "me"
    assert run.record.state == "running"


def test_a_driver_that_is_just_starting_is_not_overruled(tmp_path):
    run = a_run(tmp_path)
    driver = runs.Run(run.path)
    driver.acquire()  # taken up, and not yet said so
    assert not run.end_undriven("failed", "x", ClusterError("x"))
    assert run.record.state == "queued"
    driver.release()


# -- finding -------------------------------------------------------------------------------------------------


def named(storage: Path, *names: str) -> list[runs.Run]:
    made = []
    for number, name in enumerate(names):
        run = runs.create(a_plan(storage), "", name)
        run.update(created_at=float(number))
        made.append(run)
    return made


def test_a_run_is_found_by_a_unique_start_its_last_part_or_its_folder(tmp_path):
    named(tmp_path, "gpt-small-ab12", "gpt-small-cd34", "cnn-ab99")
    assert runs.find(tmp_path, None).id == "cnn-ab99"
    assert runs.find(tmp_path, "gpt-small-a").id == "gpt-small-ab12"
    assert runs.find(tmp_path, "cd").id == "gpt-small-cd34"
    assert runs.find(tmp_path, "cn").id == "cnn-ab99"
    assert runs.find(Path("elsewhere"), str(tmp_path / "cnn-ab99")).id == "cnn-ab99"
    with pytest.raises(InputError, match="could be gpt-small-ab12, cnn-ab99; type a little more"):
        runs.find(tmp_path, "ab")
    with pytest.raises(InputError, match="did you mean 'gpt-small-cd34'"):
        runs.find(tmp_path, "gpt-smal-cd34")


def test_a_whole_name_wins_over_a_longer_one(tmp_path):
    named(tmp_path, "a-bcde", "a-bcdef")
    assert runs.find(tmp_path, "a-bcde").id == "a-bcde"


def test_no_runs_is_said_with_the_next_move(tmp_path):
    with pytest.raises(InputError, match="no runs here yet; `dtrain submit JOB`"):
        runs.find(tmp_path, None)


def test_one_unreadable_record_hides_no_other_run(tmp_path):
    good, bad = named(tmp_path, "tiny-aaaa", "tiny-bbbb")
    (bad.path / "run.json").write_text("{")
    assert {r.id for r in runs.list_runs(tmp_path)} == {"tiny-aaaa", "tiny-bbbb"}
    assert runs.find(tmp_path, None).id == good.id
    with pytest.raises(StorageError, match=r"run\.json is damaged"):
        _ = bad.record


# -- lines -----------------------------------------------------------------------------------------------------


def test_torn_and_foreign_lines_are_passed_over(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2, "tor\n\xff\xfe\n[3]\n\n{"a": 4}\n{"a": 5')
    assert [line["a"] for line in runs.read_lines(path)] == [1, 4]
    offset = [offset for offset, _ in runs.iterate_lines(path)][-1]
    with path.open("ab") as file:
        file.write(b"}\n")
    assert [line["a"] for line in runs.read_lines(path, offset)] == [5]


def test_the_last_lines_of_a_long_file_are_found_without_reading_it(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(f'{{"a": {n}}}\n' for n in range(10_000)))
    last = runs.last_lines(path, max_bytes=100)
    assert last[-1] == {"a": 9999}
    assert 2 < len(last) < 12
    assert runs.last_lines(tmp_path / "none.jsonl") == []


def test_lines_of_many_writers_are_never_mixed(tmp_path):
    run = a_run(tmp_path)

    def write(who: int) -> None:
        for step in range(200):
            run.metric(who=who, step=step, filler="x" * 500)

    writers = [FORK.Process(target=write, args=(who,)) for who in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = run.metrics()
    assert sorted((line["who"], line["step"]) for line in lines) == [(w, s) for w in range(3) for s in range(200)]


# -- the record --------------------------------------------------------------------------------------------------


def test_every_change_of_state_is_an_event_with_its_cause(tmp_path):
    run = a_run(tmp_path)
    run.update(state="starting", cause="a driver")
    run.update(num_workers=3)
    run.update(state="running", cause="2 workers")
    states = [(e["before"], e["state"], e["cause"]) for e in run.events() if e["event"] == "state"]
    assert states == [
        (None, "queued", "submitted"),
        ("queued", "starting", "a driver"),
        ("starting", "running", "2 workers"),
    ]


def test_a_reader_sees_whole_records_only(tmp_path):
    run = a_run(tmp_path)

    def write() -> None:
        for n in range(150):
            run.update(cause="x" * (n * 50))

    writer = FORK.Process(target=write)
    writer.start()
    looks = 0
    while writer.is_alive():
        assert set(run.stored_record().cause) <= set("x" + "submitted")
        looks += 1
    writer.join()
    assert looks > 10
    assert [p.name for p in run.path.glob(".run.json*")] == []


# -- storage that refuses --------------------------------------------------------------------------------------------


def test_storage_that_is_a_file_is_refused_with_the_next_move(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot be written.*--set cluster.storage=FOLDER"):
        runs.create(a_plan(tmp_path / "file" / "runs"), "")


def test_storage_without_permission_is_refused(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        runs.create(a_plan(tmp_path / "runs"), "")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    where = tmp_path / "small"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(where)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("may not mount a small file system here, so a full disk was not tried")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_a_full_disk_refuses_new_runs_and_leaves_nothing_behind(small_disk):
    (small_disk / "filler").write_bytes(b"x" * (64 * 1024 - 4096))
    with pytest.raises(StorageError, match="No space left on device"):
        runs.create(a_plan(small_disk), "")
    assert [p.name for p in small_disk.iterdir()] == ["filler"]


def test_a_disk_that_fills_up_loses_lines_and_keeps_the_record(small_disk):
    run = a_run(small_disk)
    run.metric(step=1)
    with (small_disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"x" * 4096)
    before = run.stored_record()
    for step in range(2, 100):
        run.metric(step=step, filler="x" * 4096)  # no error: the run goes on
    with pytest.raises(StorageError, match="No space left on device"):
        run.update(cause="x" * 100_000)
    assert run.stored_record() == before
    assert run.metrics()[0]["step"] == 1
    (small_disk / "filler").unlink()
    run.metric(step=100)
    assert run.metrics()[-1]["step"] == 100
    assert run.update(cause="goes on").cause == "goes on"
