"""Checkpoints on a storage: whole or not at all, of the run's owner alone, every byte checked when they come back."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from s3_server import KINDS, Meanwhile, Status, both_kinds, served

from dtrain.checkpoint import remote, store
from dtrain.checkpoint.pieces import Piece
from dtrain.checkpoint.shelf import Part, RemoteShelf
from dtrain.errors import StorageError
from dtrain.spec.job import Keep
from dtrain.storage import at, fencing, lease
from dtrain.storage.fencing import Fenced
from dtrain.storage.lease import Lease

ROWS = 6


def tensors(value=1.0):
    return {
        "model.main.weight": torch.full((1000,), float(value)),
        "model.main.half": torch.full((7, 3), float(value), dtype=torch.bfloat16),
        "model.main.count": torch.tensor(int(value)),
    }


def some_rows(value, node, num_nodes):
    """What a node holds of a state that is sharded by rows, and of a number that the first node has."""
    each = ROWS // num_nodes
    weight = torch.arange(ROWS * 3.0).reshape(ROWS, 3)[node * each : (node + 1) * each] + value
    pieces = [Piece("model.main.weight", weight.clone(), (ROWS, 3), (node * each, 0), True)]
    return [*pieces, Piece("model.main.count", torch.tensor(value), (), (), node == 0)]


@pytest.fixture(scope="module")
def kinds():
    with both_kinds() as place:
        yield place


@pytest.fixture(params=KINDS)
def storage(request, kinds, tmp_path):
    place = kinds(request.param, tmp_path / "runs")
    own(place)
    return place


@pytest.fixture
def local(tmp_path):
    """For what is no store's own."""
    place = at(str(tmp_path / "runs"))
    own(place)
    return place


def own(storage, name="owner", succeeding=None):
    held = Lease(storage, "run", name)
    held.acquire(succeeding=succeeding, renews=False)
    return held


def written(folder, step, loss=None, value=None):
    facts = {"metrics": {"loss": loss}} if loss is not None else {}
    store.write(folder, step, tensors(step if value is None else value), facts)
    return store.path_of(folder, step)


def publish(storage, folder, *steps, token=1, attempt=1, loss=None):
    for step in steps:
        remote.publish(storage, "run", written(folder, step, loss), token, attempt)


def newest(storage, into):
    """Step and count of the newest valid one, and what was said of those passed over."""
    said = []
    found = remote.newest_valid(storage, "run", said.append, into)
    if found is None:
        return None, said
    path, manifest = found
    assert path == store.path_of(into, manifest["step"])
    live = tensors(0)
    store.read_into(path, live)
    assert len({float(value) for tensor in live.values() for value in tensor.reshape(-1)}) == 1
    return (manifest["step"], int(live["model.main.count"])), said


def names(storage):
    return [entry.name.removeprefix("run/checkpoints/") for entry in storage.entries("run/checkpoints/")]


# -- there and back ----------------------------------------------------------------------------------------------


def test_what_is_published_comes_back_bit_for_bit(storage, tmp_path):
    path = written(tmp_path / "here", 7, loss=2.5)
    size = remote.publish(storage, "run", path, 1, attempt=3)
    assert remote.steps(storage, "run") == [7]
    assert newest(storage, tmp_path / "there") == ((7, 7), [])
    back = store.path_of(tmp_path / "there", 7)
    assert {p.name: p.read_bytes() for p in back.iterdir()} == {p.name: p.read_bytes() for p in path.iterdir()}
    assert size == sum(facts["bytes"] for facts in store.verify(back)["files"].values())
    files = sorted(p.name for p in path.iterdir())
    assert names(storage) == ["committed.json", *(f"step-00000007-1-3/{name}" for name in files)]
    lines = fencing.read(storage, "run/checkpoints/committed.json")["checkpoints"]
    assert (lines["7"]["loss"], lines["7"]["bytes"], lines["7"]["folder"]) == (2.5, size, "step-00000007-1-3")


def test_nothing_there(local, tmp_path):
    assert remote.steps(local, "run") == []
    assert newest(local, tmp_path / "there") == (None, [])
    assert remote.steps(local, "no-such-run") == []
    assert remote.prune(local, "run", Keep(), 1) == []


def test_steps_are_in_order_however_many_digits(local, tmp_path):
    for step in (99_999_999, 5, 100_000_000):
        remote.publish(local, "run", written(tmp_path / "here", step, value=step % 7), 1)
    assert remote.steps(local, "run") == [5, 99_999_999, 100_000_000]
    assert newest(local, tmp_path / "there")[0] == (100_000_000, 100_000_000 % 7)


def test_what_is_published_again_is_left_as_it_is(storage, tmp_path):
    publish(storage, tmp_path, 7)
    before = storage.entries()
    remote.publish(storage, "run", store.path_of(tmp_path, 7), 1, 1)
    assert storage.entries() == before


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_step_that_is_done_anew_replaces_the_one_before(attempt, storage, tmp_path):
    publish(storage, tmp_path / "here", 7)
    remote.publish(storage, "run", written(tmp_path / "here", 7, value=77), 1, attempt)
    assert newest(storage, tmp_path / "there") == ((7, 77), [])
    remote.prune(storage, "run", Keep(), 1)
    assert newest(storage, tmp_path / "again") == ((7, 77), [])
    assert {name.split("/")[0] for name in names(storage)} == {"committed.json", f"step-00000007-1-{attempt}"}


def test_what_was_never_committed_here_is_not_published(local, tmp_path):
    path = written(tmp_path, 7)
    (path / store.MARKER).unlink()
    with pytest.raises(StorageError, match="no COMMITTED marker"):
        remote.publish(local, "run", path, 1)
    assert names(local) == ["committed.json"]


def test_a_valid_copy_is_not_brought_again(tmp_path):
    with served() as s3:
        storage = s3.storage("runs")
        own(storage)
        publish(storage, tmp_path, 7)
        s3.requests.clear()
        assert newest(storage, tmp_path) == ((7, 7), [])
        assert [request for request in s3.requests if "step-" in request] == []
        shard = max(store.path_of(tmp_path, 7).glob("*.distcp"))
        flip(shard)  # a copy that is not valid is no reason to pass the checkpoint over
        assert newest(storage, tmp_path) == ((7, 7), [])
        written(tmp_path, 7, value=5)  # nor one of another line
        assert newest(storage, tmp_path) == ((7, 7), [])


# -- damaged -----------------------------------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped byte": (lambda p, s: flip(s), "has changed since it was written"),
    "a flipped byte of the index": (lambda p, s: flip(p / ".metadata"), ".metadata has changed"),
    "a truncated shard": (lambda p, s: os.truncate(s, 100), "has 100 bytes instead of"),
    "a missing shard": (lambda p, s: s.unlink(), "is missing"),
    "a missing index": (lambda p, s: (p / ".metadata").unlink(), ".metadata is missing"),
    "a changed manifest": (lambda p, s: flip(p / store.MANIFEST), "manifest.json is not the one that was committed"),
    "no manifest": (lambda p, s: (p / store.MANIFEST).unlink(), "manifest.json does not exist (it was deleted)"),
    "nothing at all": (lambda p, s: [f.unlink() for f in p.iterdir()], "manifest.json does not exist"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(what, local, tmp_path):
    publish(local, tmp_path / "here", 10, 20, 30)
    path = tmp_path / "runs" / "run" / "checkpoints" / "step-00000030-1-1"
    damage, reason = DAMAGE[what]
    damage(path, max(path.glob("*.distcp"), key=lambda p: p.stat().st_size))
    found, said = newest(local, tmp_path / "there")
    assert found == (20, 20)
    assert len(said) == 1
    assert said[0].startswith("checkpoint step-00000030: ")
    assert reason in said[0]
    assert said[0].endswith("going back to the one before")
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["step-00000020"]


def test_a_store_that_does_not_answer_says_nothing_against_a_checkpoint(tmp_path):
    """To go back, or to begin anew, because of an outage would throw away what is there."""
    with served() as s3:
        storage = s3.storage("runs", patience_s=0.3)
        own(storage)
        publish(storage, tmp_path / "here", 10, 20)
        for what in ("GET /", "HEAD /", "GET /{}/runs/run/checkpoints/step-00000020"):
            s3.fail(what, Status(503, "SlowDown"), times=10**6)
            with pytest.raises(StorageError, match=r"within 0\.3 s .(SlowDown|503)"):
                remote.newest_valid(storage, "run", pytest.fail, tmp_path / "there")
            s3.heal()
        assert newest(storage, tmp_path / "there") == ((20, 20), [])


def test_a_manifest_that_names_files_elsewhere_is_not_followed(local, tmp_path):
    path = written(tmp_path / "here", 10)
    manifest = json.loads((path / store.MANIFEST).read_text())
    manifest["files"]["../../../../stolen"] = {"bytes": 1, "sha256": "0"}
    text = json.dumps(manifest).encode()
    (path / store.MANIFEST).write_bytes(text)
    (path / store.MARKER).write_text(remote._sha256(text))
    (tmp_path / "here" / "stolen").write_text("x")
    with pytest.raises(StorageError):
        remote.publish(local, "run", path, 1)
    assert remote.steps(local, "run") == []


# -- interrupted -------------------------------------------------------------------------------------------------


def test_it_is_committed_last_and_by_one_conditional_write(tmp_path):
    with served() as s3:
        storage = s3.storage("runs")
        own(storage)
        path = written(tmp_path, 7)
        s3.requests.clear()
        remote.publish(storage, "run", path, 1)
        place = f"PUT /{s3.bucket}/runs/run/checkpoints/"
        put = [request.removeprefix(place) for request in s3.requests if request.startswith("PUT")]
    shards = {f"step-00000007-1-0/{name}" for name in store.read_manifest(path)["files"]}
    assert set(put[: len(shards)]) == shards
    last = ["step-00000007-1-0/manifest.json", "step-00000007-1-0/COMMITTED", "committed.json"]
    assert put[len(shards) :] == last


def test_a_publisher_that_is_cut_at_any_request_leaves_the_one_before(tmp_path):
    first, second = written(tmp_path / "here", 10), written(tmp_path / "here", 20)
    with served() as s3:
        storage = s3.storage("runs")
        own(storage)
        remote.publish(storage, "run", first, 1)
        seen = []
        for number in range(100):
            s3.fail("", Status(403, "AccessDenied"), times=10**6, skip=number)
            try:
                remote.publish(storage, "run", second, 1, attempt=number)
                failed = False
            except StorageError as error:
                assert "AccessDenied" in error.message
                failed = True
            s3.heal()
            seen.append(remote.steps(storage, "run"))
            assert newest(storage, tmp_path / f"there-{number}")[1] == []
            if not failed:
                break
        assert len(seen) > 6
        assert seen == [[10]] * (len(seen) - 1) + [[10, 20]]
        remote.prune(storage, "run", Keep(last=2, best=0), 1)
        folders = {name.split("/")[0] for name in names(storage)}
        assert folders == {"committed.json", "step-00000010-1-0", f"step-00000020-1-{number}"}


def test_a_shard_that_does_not_arrive_whole_is_noticed_before_the_commit(tmp_path):
    with served() as s3:
        storage = s3.storage("runs")
        own(storage)
        path = written(tmp_path, 7)
        place = f"runs/run/checkpoints/step-00000007-1-0/{max(p.name for p in path.glob('*.distcp'))}"
        s3.fail("GET /{}?list", Meanwhile(lambda: s3.put({place: b"cut"})))
        with pytest.raises(StorageError, match=r"has 3 bytes instead of .* it was not committed"):
            remote.publish(storage, "run", path, 1)
        assert remote.steps(storage, "run") == []


# -- sharded over nodes ------------------------------------------------------------------------------------------


def put_parts(storage, folder, step, num_nodes, token=1, attempt=1, nodes=None):
    for node in range(num_nodes) if nodes is None else nodes:
        path = store.part_of(folder / f"node-{node}", step, node, attempt)
        store.write_part(path, some_rows(step, node, num_nodes))
        remote.publish_part(storage, "run", path, step, node, token, attempt)


@pytest.mark.parametrize("num_nodes", [1, 2, 3])
def test_parts_of_nodes_become_one_checkpoint(num_nodes, storage, tmp_path):
    put_parts(storage, tmp_path, 5, num_nodes)
    assert remote.steps(storage, "run") == []
    size = remote.commit_parts(storage, "run", 5, num_nodes, 1, 1, {"metrics": {"loss": 1.0}, "num_workers": num_nodes})
    assert remote.steps(storage, "run") == [5]
    path, manifest = remote.newest_valid(storage, "run", pytest.fail, tmp_path / "there")
    assert (manifest["step"], manifest["num_workers"]) == (5, num_nodes)
    live = {"model.main.weight": torch.zeros(ROWS, 3), "model.main.count": torch.tensor(0)}
    store.read_into(path, live)
    assert torch.equal(live["model.main.weight"], torch.arange(ROWS * 3.0).reshape(ROWS, 3) + 5)
    assert int(live["model.main.count"]) == 5
    shards = {f"__{node}_0.distcp" for node in range(num_nodes)}
    files = {".metadata", *shards, store.MANIFEST, store.MARKER}
    assert {p.name for p in path.iterdir()} == files
    assert set(names(storage)) == {"committed.json", *(f"step-00000005-1-1/{name}" for name in files)}
    assert size == sum(facts["bytes"] for facts in manifest["files"].values())


def test_a_part_that_comes_late_is_waited_for(storage, tmp_path):
    put_parts(storage, tmp_path, 5, 2, nodes=[0])
    late = threading.Timer(0.5, put_parts, (storage, tmp_path, 5, 2), {"nodes": [1]})
    late.start()
    remote.commit_parts(storage, "run", 5, 2, 1, 1, {}, timeout_s=60.0)
    late.join()
    assert remote.steps(storage, "run") == [5]


def test_a_part_that_does_not_come_is_named(local, tmp_path):
    put_parts(local, tmp_path, 5, 3, nodes=[0])
    put_parts(local, tmp_path, 5, 3, nodes=[1, 2], attempt=2)  # of another attempt: none of these
    with pytest.raises(StorageError, match=r"step-00000005-1-1: node 1, 2 did not bring its part within 0 s"):
        remote.commit_parts(local, "run", 5, 3, 1, 1, {}, timeout_s=0.3)
    assert remote.steps(local, "run") == []


def test_parts_that_are_not_the_whole_state_are_not_committed(local, tmp_path):
    put_parts(local, tmp_path, 5, 3, nodes=[0, 1])
    with pytest.raises(StorageError, match=r"12 numbers of model\.main.weight are held, and it has 18"):
        remote.commit_parts(local, "run", 5, 2, 1, 1, {}, timeout_s=1.0)
    assert remote.steps(local, "run") == []


# -- kept --------------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept(storage, tmp_path):
    for step, loss in [(10, 3.0), (20, 1.0), (30, float("nan")), (40, 2.5)]:
        publish(storage, tmp_path / "here", step, loss=loss)
    assert remote.prune(storage, "run", Keep(last=1, best=1), 1) == [10, 30]
    assert remote.steps(storage, "run") == [20, 40]
    assert {name.split("/")[0] for name in names(storage)} == {
        "committed.json",
        "step-00000020-1-1",
        "step-00000040-1-1",
    }
    assert remote.prune(storage, "run", Keep(last=1, best=1), 1) == []
    assert newest(storage, tmp_path / "there") == ((40, 40), [])


def test_what_is_deleted_stops_being_a_checkpoint_first(tmp_path):
    with served() as s3:
        storage = s3.storage("runs")
        own(storage)
        publish(storage, tmp_path / "here", 10, 20)
        s3.fail("POST /{}?delete", Status(403, "AccessDenied"), skip=1)
        with pytest.raises(StorageError, match="s3:DeleteObject"):
            remote.prune(storage, "run", Keep(last=1, best=0), 1)
        assert remote.steps(storage, "run") == [20]
        left = [name for name in names(storage) if name.startswith("step-00000010")]
        assert left
        assert not any(name.endswith(store.MARKER) for name in left)
        remote.prune(storage, "run", Keep(last=1, best=0), 1)
        assert not any(name.startswith("step-00000010") for name in names(storage))


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_a_checkpoint_counts_although_the_one_before_may_not_be_deleted(num_nodes, tmp_path):
    with served() as s3:
        storage = s3.storage("runs")
        own(storage)
        publish(storage, tmp_path / "here", 10)
        s3.fail("POST /{}?delete", Status(403, "AccessDenied"), times=9)
        put_parts(storage, tmp_path, 20, num_nodes, nodes=range(1, num_nodes))
        shelf = RemoteShelf(tmp_path / "own", storage.uri, "run", 1)
        state = some_rows(20, 0, 2) if num_nodes == 2 else tensors(20)
        put = shelf.put(Part(20, 1, 0, num_nodes), state, {}, Keep(last=1, best=0))
        assert put.num_bytes and put.deleted == ()
        assert 20 in shelf.steps()
        assert "s3:DeleteObject" in put.refused
        s3.heal()
        assert shelf.put(Part(30, 1), tensors(30), {}, Keep(last=1, best=0)).refused == ""
        assert {name.split("/")[0] for name in names(storage)} == {"committed.json", "step-00000030-1-1"}
        own(storage, "second", succeeding=1)
        with pytest.raises(Fenced):
            shelf.put(Part(40, 1), tensors(40), {}, Keep(last=1, best=0))


def test_one_that_is_not_whole_is_not_counted_as_kept(local, tmp_path):
    publish(local, tmp_path / "here", 10, 20, 30)
    (tmp_path / "runs" / "run" / "checkpoints" / "step-00000030-1-1" / store.MANIFEST).unlink()
    assert remote.prune(local, "run", Keep(last=2, best=0), 1) == []
    assert newest(local, tmp_path / "there")[0] == (20, 20)


def test_what_is_on_its_way_is_left_alone(local, tmp_path):
    """Other nodes bring their parts of the next one while the first node prunes after the last."""
    publish(local, tmp_path / "here", 10, attempt=2)
    put_parts(local, tmp_path, 20, 2, attempt=2, nodes=[1])
    put_parts(local, tmp_path, 8, 2, attempt=3, nodes=[1])  # gone back further than what is committed
    put_parts(local, tmp_path, 8, 2, attempt=1, nodes=[1])  # never to be finished
    remote.prune(local, "run", Keep(), 1)
    folders = {name.split("/")[0] for name in names(local)} - {"committed.json"}
    assert folders == {"step-00000010-1-2", "step-00000020-1-2", "step-00000008-1-3"}


# -- the zombie --------------------------------------------------------------------------------------------------


def test_an_owner_that_was_succeeded_commits_and_deletes_nothing(storage, tmp_path):
    publish(storage, tmp_path / "here", 10, 20)
    put_parts(storage, tmp_path, 30, 2)
    own(storage, "second", succeeding=1)
    before = storage.entries()
    uses = [
        lambda: publish(storage, tmp_path / "here", 30),
        lambda: put_parts(storage, tmp_path, 40, 1),
        lambda: remote.prune(storage, "run", Keep(last=1, best=0), 1),
    ]
    for use in uses:
        with pytest.raises(Fenced, match=r"newer owner of the run \(2; this one was 1\)"):
            use()
        assert storage.entries() == before
    with pytest.raises(Fenced):
        remote.commit_parts(storage, "run", 30, 2, 1, 1, {})
    assert remote.steps(storage, "run") == [10, 20]


def test_an_owner_that_is_succeeded_while_it_publishes_commits_nothing_and_harms_nothing(tmp_path):
    """At whichever of its requests it falls asleep, and whatever its successor does at the same step meanwhile."""
    theirs, ours = written(tmp_path / "theirs", 20), written(tmp_path / "ours", 20, value=21)
    with served() as s3:
        number = 0
        while True:
            storage = s3.storage(f"runs-{number}")
            own(storage)
            succeeded = []

            def succeed(storage=storage, succeeded=succeeded):
                after = own(storage, "second", succeeding=1)
                remote.publish(storage, "run", ours, after.token)
                succeeded.append(after)

            s3.fail("", Meanwhile(succeed), skip=number)
            try:
                remote.publish(storage, "run", theirs, 1)
                assert not succeeded or number >= 8, number  # it was done before
            except Fenced:
                assert succeeded
            s3.heal()
            if not succeeded:
                break
            assert newest(storage, tmp_path / f"there-{number}") == ((20, 21), [])
            with pytest.raises(Fenced):
                remote.prune(storage, "run", Keep(), 1)
            remote.prune(storage, "run", Keep(), 2)
            assert {name.split("/")[0] for name in names(storage)} == {"committed.json", "step-00000020-2-0"}
            number += 1
        assert number > 6
        assert newest(storage, tmp_path / "last") == ((20, 20), [])


def test_a_successor_deletes_what_its_predecessor_can_no_longer_commit(storage, tmp_path):
    publish(storage, tmp_path / "here", 10)
    put_parts(storage, tmp_path, 99, 2, nodes=[1])
    own(storage, "second", succeeding=1)
    remote.prune(storage, "run", Keep(), 2)
    assert {name.split("/")[0] for name in names(storage)} == {"committed.json", "step-00000010-1-1"}
    assert newest(storage, tmp_path / "there") == ((10, 10), [])
    publish(storage, tmp_path / "here", 20, token=2)
    assert remote.steps(storage, "run") == [10, 20]


def test_the_documents_are_where_the_lease_guards_them():
    assert lease.COMMITTED in lease.GUARDED
    assert Path(lease.COMMITTED).parent.name == remote.LINES
