"""Runs whose folder lives in a bucket: made, listed, found, read, stopped and handed on from anywhere."""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from making import TWO_CORES, a_cluster, a_job
from msgspec.structs import replace
from s3_server import Status

from dtrain import api, bundle, handshake, runs
from dtrain.errors import InputError, RetriesExhausted, StorageError
from dtrain.planning import make_plan
from dtrain.runs import away
from dtrain.runs.away import RemoteRun
from dtrain.runs.growing import PIECE_BYTES, Growing, piece
from dtrain.runtime import carrier as carrier_module
from dtrain.runtime import remote
from dtrain.runtime.carrier import MAX_ECHO, Carrier
from dtrain.runtime.on_node import OnNode
from dtrain.runtime.remote import OnHead
from dtrain.settings import to_json
from dtrain.sight import Sight
from dtrain.storage import Conflict, at
from dtrain.storage.fencing import Fenced
from dtrain.storage.lease import Lease, standing
from dtrain.view import logs, tables


@pytest.fixture
def place(s3):
    return f"s3://{s3.bucket}/team/runs"


def a_plan(place: str):
    return make_plan(a_job(), a_cluster(backend={"name": "ray_jobs"}, storage=place), TWO_CORES)


def a_run(place: str, name: str | None = None, **record) -> RemoteRun:
    run = runs.create(a_plan(place), "name: tiny\n", name)
    assert isinstance(run, RemoteRun)
    if record:
        run.update(**record)
    return run


def everybody(run: RemoteRun) -> RemoteRun:
    """The same run, as another process would see it."""
    return RemoteRun(run.storage, run.id)


# -- made, listed, found -----------------------------------------------------------------------------------------


def test_a_run_is_made_and_found_by_name_and_by_uri(place):
    first = a_run(place, "tiny-aaaa", created_at=1.0)
    second = a_run(place, "tiny-bbbb", created_at=2.0)
    assert [run.id for run in runs.list_runs(place)] == ["tiny-aaaa", "tiny-bbbb"]
    assert runs.find(place, None).id == second.id
    assert runs.find(place, "aa").id == first.id
    found = runs.find("elsewhere", f"{place}/tiny-aaaa")
    assert (found.where, found.plan.storage) == (f"{place}/tiny-aaaa", place)
    assert found.record.state == "queued"
    assert [event["state"] for event in found.events()] == ["queued"]
    with pytest.raises(InputError, match="no run is called"):
        runs.find(place, "cc")
    with pytest.raises(StorageError, match="is there already"):
        runs.create(a_plan(place), "", "tiny-aaaa")


def test_what_is_no_run_is_not_listed_and_one_unreadable_record_hides_no_other(place):
    good, bad = a_run(place, "tiny-aaaa"), a_run(place, "tiny-bbbb")
    at(place).write("code/0123.tar.gz", b"code")
    at(place).write("tiny-bbbb/run.json", b"{")
    assert [run.id for run in runs.list_runs(place)] == [bad.id, good.id]
    with pytest.raises(StorageError, match=r"run\.json is damaged"):
        _ = everybody(bad).record


def test_a_listing_asks_for_every_record_once(s3, place):
    record = a_run(place).stored_record()
    names = [f"tiny-{number:04d}" for number in range(39)]
    texts = {name: to_json(replace(record, id=name)).encode() for name in names}
    s3.put({f"team/runs/{name}/run.json": text for name, text in texts.items()})
    s3.requests.clear()
    listed = runs.list_runs(place)
    rows = [tables.facts(run) for run in listed]
    assert len(rows) == 40
    assert all(row["state"] == "queued" and row["path"].startswith(place) for row in rows)
    records = [request for request in s3.requests if "run.json" in request]
    assert len(records) == 40
    assert len(s3.requests) - len(records) <= 2, "one listing"


def test_a_thousand_runs_in_a_folder_are_listed_within_two_seconds_of_a_core(tmp_path):
    plan = make_plan(a_job(), a_cluster(storage=str(tmp_path)), TWO_CORES)
    record = json.loads((runs.create(plan, "", "tiny-0000").path / "run.json").read_text())
    for number in range(1, 1000):
        folder = tmp_path / f"tiny-{number:04d}"
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({**record, "id": folder.name, "created_at": float(number)}))
        (folder / "metrics.jsonl").write_text('{"step": 7, "loss": 1.5}\n')
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "dtrain", "ps", "--storage", str(tmp_path)], capture_output=True, text=True, check=True
    )
    after = os.times()
    assert len(done.stdout.splitlines()) == 1001
    took = after.children_user + after.children_system - before.children_user - before.children_system
    assert took < 2, f"{took:.2f} s of processor time"


# -- files that grow ---------------------------------------------------------------------------------------------


def test_a_file_that_grows_is_read_while_it_grows(place, tmp_path):
    chance = random.Random(7)
    ours, theirs = tmp_path / "ours.log", tmp_path / "theirs.log"
    writer, reader = Growing(at(place), "run/x.log", ours), Growing(at(place), "run/x.log", theirs)
    reader.pull()
    assert not theirs.exists()
    for size in (10, PIECE_BYTES // 2, 0, PIECE_BYTES - 10 - PIECE_BYTES // 2, 3, 2 * PIECE_BYTES, 1):
        with ours.open("ab") as file:
            file.write(chance.randbytes(size))
        writer.push(lambda: False)
        if chance.random() < 0.7:
            reader.pull()
            assert theirs.read_bytes() == ours.read_bytes()
    late = Growing(at(place), "run/x.log", tmp_path / "late.log")
    late.pull()
    assert (tmp_path / "late.log").read_bytes() == ours.read_bytes()
    assert len(at(place).read(piece("run/x.log", 1))[0]) == PIECE_BYTES


def test_only_the_end_of_a_file_that_grows_is_sent_again(s3, place, tmp_path):
    path = tmp_path / "x.log"
    path.write_bytes(b"x" * (3 * PIECE_BYTES + 5))
    writer = Growing(at(place), "run/x.log", path)
    writer.push(lambda: False)
    s3.requests.clear()
    with path.open("ab") as file:
        file.write(b"more")
    writer.push(lambda: False)
    writer.push(lambda: False)
    assert [request.partition("?")[0].rpartition("/")[2] for request in s3.requests] == ["x.log.000003"]


def test_who_was_replaced_writes_nothing_more_and_who_replaced_him_goes_on(place, tmp_path):
    old, new = tmp_path / "old.log", tmp_path / "new.log"
    old.write_bytes(b"one\n")
    before = Growing(at(place), "run/x.log", old)
    before.push(lambda: True)
    after = Growing(at(place), "run/x.log", new)
    after.pull()
    old.write_bytes(b"one\nslipped in\n")
    before.push(lambda: True)
    new.write_bytes(b"one\ntwo\n")
    after.push(lambda: True)
    assert at(place).read("run/x.log")[0] == b"one\ntwo\n"
    old.write_bytes(b"one\nslipped in\nlate\n")
    with pytest.raises(Conflict):
        before.push(lambda: False)
    assert at(place).read("run/x.log")[0] == b"one\ntwo\n"


def test_a_carrier_carries_what_is_written_and_another_node_begins_with_it(place, tmp_path):
    storage = at(place)
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        (folder / "logs").mkdir(parents=True)
        (folder / "samples").mkdir()
    words = {"growing": ["metrics.jsonl", "logs/rank-0.log"], "whole": ["samples/*"], "mirrored": ["checkpoints/**/*"]}
    carrier = Carrier(storage, "run", here, lambda: True, **words)
    carrier.fetch()
    carrier.start()
    (here / "metrics.jsonl").write_text('{"step": 1}\n')
    (here / "logs" / "rank-0.log").write_text("hello\n")
    (here / "logs" / "rank-1.log").write_text("another node's\n")
    (here / "samples" / "a.png").write_bytes(b"picture")
    for name in ("old", "new"):
        (here / "checkpoints" / name).mkdir(parents=True)
        (here / "checkpoints" / name / "state").write_text(name)
    deadline = time.monotonic() + 20
    while not {"run/checkpoints/old/state", "run/samples/a.png"} <= {e.name for e in storage.entries()}:
        assert time.monotonic() < deadline, storage.entries()
        time.sleep(0.05)
    (here / "checkpoints" / "old" / "state").unlink()
    with (here / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2}\n')
    carrier.close()
    names = [entry.name.removeprefix("run/") for entry in storage.entries()]
    assert names == ["checkpoints/new/state", "logs/rank-0.log", "metrics.jsonl", "samples/a.png"]
    other = Carrier(storage, "run", there, lambda: True, **words)
    other.fetch()
    with (there / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3}\n')
    assert (there / "checkpoints" / "new" / "state").read_text() == "new"
    other.close()
    assert storage.read("run/metrics.jsonl")[0] == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_what_logs_gain_is_repeated_in_whole_lines(place, tmp_path):
    echo = tmp_path / "echo"
    (tmp_path / "agent-0.log").write_bytes(b"an earlier attempt's\n")
    with echo.open("ab") as out:
        carrier = Carrier(at(place), "run", tmp_path, lambda: True, growing=["agent-0.log", "x.jsonl"], echo=out)
        carrier.start()
        (tmp_path / "x.jsonl").write_bytes(b"no log\n")
        with (tmp_path / "agent-0.log").open("ab") as log:
            log.write(b"one\ntwo\nhalf a li")
        carrier.close()
    assert echo.read_bytes() == b"agent-0 | one\nagent-0 | two\n"


def test_a_line_without_an_end_does_not_keep_a_log_from_being_repeated(place, tmp_path):
    echo = tmp_path / "echo"
    with echo.open("ab") as out:
        carrier = Carrier(at(place), "run", tmp_path, lambda: True, growing=["rank-0.log"], echo=out)
        (tmp_path / "rank-0.log").write_bytes(b"\r 7%" * (MAX_ECHO // 4) + b"\r100%\ndone\n")
        assert carrier._once() and carrier._once()
    assert echo.read_bytes().endswith(b"rank-0 | 100%\nrank-0 | done\n")


def test_only_what_is_mirrored_is_deleted_there_too(place, tmp_path):
    storage = at(place)
    carrier = Carrier(storage, "run", tmp_path, lambda: True, whole=["samples/*"], mirrored=["checkpoints/**/*"])
    for name in ("samples/a.png", "checkpoints/a/state"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
    assert carrier._once(is_last=True)
    for name in ("samples/a.png", "checkpoints/a/state"):
        (tmp_path / name).unlink()
    assert carrier._once(is_last=True)
    assert [entry.name for entry in storage.entries()] == ["run/samples/a.png"]


def test_a_script_finds_only_its_own_files_and_cannot_replace_what_guards_the_run(place, tmp_path):
    run = a_run(place)
    with OnHead(run.storage, place, run.id):
        guards = run.storage.read(f"{run.id}/checkpoints/committed.json")
        carrier = Carrier(run.storage, run.id, tmp_path, lambda: True, mirrored=["checkpoints/**/*"])
        carrier.fetch()
        assert not list(tmp_path.glob("checkpoints/*"))
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        for name in ("committed.json", "model.pt"):
            (tmp_path / "checkpoints" / name).write_bytes(b"a script's own")
        carrier.close()
        assert run.storage.read(f"{run.id}/checkpoints/model.pt")[0] == b"a script's own"
        assert run.storage.read(f"{run.id}/checkpoints/committed.json") == guards


def test_a_node_that_slept_neither_puts_nor_deletes_what_a_script_keeps(place, tmp_path):
    storage, owners = at(place), [1]
    carrier = Carrier(storage, "run", tmp_path, lambda: owners == [1], mirrored=["checkpoints/**/*"])
    (tmp_path / "checkpoints").mkdir()
    for name in ("first", "second"):
        (tmp_path / "checkpoints" / name).write_bytes(b"ours")
    assert carrier._once(is_last=True)
    owners.append(2)
    storage.write("run/checkpoints/first", b"the next owner's")
    (tmp_path / "checkpoints" / "first").write_bytes(b"ours, late")
    (tmp_path / "checkpoints" / "second").unlink()
    carrier.close()
    assert carrier.lost == "run run belongs to somebody else now"
    assert storage.read("run/checkpoints/first")[0] == b"the next owner's"
    carrier.lost = None
    (tmp_path / "checkpoints" / "first").unlink()
    carrier.close()
    assert [entry.name for entry in storage.entries()] == ["run/checkpoints/first", "run/checkpoints/second"]


def test_a_carrier_that_storage_does_not_tell_whose_the_run_is_asks_again(place, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = a_run(place)
    lease = Lease(run.storage, run.id, "a driver")
    lease.acquire(renews=False)
    errors = [StorageError("storage is unwell")]

    def look(*asked):
        if errors:
            raise errors.pop()
        return standing(*asked)

    with OnNode({"storage": place, "run": run.id, "token": lease.token}, 0) as node:
        monkeypatch.setattr("dtrain.runtime.on_node.standing", look)
        run.storage.write(f"{run.id}/metrics.jsonl", b"slipped in\n")
        (node.path / "metrics.jsonl").write_bytes(b'{"step": 1}\n')
    assert not errors
    assert run.storage.read(f"{run.id}/metrics.jsonl")[0] == b'{"step": 1}\n'


def test_a_carrier_that_was_replaced_says_so_and_stops(place, tmp_path):
    storage = at(place)
    (tmp_path / "x.log").write_text("ours\n")
    carrier = Carrier(storage, "run", tmp_path, lambda: False, growing=["x.log"])
    carrier.fetch()
    storage.write("run/x.log", b"somebody else's\n")
    carrier.close()
    assert carrier.lost
    assert storage.read("run/x.log")[0] == b"somebody else's\n"


# -- read from anywhere ------------------------------------------------------------------------------------------


def test_events_metrics_logs_and_checkpoints_are_read(place, capfdbinary):
    run = a_run(place, state="running", latest={"step": 7, "loss": 1.5})
    put = {"logs/rank-0.log": b"zero\n", "logs/rank-1.log": b"one\n", "metrics.jsonl": b'{"step": 7, "loss": 1.5}\n'}
    folder = "checkpoints/step-00000005-1-1"
    manifest = {"step": 5, "files": {"a": {"bytes": 3}}, "metrics": {"loss": 2.5}, "written_at": 100.0}
    put |= {
        f"{folder}/manifest.json": json.dumps(manifest).encode(),
        f"{folder}/COMMITTED": b"x",
        f"{folder}/a": b"abc",
    }
    put["checkpoints/step-00000009-1-1/a"] = b"not committed"
    line = {"folder": "step-00000005-1-1", "manifest": "", "bytes": 3, "loss": 2.5}
    put["checkpoints/committed.json"] = json.dumps({"token": 1, "checkpoints": {"5": line}}).encode()
    for name, data in put.items():
        run.storage.write(f"{run.id}/{name}", data)
    seen = api.Run(f"{place}/{run.id}")
    assert seen.metrics() == [{"step": 7, "loss": 1.5}]
    assert seen.logs() == "rank 0 | zero\nrank 1 | one\n"
    assert seen.best_checkpoint is not None
    assert seen.best_checkpoint.name == "step-00000005"
    assert (seen.best_checkpoint / "a").read_bytes() == b"abc"
    (stored,) = tables.checkpoints(everybody(run))
    assert (stored["name"], stored["bytes"], stored["time"]) == ("step-00000005", 3, 100.0)
    assert tables.facts(everybody(run))["step"] == 7
    reader = everybody(run)
    logs.show(reader, "rank-0.log", sys.stdout.buffer, follows=False)
    run.storage.write(f"{run.id}/logs/rank-0.log", b"zero\nagain\n")
    logs.show(reader, "rank-0.log", sys.stdout.buffer, follows=False, num_lines=1)
    assert capfdbinary.readouterr().out == b"zero\nagain\n"


def test_a_checkpoint_deleted_while_one_looks_is_left_out(place):
    run = a_run(place)
    lines = {str(step): {"folder": f"step-{step:08d}-1-1"} for step in (10, 20)}
    run.write("checkpoints/committed.json", json.dumps({"token": 1, "checkpoints": lines}))
    run.write("checkpoints/step-00000010-1-1/manifest.json", "{}")  # on its way out
    for name in ("manifest.json", "COMMITTED", "0.distcp"):
        run.write(f"checkpoints/step-00000020-1-1/{name}", "{}")
    run.refresh("checkpoints/")
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000020"]
    run.fetch_checkpoint("step-00000020")
    assert (run.checkpoints / "step-00000020" / "0.distcp").exists()
    with pytest.raises(StorageError, match="checkpoint step-00000005 was deleted meanwhile"):
        run.fetch_checkpoint("step-00000005")


def test_commands_take_the_storage_from_a_cluster_file_or_a_uri(place, tmp_path):
    run = a_run(place, state="failed", cause="a reason", exit_code=3)
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(f"name: away\nbackend: {{name: ray_jobs}}\nstorage: {place}\n")

    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def dtrain(*words: str) -> str:
        command, environment = [sys.executable, "-m", "dtrain", *words], {**os.environ, "TMPDIR": str(scratch)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run.id in dtrain("ps", "-c", str(cluster))
    assert f"{place}/{run.id}" in dtrain("status", "--storage", place)
    assert json.loads(dtrain("status", "--json", f"{place}/{run.id}"))["cause"] == "a reason"
    assert sorted(tmp_path.iterdir()) == [cluster, scratch], "no copies are left where the command is given"
    assert list(scratch.iterdir()) == [], "nor anywhere else"


# -- what a driver says that cannot begin ----------------------------------------------------------------------------


def test_a_driver_that_does_not_fit_its_client_says_so_in_the_run(place):
    run = a_run(place)
    handshake.record(run.storage, run.id)
    versions = json.loads(run.storage.read(f"{run.id}/versions.json")[0])
    run.storage.write(f"{run.id}/versions.json", json.dumps({**versions, "python": "3.1.4"}).encode())
    command = [sys.executable, "-m", "dtrain.runtime.remote", "--storage", place, "--run", run.id]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    record = run.record
    assert (done.returncode, record.state, record.exit_code) == (5, "failed", 5)
    assert "3.1" in record.cause
    assert record.cause in done.stderr
    absent = subprocess.run([*command[:-1], "tiny-none"], capture_output=True, text=True, timeout=100)
    assert absent.returncode == 6
    assert "nothing was submitted under this name" in absent.stderr
    assert [run.id for run in runs.list_runs(place)] == [run.id]


def test_a_driver_that_cannot_begin_gives_the_run_up_and_says_why_in_it(place, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = a_run(place)
    lost = bundle.Shipped(digest="0" * 64, root="/gone", num_files=1, total_bytes=1)
    run.storage.write(f"{run.id}/code.json", to_json(lost).encode())
    assert remote.main(["--storage", place, "--run", run.id]) == 6
    assert (run.record.state, run.record.exit_code) == ("failed", 6)
    assert "the code of this run is gone" in run.record.cause
    assert not run.is_owned()
    assert not list(tmp_path.glob("dtrain-*/*"))
    with (
        pytest.raises(StorageError, match="the code of this run is gone"),
        OnNode({"storage": place, "run": run.id, "token": 1}, 0),
    ):
        pass
    assert not list(tmp_path.glob("dtrain-*/*"))


def test_a_driver_that_cannot_write_how_its_run_ended_says_so(s3, place, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(carrier_module, "LAST_S", 0.5)
    run = a_run(place, state="running", driver_pid=1)
    refused = pytest.raises(StorageError, match=f"how run {run.id} ended could not be written .* `dtrain resume")
    with refused, OnHead(run.storage, place, run.id) as away:
        s3.fail("PUT /{}" + f"/team/runs/{run.id}/run.json", Status(403, "AccessDenied"), times=99)
        away.run.update(state="succeeded")
    s3.heal()
    assert run.record.state == "lost"
    assert not list(tmp_path.glob("dtrain-*/*"))


def test_a_store_that_ignores_conditions_is_named_once_in_the_run(s3, place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    guarded = a_run(place)
    with OnHead(guarded.storage, place, guarded.id):
        pass
    s3.ignores_conditions = True
    run = a_run(place)
    for _ in range(2):
        with OnHead(run.storage, place, run.id):
            pass
    assert [e["event"] for e in guarded.events()] == ["state"]
    (said,) = [e["message"] for e in run.events() if e["event"] == "unguarded"]
    assert said.startswith(f"{place} ignores the conditions of writes")
    assert capsys.readouterr().err.count(said) == 1


# -- between drivers ---------------------------------------------------------------------------------------------


def test_a_run_that_no_driver_took_is_stopped_and_resumed(place):
    run = a_run(place)
    everybody(run).ask_to_stop("me")
    assert (run.record.state, run.record.exit_code, run.stop_requested) == ("stopped", 130, "me")
    run.ask_to_stop("me")  # twice is fine
    everybody(run).requeue("resumed")
    assert (run.record.state, run.record.submissions, run.stop_requested) == ("queued", 2, None)


def test_a_driver_that_has_the_run_is_not_overruled(place):
    run = a_run(place, state="running", driver_pid=1)
    with Lease(run.storage, run.id, "a driver") as lease:
        lease.acquire()
        assert everybody(run).record.state == "running"
        run.ask_to_stop("me")
        assert run.record.state == "running"
        with pytest.raises(InputError, match="is running"):
            run.requeue("resumed")
    assert everybody(run).record.state == "lost"


def test_a_run_whose_driver_is_dead_is_put_back_at_once_and_the_dead_writes_nothing(place):
    attempt = runs.Attempt(number=1, started_at=1.0, from_step=0, source="scratch")
    run = a_run(place, state="running", driver_pid=1, attempts=(attempt,), latest={"step": 7})
    driver = Lease(run.storage, run.id, "the dead driver")
    driver.acquire(renews=False)
    assert everybody(run).put_back("its node was lost", run.stored_record())
    record = run.record
    assert (record.state, record.driver_pid, record.submissions) == ("queued", None, 2)
    assert (record.attempts[0].cause, record.attempts[0].last_step) == ("its node was lost", 7)
    assert [e["message"] for e in run.events() if e["event"] == "driver-lost"]
    with pytest.raises(StorageError, match="newer owner"):
        driver.fenced_write("run.json", to_json(replace(record, state="succeeded")).encode())
    assert run.record.state == "queued"
    everybody(run).end_dead(RetriesExhausted("that was the last one"))
    assert (run.record.state, run.record.exit_code) == ("failed", 4)
    assert not everybody(run).put_back("again", run.stored_record()), "it has ended"


def test_who_slept_while_somebody_else_took_the_run_does_not_write_its_record(place):
    run = a_run(place, state="failed", driver_pid=1)
    driver = Lease(run.storage, run.id, "a driver")

    class Sleeps(RemoteRun):
        def clear_stop(self) -> None:  # the last thing before the record
            assert self._owning is not None
            driver.acquire(succeeding=self._owning.token, renews=False)
            under_way = replace(run.stored_record(), state="running", driver_pid=2)
            driver.fenced_write("run.json", to_json(under_way).encode())

    with pytest.raises(Fenced, match="belongs to a newer owner now"):
        Sleeps(run.storage, run.id).requeue("resumed")
    assert (run.stored_record().state, run.stored_record().driver_pid) == ("running", 2)
    driver.check()
    driver.renew()


def test_a_driver_that_began_after_its_run_was_judged_dead_keeps_the_run(place):
    run = a_run(place, state="running", driver_pid=1)
    Lease(run.storage, run.id, "the dead driver").acquire(renews=False)
    judged_by = run.stored_record()
    began = Lease(run.storage, run.id, "the next driver")
    began.acquire(succeeding=judged_by.token, renews=False)
    with pytest.raises(StorageError, match="is already being driven, by the next driver"):
        everybody(run).put_back("its node was lost", judged_by)
    began.renew()
    began.fenced_write("run.json", to_json(run.stored_record()).encode())


def test_threads_that_look_at_a_run_first_copy_to_one_folder():
    many, before = 16, sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(30):
            away._made.cache_clear()
            together = threading.Barrier(many)

            def look(_: int, together: threading.Barrier = together) -> str:
                together.wait()
                return str(away._copies())

            with ThreadPoolExecutor(many) as pool:
                assert len(set(pool.map(look, range(many)))) == 1
    finally:
        sys.setswitchinterval(before)


def test_a_run_that_its_cluster_brings_back_is_not_lost_for_machines_either(place):
    run = a_run(place)
    run.acquire()
    run.update(state="running", driver_pid=1)
    run.release()
    again = tables.facts(everybody(run), Sight(phase="recovering", why="its head starts again"))
    assert tables.facts(everybody(run))["state"] == "lost"
    assert (again["state"], again["cause"], again["exit_code"]) == ("recovering", "its head starts again", None)
    assert again["cluster"]["phase"] == "recovering"
    assert tables.facts(everybody(run), Sight(phase="ended", is_over=True))["state"] == "lost"
