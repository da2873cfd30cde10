"""One owner of a run at a time, and none that was believed dead: on a folder and on S3."""

import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3_server import KINDS, Status, both_kinds, served

from dtrain.errors import StorageError
from dtrain.storage import at, fencing, lease
from dtrain.storage.fencing import Fenced
from dtrain.storage.lease import Lease, Watch

SOURCE = Path(__file__).parents[2]
SHORT_S = 0.6
"""A period that a test can wait for."""


class Clocks:
    """Both clocks of one machine, at will."""

    def __init__(self, skew_s=0.0):
        self.now, self.skew_s = 1000.0, skew_s

    def monotonic(self):
        return self.now

    def wall(self):
        return self.now + 10**9 + self.skew_s


@pytest.fixture(scope="module")
def kinds():
    with both_kinds() as place:
        yield place


@pytest.fixture(params=KINDS)
def storage(request, kinds, tmp_path):
    place = kinds(request.param, tmp_path / "runs")
    place.write("run/run.json", b'{"state": "queued"}')
    return place


@pytest.fixture
def local(tmp_path):
    """For what is the lease's own and no store's."""
    place = at(str(tmp_path / "runs"))
    place.write("run/run.json", b'{"state": "queued"}')
    return place


def owner(storage, name="first", clocks=None, **words):
    """A lease that nobody renews, held."""
    of = {"monotonic": clocks.monotonic, "wall": clocks.wall} if clocks else {}
    held = Lease(storage, "run", name, **of)
    held.acquire(renews=False, **words)
    return held


def record(storage):
    return json.loads(storage.read("run/run.json")[0])


# -- held and given up -------------------------------------------------------------------------------------------


def test_one_owner_at_a_time_and_each_has_a_greater_token(storage):
    first = owner(storage)
    assert (first.token, first.is_guarded) == (1, True)
    assert lease.is_owned(storage, "run")
    with pytest.raises(StorageError, match="run run is already being driven, by first; `dtrain status run`"):
        owner(storage, "second")
    first.release()
    assert not lease.is_owned(storage, "run")
    with owner(storage, "second") as second:
        assert second.token == 2
    assert owner(storage, "third").token == 3
    assert lease.standing(storage, "run").owner == "third"


def test_a_lease_of_nobody(local):
    assert lease.standing(local, "run") is None
    assert not lease.is_owned(local, "run")
    assert not Watch(local, "run").is_alive()
    never = Lease(local, "run", "nobody")
    never.release()
    never.release()
    assert lease.standing(local, "run") is None


def test_of_many_who_want_a_free_run_one_gets_it(storage):
    barrier = threading.Barrier(6)

    def take(index):
        mine = Lease(storage, "run", f"owner {index}")
        barrier.wait()
        try:
            mine.acquire(renews=False)
            return mine
        except StorageError as error:
            assert "is already being driven, by owner " in error.message
            return None

    for turn in (1, 2):
        with ThreadPoolExecutor(6) as pool:
            owners = [mine for mine in pool.map(take, range(6)) if mine]
        assert [mine.token for mine in owners] == [turn]
        assert lease.standing(storage, "run").owner == owners[0].owner
        assert record(storage)["token"] == turn
        owners[0].release()


def test_of_many_who_want_the_run_of_a_dead_owner_one_gets_it(storage):
    dead = owner(storage)
    barrier = threading.Barrier(6)

    def take(index):
        mine = Lease(storage, "run", f"owner {index}")
        barrier.wait()
        try:
            return mine.acquire(succeeding=dead.token, renews=False)
        except StorageError:
            return None

    with ThreadPoolExecutor(6) as pool:
        assert [token for token in pool.map(take, range(6)) if token] == [2]
    assert record(storage)["token"] == 2


# -- believed dead -----------------------------------------------------------------------------------------------


def test_an_owner_that_is_silent_for_a_whole_period_is_dead(local):
    here, there = Clocks(), Clocks()
    first = owner(local, clocks=here)
    watch = Watch(local, "run", monotonic=there.monotonic, wall=there.wall)
    assert watch.is_alive()
    there.now += lease.PERIOD_S - 1
    assert watch.is_alive()
    here.now += lease.PERIOD_S - 1
    first.renew()
    there.now += lease.PERIOD_S - 1
    assert watch.is_alive()  # it said something since
    there.now += lease.PERIOD_S
    assert not watch.is_alive()


@pytest.mark.parametrize("skew_s", [-lease.SKEW_S + 1, 0.0, lease.SKEW_S - 1])
def test_clocks_that_differ_take_no_run_from_a_living_owner(skew_s, local):
    here, there = Clocks(), Clocks(skew_s)
    first = owner(local, clocks=here)
    for _ in range(10):
        assert Watch(local, "run", monotonic=there.monotonic, wall=there.wall).is_alive()
        assert lease.is_owned(local, "run", there.wall)
        with pytest.raises(StorageError, match="already being driven"):
            owner(local, "second", there)
        for clocks in (here, there):
            clocks.now += lease.PERIOD_S / 3
        first.renew()
        first.check()


def test_an_owner_that_died_long_ago_is_succeeded_at_once(local):
    clocks = Clocks()
    owner(local, clocks=clocks)
    clocks.now += lease.PERIOD_S + lease.SKEW_S + 1
    assert not lease.is_owned(local, "run", clocks.wall)
    assert owner(local, "second", clocks).token == 2


def test_an_owner_that_was_just_killed_is_succeeded_within_a_period(storage):
    Lease(storage, "run", "killed", period_s=SHORT_S).acquire(renews=False)
    started = time.monotonic()
    assert owner(storage, "second", patience_s=10.0).token == 2
    assert SHORT_S * 0.9 < time.monotonic() - started < SHORT_S + 3


def test_an_owner_renews_as_long_as_it_lives(storage):
    with Lease(storage, "run", "first", period_s=SHORT_S) as first:
        first.acquire()
        with pytest.raises(StorageError, match="already being driven, by first"):
            owner(storage, "second", patience_s=3 * SHORT_S)
        first.check()
        first.stop_renewing()
        assert owner(storage, "second", patience_s=10.0).token == 2
        with pytest.raises(Fenced, match=r"run run belongs to second now \(owner 2; this was 1\)"):
            first.renew()
        with pytest.raises(Fenced):
            first.check()


def test_who_was_succeeded_does_not_give_up_what_is_anothers(storage):
    first = owner(storage)
    second = owner(storage, "second", succeeding=1)
    first.release()
    assert lease.standing(storage, "run").owner == "second"
    second.renew()
    second.check()


def test_only_the_owner_that_is_known_to_be_dead_is_succeeded_at_once(local):
    owner(local)
    owner(local, "second", succeeding=1)
    with pytest.raises(StorageError, match="by second"):
        owner(local, "third", succeeding=1)


def test_an_owner_that_could_not_renew_in_time_knows_it(local):
    clocks = Clocks()
    first = owner(local, clocks=clocks)
    clocks.now += lease.PERIOD_S - 0.1
    first.check()
    clocks.now += 0.2
    with pytest.raises(StorageError, match="another driver may take the run over") as caught:
        first.check()
    assert not isinstance(caught.value, Fenced)
    first.renew()  # nobody has
    first.check()


def test_a_run_that_was_deleted_ends_its_owner(local):
    first = owner(local)
    local.delete([entry.name for entry in local.entries("run/")])
    with pytest.raises(Fenced, match="run run was deleted"):
        first.renew()


def test_a_lease_that_is_damaged_says_what_to_do(local):
    for text in (b"", b"[]", b'{"token": 3}', b"\xff"):
        local.write("run/lease.json", text)
        with pytest.raises(StorageError, match=r"run/lease\.json is damaged; when nothing drives the run"):
            owner(local)


def test_a_store_that_is_away_for_a_while_costs_no_lease():
    with served() as s3:
        storage = s3.storage("runs", patience_s=0.2)
        with Lease(storage, "run", "first", period_s=SHORT_S) as first:
            first.acquire()
            s3.fail("", Status(503, "SlowDown"), times=10**6)
            deadline = time.monotonic() + 10
            with pytest.raises(StorageError, match="has not taken a sign of life") as caught:
                while time.monotonic() < deadline:
                    first.check()
                    time.sleep(0.01)
            assert not isinstance(caught.value, Fenced)
            s3.heal()
            while time.monotonic() < deadline:
                try:
                    first.check()
                    break
                except StorageError:
                    time.sleep(0.01)
            first.fenced_write("run.json", b'{"state": "running"}')


def test_where_conditions_are_ignored_it_is_said_and_there_is_one_owner_still():
    with served() as s3:
        s3.ignores_conditions = True
        storage = s3.storage("runs")
        storage.write("run/run.json", b'{"state": "queued"}')
        barrier = threading.Barrier(2)
        held = [Lease(storage, "run", name) for name in ("first", "second")]

        def take(mine):
            barrier.wait()
            try:
                mine.acquire(renews=False)
                return mine
            except StorageError:
                return None

        with ThreadPoolExecutor(2) as pool:
            owners = [mine for mine in pool.map(take, held) if mine]
        assert len(owners) == 1
        assert not owners[0].is_guarded
        assert lease.standing(storage, "run").owner == owners[0].owner
        after = owner(storage, "third", succeeding=owners[0].token)
        with pytest.raises(Fenced):
            owners[0].fenced_write("run.json", b'{"state": "failed"}')
        after.fenced_write("run.json", b'{"state": "running"}')


def test_where_conditions_are_ignored_an_owner_that_wakes_up_does_not_take_the_run_back():
    with served() as s3:
        s3.ignores_conditions = True
        storage = s3.storage("runs")
        storage.write("run/run.json", b'{"state": "queued"}')
        first, second = owner(storage), owner(storage, "second", succeeding=1)
        with pytest.raises(Fenced, match=r"belongs to second now \(owner 2; this was 1\)"):
            first.renew()
        assert (lease.standing(storage, "run").token, lease.is_owned(storage, "run")) == (2, True)
        third = owner(storage, "third", succeeding=2)
        second.release()  # it has not heard of the third
        assert (lease.standing(storage, "run").token, lease.is_owned(storage, "run")) == (3, True)
        third.renew()
        third.release()
        assert not lease.is_owned(storage, "run")


# -- the zombie --------------------------------------------------------------------------------------------------


def test_what_an_owner_writes_bears_its_token(storage):
    first = owner(storage)
    assert record(storage) == {"token": 1, "state": "queued"}
    assert json.loads(storage.read("run/checkpoints/committed.json")[0]) == {"token": 1}
    first.fenced_write("run.json", b'{"state": "running", "token": 99}')
    assert record(storage) == {"token": 1, "state": "running"}
    first.fenced_write("run.json", {"state": "stopping"})
    assert fencing.read(storage, "run/run.json") == {"token": 1, "state": "stopping"}


def test_an_owner_that_was_succeeded_writes_nothing(storage):
    first = owner(storage)
    second = owner(storage, "second", succeeding=1)
    before = {entry.name: entry.version for entry in storage.entries()}
    for name in lease.GUARDED:
        with pytest.raises(Fenced, match=r"was written by a newer owner of the run \(2; this one was 1\)"):
            first.fenced_write(name, b'{"state": "failed"}')
    with pytest.raises(Fenced):
        first.check()
    first.release()
    assert {entry.name: entry.version for entry in storage.entries()} == before
    second.fenced_write("run.json", b'{"state": "running"}')


def test_an_owner_that_slept_in_the_middle_of_a_write_writes_nothing(storage):
    """It has read the document, found nobody newer, and is succeeded before it writes."""
    first = owner(storage)
    after = []

    def change(document):
        if not after:
            after.append(owner(storage, "second", succeeding=1))
        return {**document, "state": "failed"}

    with pytest.raises(Fenced):
        fencing.change(storage, "run/run.json", first.token, change)
    assert record(storage) == {"token": 2, "state": "queued"}


def test_an_owner_that_slept_before_it_made_a_document_makes_none(storage):
    first = owner(storage)
    storage.delete(["run/checkpoints/committed.json"])

    def change(document):
        owner(storage, "second", succeeding=1)
        return {"checkpoints": {"10": {}}}

    with pytest.raises(Fenced):
        fencing.change(storage, "run/checkpoints/committed.json", first.token, change)
    assert fencing.read(storage, "run/checkpoints/committed.json") == {"token": 2}


def test_what_an_owner_wrote_just_before_it_was_succeeded_is_seen_by_its_successor(storage):
    first = owner(storage)
    first.fenced_write("run.json", b'{"state": "succeeded"}')
    owner(storage, "second", succeeding=1)
    assert record(storage) == {"token": 2, "state": "succeeded"}


def test_processes_of_one_owner_may_write_the_same_document(storage):
    first = owner(storage)
    barrier = threading.Barrier(4)

    def add(index):
        barrier.wait()
        fencing.change(storage, "run/notes.json", first.token, lambda document: {**document, str(index): index})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    assert fencing.read(storage, "run/notes.json") == {"token": 1, "0": 0, "1": 1, "2": 2, "3": 3}


def test_a_run_whose_lease_was_deleted_as_advised_has_a_greater_owner_next(local):
    first = owner(local)
    second = owner(local, "second", succeeding=1)
    local.write("run/lease.json", b"{")
    with pytest.raises(StorageError, match="delete that file and resume it"):
        owner(local, "third")
    local.delete(["run/lease.json"])
    third = owner(local, "third")
    assert third.token == 3
    third.fenced_write("run.json", b'{"state": "running"}')
    for earlier in (first, second):
        with pytest.raises(Fenced):
            earlier.fenced_write("run.json", b'{"state": "failed"}')


def test_a_document_that_is_damaged_is_named(local):
    first = owner(local)
    for text in (b"", b"[1]", b'{"token": "x"}', b"\xff\xfe"):
        local.write("run/run.json", text)
        with pytest.raises(StorageError, match=r"run/run\.json is damaged: not a JSON object"):
            first.fenced_write("run.json", b"{}")


ZOMBIE = """
    import sys
    from dtrain.storage import at
    from dtrain.storage.fencing import Fenced
    from dtrain.storage.lease import Lease
    held = Lease(at(sys.argv[1]), "run", "the zombie", period_s=float(sys.argv[2]))
    print(held.acquire(), flush=True)
    step = 0
    while True:
        step += 1
        try:
            held.fenced_write("run.json", {"state": "running", "step": step})
            print(step, flush=True)
        except Fenced as error:
            print(error.message, flush=True)
            break
    try:
        held.check()
    except Fenced:
        print("and knows it", flush=True)
    held.release()
"""


def test_a_driver_that_was_stopped_and_wakes_up_writes_nothing_that_counts(storage):
    command = [sys.executable, "-c", textwrap.dedent(ZOMBIE), storage.uri, str(SHORT_S)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=SOURCE) as zombie:
        assert zombie.stdout.readline() == "1\n"
        for _ in range(3):
            zombie.stdout.readline()  # it is writing all the time
        zombie.send_signal(signal.SIGSTOP)
        after = owner(storage, "second", patience_s=30.0)
        after.fenced_write("run.json", {"state": "recovering"})
        zombie.send_signal(signal.SIGCONT)
        said = zombie.stdout.read().splitlines()
        assert zombie.wait(30) == 0
    assert "newer owner of the run (2; this one was 1)" in said[-2]
    assert said[-1] == "and knows it"
    assert record(storage) == {"token": 2, "state": "recovering"}
    assert lease.standing(storage, "run").owner == "second"
