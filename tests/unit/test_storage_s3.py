"""A bucket of an S3 server that is unwell, that refuses, and whose answers are lost: exactly when it is told to."""

import os
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3_server import PART, Body, CutAnswer, CutRequest, LoseAnswer, Meanwhile, Status, served

from dtrain.errors import StorageError
from dtrain.storage import Conflict, NotThere, bucket, retrying, stores

SOURCE = Path(__file__).parents[2]
LARGE = 2 * PART + 12345
SLOW_DOWN = Status(503, "SlowDown")


@pytest.fixture
def unknown():
    """A server that nobody has spoken to yet."""
    with served() as started:
        yield started


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(os.urandom(LARGE))
    return path


# -- tried again -------------------------------------------------------------------------------------------------

UNWELL = [Status(500, "InternalError"), SLOW_DOWN, CutRequest(), LoseAnswer()]


@pytest.mark.parametrize("fault", UNWELL, ids=str)
def test_whatever_is_asked_is_asked_again_while_the_store_is_unwell(fault, s3, tmp_path):
    storage = s3.storage()
    for what in ("PUT", "GET", "HEAD", "POST"):
        s3.fail(f"{what} /", fault, times=2)
    storage.write("a/b", b"data")
    assert storage.read("a/b")[0] == b"data"
    storage.download("a/b", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"data"
    storage.delete(["a/b"])
    s3.fail("GET /{}?list", fault, times=1)
    assert storage.entries() == []
    s3.fail("GET /{}?list", fault, times=1)
    assert storage.folders() == []
    for what in ("PUT", "HEAD", "POST"):
        assert len(s3.asked(f"{what} /")) == 3


def test_a_conflict_of_the_moment_and_a_timeout_are_no_refusal(s3):
    for status, code in [(400, "RequestTimeout"), (409, "ConditionalRequestConflict")]:
        s3.fail("PUT /", Status(status, code))
        s3.storage().write(code, b"data", if_absent=True)


def test_an_answer_cut_in_the_middle_is_asked_for_again(s3):
    storage = s3.storage()
    storage.write("a", b"0123456789" * 1000)
    s3.fail("GET /{}/a", CutAnswer(4321), times=2)
    assert storage.read("a")[0] == b"0123456789" * 1000
    s3.fail("GET /{}?list", CutAnswer(40))
    assert [entry.name for entry in storage.entries()] == ["a"]


def test_a_store_that_stays_unwell_is_given_up_in_time_and_by_name(s3):
    storage = bucket.open(f"s3://{s3.bucket}", patience_s=0.4)
    storage.write("a", b"before")
    s3.fail("", SLOW_DOWN, times=10**6)
    for use, verb in [
        (lambda: storage.read("a"), "/a cannot be read"),
        (lambda: storage.write("a", b"x"), "/a cannot be written"),
        (lambda: storage.write("a", b"x", if_absent=True), "/a cannot be written"),
        (lambda: storage.entries(), " cannot be listed"),
        (lambda: storage.delete(["a"]), " cannot be deleted"),
    ]:
        started = time.monotonic()
        with pytest.raises(StorageError, match=f"s3://{s3.bucket}{verb}: .* within 0.4 s .SlowDown") as caught:
            use()
        assert type(caught.value) is StorageError
        assert 0.2 < time.monotonic() - started < 3.0


def test_a_store_that_never_answered_is_given_up_sooner(unknown, monkeypatch):
    unknown.close()
    storage = bucket.open(f"s3://{unknown.bucket}", patience_s=60.0, first_patience_s=0.5)
    started = time.monotonic()
    with pytest.raises(StorageError, match="check the network, and AWS_ENDPOINT_URL"):
        storage.read("a")
    assert time.monotonic() - started < 5.0


@given(st.floats(0, 1000), st.lists(st.floats(0, 1), min_size=1))
def test_delays_grow_and_end(patience_s, chances):
    turn = iter(chances * 10_000)
    waits = list(retrying.delays(patience_s, lambda: next(turn)))
    assert sum(waits) == pytest.approx(patience_s)
    assert all(0 < wait_s <= retrying.LONGEST_DELAY_S for wait_s in waits)
    for number, wait_s in enumerate(waits[:-1]):
        whole = min(retrying.FIRST_DELAY_S * 2**number, retrying.LONGEST_DELAY_S)
        assert whole / 2 <= wait_s <= whole * 1.001


def test_time_that_a_try_takes_counts_too():
    tries = []

    def slow():
        tries.append(time.sleep(0.3))
        raise retrying.Again("no answer")

    with pytest.raises(retrying.Again, match="no answer"):
        retrying.call(slow, 0.5)
    assert len(tries) <= 2


# -- conditions, and answers that are lost ----------------------------------------------------------------------------


def test_a_write_whose_answer_was_lost_is_no_conflict(s3):
    storage = s3.storage()
    for fault in (LoseAnswer(), CutAnswer(0)):
        s3.fail("PUT /{}/a", fault)
        first = storage.write("a", b"one", if_absent=True)
        assert storage.read("a") == (b"one", first)
        s3.fail("PUT /{}/a", fault)
        second = storage.write("a", b"two", if_version=first)
        assert storage.read("a") == (b"two", second)
        storage.delete(["a"])


def test_a_rival_who_came_first_is_a_conflict_although_an_answer_was_lost(s3):
    storage = s3.storage()
    first = storage.write("a", b"one")
    s3.fail("PUT /{}/a", CutRequest())
    s3.fail("PUT /{}/a", Meanwhile(lambda: s3.put({"a": b"two"})))  # the very same bytes, and not this writer's
    with pytest.raises(Conflict):
        storage.write("a", b"two", if_version=first)
    s3.fail("PUT /{}/b", CutRequest())
    s3.fail("PUT /{}/b", Meanwhile(lambda: s3.put({"b": b"two"})))
    with pytest.raises(Conflict):
        storage.write("b", b"two", if_absent=True)


def test_a_rival_who_wrote_over_a_write_whose_answer_was_lost_is_a_conflict(s3):
    storage = s3.storage()
    first = storage.write("a", b"one")
    s3.fail("PUT /{}/a", LoseAnswer())
    s3.fail("PUT /{}/a", Meanwhile(lambda: s3.put({"a": b"three"})))
    with pytest.raises(Conflict):
        storage.write("a", b"two", if_version=first)
    assert storage.read("a")[0] == b"three"


# -- large files -------------------------------------------------------------------------------------------------

PART_2, DONE = "PUT /{}/large?uploadId", "POST /{}/large?uploadId"


@pytest.mark.parametrize(
    ("what", "fault", "times"),
    [
        (PART_2, Status(429, "TooManyRequests"), 3),
        (PART_2, CutRequest(after_bytes=1_000_000), 3),
        (PART_2, LoseAnswer(), 3),
        ("POST /{}/large?uploads", LoseAnswer(), 1),
        (DONE, Status(500, "InternalError"), 2),
        (DONE, LoseAnswer(), 1),
    ],
    ids=str,
)
def test_a_large_file_arrives_whole_whatever_happens_to_a_part(what, fault, times, s3, large, tmp_path):
    storage = s3.storage()
    s3.fail(what, fault, times)
    storage.upload(large, "large")
    storage.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large.read_bytes()
    if "uploads" not in what:  # the one whose name was never learned stays until the bucket's own rule removes it
        assert s3.uploads_left() == []


@pytest.mark.parametrize("what", [PART_2, DONE])
def test_a_large_file_that_does_not_arrive_leaves_the_old_one_and_no_parts(what, s3, large):
    storage = s3.storage()
    storage.write("large", b"old")
    s3.fail(what, Status(403, "AccessDenied"), times=1, skip=1 if what == PART_2 else 0)
    with pytest.raises(StorageError, match=r"large cannot be written: .* s3:PutObject"):
        storage.upload(large, "large")
    assert storage.read("large")[0] == b"old"
    assert s3.uploads_left() == []


UPLOADS = """
    import sys
    from pathlib import Path
    from dtrain.storage import at
    at(sys.argv[1]).upload(Path(sys.argv[2]), "large")
"""


def test_an_upload_cut_by_a_kill_leaves_the_old_object(s3, tmp_path):
    storage, large = s3.storage(), tmp_path / "large"
    large.write_bytes(bytes(bucket.PART + PART))
    storage.write("large", b"old")
    command = [sys.executable, "-c", textwrap.dedent(UPLOADS), storage.uri, str(large)]
    with subprocess.Popen(command, cwd=SOURCE) as child:
        s3.fail(PART_2, Meanwhile(child.kill), skip=1)
        assert child.wait(60) < 0
    assert storage.read("large")[0] == b"old"
    assert len(s3.uploads_left()) == 1
    storage.upload(large, "large")
    assert storage.entries()[0].bytes == bucket.PART + PART


def test_a_file_that_changes_while_it_is_downloaded_is_never_mixed(s3, large, tmp_path):
    storage = s3.storage()
    other = tmp_path / "other"
    other.write_bytes(os.urandom(LARGE))
    storage.upload(large, "large")
    s3.fail("GET /{}/large", Meanwhile(lambda: s3.put({"large": other.read_bytes()})), skip=1)
    storage.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == other.read_bytes()


def test_a_large_download_survives_cuts(s3, large, tmp_path):
    storage = s3.storage()
    storage.upload(large, "large")
    s3.fail("GET /{}/large", CutAnswer(1_000_000), times=2)
    s3.fail("GET /{}/large", Status(500, "InternalError"))
    storage.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large.read_bytes()


# -- refused -----------------------------------------------------------------------------------------------------


def uses(storage, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    return {
        "read": lambda: storage.read("a"),
        "written": lambda: storage.write("a", b"x", if_absent=True),
        "listed": storage.entries,
        "deleted": lambda: storage.delete(["a"]),
    }


def test_what_the_credentials_may_not_do_names_bucket_action_and_permission(s3, tmp_path):
    s3.fail("", Status(403, "AccessDenied"), times=10**6)
    permissions = {"read": "GetObject", "written": "PutObject", "listed": "ListBucket", "deleted": "DeleteObject"}
    for verb, use in uses(s3.storage("runs"), tmp_path).items():
        started = time.monotonic()
        with pytest.raises(StorageError, match=f"cannot be {verb}: bucket {s3.bucket} refuses") as caught:
            use()
        assert f"s3:{permissions[verb]}" in caught.value.message
        assert "ask who looks after the bucket" in caught.value.message
        assert not isinstance(caught.value, NotThere | Conflict)
        assert time.monotonic() - started < 2.0


def test_a_bucket_that_is_not_there_is_named(s3, tmp_path):
    for verb, use in uses(bucket.open("s3://no-such-bucket/runs"), tmp_path).items():
        with pytest.raises(StorageError, match=f"cannot be {verb}: there is no bucket no-such-bucket") as caught:
            use()
        assert not isinstance(caught.value, NotThere)
        assert "; make it, or correct the name" in caught.value.message


def test_without_credentials_it_says_where_they_come_from(unknown, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for verb, use in uses(bucket.open(f"s3://{unknown.bucket}"), tmp_path).items():
        started = time.monotonic()
        with pytest.raises(StorageError, match=f"cannot be {verb}: there are no credentials") as caught:
            use()
        assert "set AWS_PROFILE or AWS_ACCESS_KEY_ID, or give the pod's service account a role" in caught.value.message
        assert time.monotonic() - started < 10.0


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_credentials_that_are_not_taken(code, s3):
    s3.fail("", Status(403, code))
    with pytest.raises(StorageError, match=f"there are no credentials that bucket {s3.bucket} takes .{code}"):
        s3.storage().read("a")


def test_a_profile_that_is_not_there(unknown, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match=r"there are no credentials .*nobody"):
        bucket.open(f"s3://{unknown.bucket}").read("a")


def test_one_object_of_many_that_may_not_be_deleted(s3):
    storage = s3.storage()
    said = "<DeleteResult><Error><Key>b</Key><Code>AccessDenied</Code><Message>locked</Message></Error></DeleteResult>"
    s3.fail("POST /{}?delete", Body(said))
    with pytest.raises(StorageError, match=r"cannot be deleted: .*b: locked"):
        storage.delete(["a", "b"])


# -- many --------------------------------------------------------------------------------------------------------


def test_listings_longer_than_a_page(s3):
    """Stores answer with at most 1000 at a time."""
    names = [f"run-{number:04d}/run.json" for number in range(1005)]
    s3.put({f"runs/{name}": b"{}" for name in names})
    storage = s3.storage("runs")
    s3.fail("GET /{}?list", SLOW_DOWN, skip=1)
    assert [entry.name for entry in storage.entries()] == names
    s3.fail("GET /{}?list", SLOW_DOWN, skip=1)
    assert storage.folders() == [name.split("/")[0] for name in names]
    storage.delete(names[:1003])
    assert [entry.name for entry in storage.entries()] == names[1003:]
    assert len(s3.asked("POST /{}?delete")) == 2


def test_what_is_held_in_memory_of_large_files_is_bounded(s3, large):
    """However many files are sent at once, so many parts are under way together and no more."""
    storage = s3.storage()
    names = [f"large-{number}" for number in range(6)]
    running, most = 0, 0

    def count():
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.1)
        running -= 1

    s3.fail("PUT /{}/large", Meanwhile(count), times=10**6)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda name: storage.upload(large, name), names))
    assert 2 < most <= stores.NUM_PARALLEL
