"""What every storage promises: whole objects, conditions that hold, listings that lack nothing."""

import fcntl
import json
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
from s3_server import KINDS, PART, both_kinds

from dtrain import storage as places
from dtrain.errors import InputError, StorageError
from dtrain.storage import Conflict, Entry, NotThere, folder
from dtrain.storage.gs import Gs
from dtrain.storage.gs import _Refused as Refused

SOURCE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kinds():
    with both_kinds() as place:
        yield place


@pytest.fixture(params=KINDS)
def storage(request, kinds, tmp_path):
    return kinds(request.param, tmp_path / "runs")


def all_at_once(number, what):
    """What `what(0)`, `what(1)`, ... return, all begun at one moment."""
    barrier = threading.Barrier(number)

    def one(index):
        barrier.wait()
        return what(index)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(one, range(number)))


# -- objects -----------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(storage):
    version = storage.write("a/run.json", b"one")
    assert storage.read("a/run.json") == (b"one", version)
    newer = storage.write("a/run.json", b"two")
    assert newer != version
    assert storage.read("a/run.json") == (b"two", newer)
    storage.write("a/empty", b"")
    assert storage.read("a/empty")[0] == b""
    assert storage.read("a/run.json")[1] == newer


def test_what_is_not_there_is_said_by_name(storage):
    storage.write("a/run.json", b"one")
    for name in ("a/other.json", "b/run.json", "a"):
        with pytest.raises(NotThere, match=f"{name} "):
            storage.read(name)
        with pytest.raises(NotThere):
            storage.read_if_changed(name, None)
        with pytest.raises(NotThere):
            storage.read_if_changed(name, "some")


def test_only_what_changed_is_read_again(storage, tmp_path):
    version = storage.write("a/run.json", b"one")
    assert storage.read_if_changed("a/run.json", None) == (b"one", version)
    assert storage.read_if_changed("a/run.json", version) is None
    newer = storage.write("a/run.json", b"two")
    assert storage.read_if_changed("a/run.json", version) == (b"two", newer)


def test_a_condition_that_does_not_hold_writes_nothing(storage):
    first = storage.write("a", b"one", if_absent=True)
    with pytest.raises(Conflict, match="a is there already"):
        storage.write("a", b"two", if_absent=True)
    assert storage.read("a") == (b"one", first)
    second = storage.write("a", b"two", if_version=first)
    with pytest.raises(Conflict, match="by somebody else meanwhile"):
        storage.write("a", b"three", if_version=first)
    assert storage.read("a") == (b"two", second)
    storage.delete(["a"])
    with pytest.raises(Conflict):
        storage.write("a", b"three", if_version=second)
    assert storage.entries() == []
    storage.write("a", b"one", if_absent=True)


def test_of_many_who_make_an_object_one_does(storage):
    def make(index):
        try:
            storage.write("a", b"%d" % index, if_absent=True)
        except Conflict:
            return None
        return b"%d" % index

    made = [data for data in all_at_once(8, make) if data is not None]
    assert made == [storage.read("a")[0]]


def test_many_who_count_together_lose_no_number(storage):
    storage.write("count", b"0")

    def count(_):
        for _ in range(5):
            while True:
                data, version = storage.read("count")
                try:
                    storage.write("count", b"%d" % (int(data) + 1), if_version=version)
                    break
                except Conflict:
                    continue

    all_at_once(6, count)
    assert storage.read("count")[0] == b"30"


def test_a_reader_sees_the_old_or_the_new(storage):
    whole = [bytes([letter]) * 200_000 for letter in b"ab"]
    storage.write("a", whole[0])
    done = threading.Event()

    def write(_):
        for turn in range(1, 20):
            storage.write("a", whole[turn % 2])
        done.set()

    def read(_):
        seen = set()
        while not done.is_set():
            seen.add(storage.read("a")[0])
        return seen

    _, seen = all_at_once(2, lambda index: (write, read)[index](index))
    assert seen <= set(whole)


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", "..", "a/../../b", "./a", "a/."])
def test_a_name_that_leads_out_is_refused(name, storage, tmp_path):
    (tmp_path / "b").write_text("secret")
    uses = [
        lambda: storage.read(name),
        lambda: storage.read_if_changed(name, None),
        lambda: storage.write(name, b"x"),
        lambda: storage.upload(tmp_path / "b", name),
        lambda: storage.download(name, tmp_path / "c"),
        lambda: storage.delete([name]),
    ]
    for use in uses:
        with pytest.raises(StorageError, match="is no name of an object") as caught:
            use()
        assert not isinstance(caught.value, NotThere)
    assert (tmp_path / "b").read_text() == "secret"


# -- listings ----------------------------------------------------------------------------------------------------


def test_what_is_there_is_listed_in_order(storage):
    versions = {
        name: storage.write(name, name.encode())
        for name in ("b/z", "a/run.json", "a/c/1", "top", "a-b/x", "a/.metadata")
    }
    assert storage.entries() == [Entry(n, len(n), versions[n]) for n in sorted(versions)]
    assert [e.name for e in storage.entries("a/")] == ["a/.metadata", "a/c/1", "a/run.json"]
    assert [e.name for e in storage.entries("a/c/")] == ["a/c/1"]
    assert storage.entries("nothing/") == []
    assert storage.folders() == ["a", "a-b", "b"]
    assert storage.folders("a/") == ["c"]
    assert storage.folders("a/c/") == []
    assert storage.folders("nothing/") == []


def test_what_is_deleted_is_gone_and_may_have_been_before(storage):
    for name in ("a/b/1", "a/b/2", "a/c"):
        storage.write(name, b"x")
    storage.delete(["a/b/1", "a/nothing", "nowhere/at/all"])
    assert [e.name for e in storage.entries()] == ["a/b/2", "a/c"]
    storage.delete(iter(["a/b/2"]))
    assert storage.folders("a/") == []
    storage.delete([])
    assert storage.folders() == ["a"]


def test_a_listing_is_of_this_moment(storage):
    storage.write("a/1", b"x")
    assert len(storage.entries()) == 1
    storage.write("a/2", b"x")
    assert len(storage.entries()) == 2
    storage.delete(["a/1", "a/2"])
    assert (storage.entries(), storage.folders()) == ([], [])


# -- files -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # Azure's own library does
@pytest.mark.parametrize("size", [0, 1, PART, 2 * PART + 12345])
def test_files_go_there_and_come_back(size, storage, tmp_path):
    (tmp_path / "up").write_bytes(os.urandom(size))
    storage.write("a/file", b"something older")
    storage.upload(tmp_path / "up", "a/file")
    assert [(e.name, e.bytes) for e in storage.entries()] == [("a/file", size)]
    storage.download("a/file", tmp_path / "deep" / "down")
    assert (tmp_path / "deep" / "down").read_bytes() == (tmp_path / "up").read_bytes()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["down"]


def test_a_file_that_cannot_go_or_come(storage, tmp_path):
    storage.write("a/file", b"x")
    with pytest.raises(StorageError, match="nowhere"):
        storage.upload(tmp_path / "nowhere", "a/file")
    assert storage.read("a/file")[0] == b"x"
    (tmp_path / "down").write_text("before")
    with pytest.raises(NotThere, match="a/other does not exist"):
        storage.download("a/other", tmp_path / "down")
    assert (tmp_path / "down").read_text() == "before"
    with pytest.raises(StorageError, match="down/file cannot be written: ") as caught:
        storage.download("a/file", tmp_path / "down" / "file")
    assert not isinstance(caught.value, NotThere)
    assert [e.name for e in storage.entries()] == ["a/file"]


# -- processes ---------------------------------------------------------------------------------------------------

FORKS = """
    import os, sys
    from dtrain.storage import at
    storage = at(sys.argv[1])
    storage.write("a", b"parent")
    child = os.fork()
    if not child:
        assert storage.read("a")[0] == b"parent"
        storage.write("child", b"child")
        grandchild = os.fork()
        if not grandchild:
            storage.write("grandchild", b"grandchild")
            os._exit(0)
        assert os.waitpid(grandchild, 0)[1] == 0
        sys.exit(0)
    storage.write("meanwhile", b"parent")
    assert os.waitpid(child, 0)[1] == 0
    print(*(entry.name for entry in storage.entries()))
"""


def test_a_forked_child_uses_what_its_parent_had_opened(storage):
    command = [sys.executable, "-c", textwrap.dedent(FORKS), storage.uri]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=SOURCE)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.split() == ["a", "child", "grandchild", "meanwhile"]


# -- which one ---------------------------------------------------------------------------------------------------


def test_a_place_is_a_folder_or_a_uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(places.at("runs"), folder.Folder)
    assert places.at("runs").local == tmp_path / "runs"
    assert places.at(f"file://{tmp_path}/x").uri == f"{tmp_path}/x"
    remote = places.at("s3://somewhere/deep/runs/")
    assert (remote.uri, remote.local) == ("s3://somewhere/deep/runs", None)
    assert places.at("s3://somewhere").uri == "s3://somewhere"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("ftp://host/runs", "nobody here serves ftp://; use a folder, s3://, gs:// or abfs://"),
        ("s3:///runs", "a storage is s3://BUCKET/FOLDER"),
        ("s3://bucket/runs?versionId=3", "and nothing after it"),
    ],
)
def test_a_place_that_nobody_serves(place, said):
    with pytest.raises(InputError, match=said):
        places.at(place)


@pytest.mark.parametrize("place", ["s3://AKIA5:hush@bucket/runs", "abfs://c@a.dfs.core.windows.net/r?sv=1&sig=hush"])
def test_a_secret_in_a_place_is_refused_and_not_repeated(place):
    with pytest.raises(InputError, match=r"a storage is (s3|abfs)://BUCKET/FOLDER") as refused:
        places.at(place)
    assert "hush" not in str(refused.value)


class PartsOfGs(Gs):
    """A bucket that forgets nothing and takes no connection: the parts of one upload, and a store that is unwell."""

    def __init__(self, parts):
        self._bucket, self.files = "b", SimpleNamespace(base="")
        self.marks = dict.fromkeys(parts, "")
        self.is_unwell = True

    def _call(self, method, url, data=None, **_):
        key = unquote(url.removeprefix("b/b/o/")).removesuffix("/compose")
        if method == "GET" and key not in self.marks:
            raise Refused(404, "Object not found.")
        if method == "GET":
            found = {"size": 1, "generation": 1, "metadata": {"dtrain-mark": self.marks[key]}}
            return {}, json.dumps(found).encode()
        asked = json.loads(data.read())
        if not {source["name"] for source in asked["sourceObjects"]} <= set(self.marks):
            raise Refused(404, "Object not found.")
        self.marks[key] = asked["destination"]["metadata"]["dtrain-mark"]
        return {}, b""

    def delete(self, keys):
        for key in keys:
            self.marks.pop(key, None)
            if self.is_unwell:
                self.is_unwell = False
                raise Refused(503, "later")


@pytest.mark.parametrize("num_parts", [3, 40])
def test_parts_composed_into_an_object_are_deleted_though_the_store_is_unwell_meanwhile(num_parts):
    parts = [f"x.dtrain-part-m-{number:04d}" for number in range(num_parts)]
    store = PartsOfGs(parts)
    with pytest.raises(Refused, match="later"):
        store.finish("x", "x.dtrain-part-m", "m", parts)
    with pytest.raises(Refused, match="not found"):
        PartsOfGs(parts[1:]).finish("x", "x.dtrain-part-m", "another", parts)
    store.finish("x", "x.dtrain-part-m", "m", parts)
    assert store.marks == {"x": "m"}


def test_a_place_whose_package_is_missing_says_what_to_install(monkeypatch):
    for package, place, extra in [("s3fs", "s3", "s3"), ("gcsfs", "gs", "gcs"), ("adlfs", "abfs", "azure")]:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            InputError, match=f"{place}://b needs the package {package} .*pip install 'dtrain.{extra}.'"
        ):
            places.at(f"{place}://b")


def test_to_open_a_bucket_reads_neither_torch_nor_ray():
    script = (
        "import sys; from dtrain.storage import at, lease; at('s3://b'); print({'torch', 'ray'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=SOURCE)
    assert found.stdout == "set()\n", found.stderr


# -- a folder's own ----------------------------------------------------------------------------------------------


def test_what_other_tools_put_in_a_folder_is_seen(tmp_path):
    storage = folder.open(str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "events.jsonl").write_text("{}\n")
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    data, version = storage.read("a/events.jsonl")
    with (tmp_path / "a" / "events.jsonl").open("a") as file:
        file.write("{}\n")
    assert storage.read_if_changed("a/events.jsonl", version)[0] == data * 2
    assert storage.folders() == ["a"]


def test_a_folder_shows_no_files_of_its_own(tmp_path):
    storage = folder.open(str(tmp_path / "runs"))
    storage.write("a", b"x")
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"a", folder.LOCK}
    assert [e.name for e in storage.entries()] == ["a"]
    (tmp_path / "runs" / "b").mkdir()
    (tmp_path / "runs" / "b" / f".c{folder.WRITING}1234").touch()  # of a writer that was killed
    assert storage.folders() == []


def test_several_users_may_share_a_folder(tmp_path):
    before = os.umask(0o077)
    try:
        folder.open(str(tmp_path)).write("a", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / folder.LOCK).stat().st_mode & 0o777 == 0o666


def test_a_condition_is_judged_and_acted_on_under_one_lock(tmp_path):
    """Between the two nobody else may write, on whichever machine."""
    storage = folder.open(str(tmp_path))
    version = storage.write("a", b"one")
    with (tmp_path / folder.LOCK).open() as held, ThreadPoolExecutor(2) as pool:
        fcntl.flock(held, fcntl.LOCK_EX)
        late = [pool.submit(storage.write, "a", b"two", if_version=version), pool.submit(storage.write, "b", b"plain")]
        assert not wait(late, timeout=0.3).done
        (tmp_path / "a").write_bytes(b"by somebody else")
        fcntl.flock(held, fcntl.LOCK_UN)
        assert late[1].result() == storage.read("b")[1]
        with pytest.raises(Conflict):
            late[0].result()
    assert storage.read("a")[0] == b"by somebody else"


def test_a_folder_that_cannot_be_written_says_why(tmp_path):
    (tmp_path / "file").touch()
    storage = folder.open(str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"file/a cannot be written: (Not a directory|File exists)"):
        storage.write("a", b"x")
    assert storage.entries() == []


KILLED = """
    import sys
    from dtrain.storage import folder
    storage = folder.open(sys.argv[1])
    print("ready", flush=True)
    while True:
        for letter in b"ab":
            storage.write("a", bytes([letter]) * 3_000_000)
"""


@pytest.mark.parametrize("delay_s", [0.02, 0.05, 0.11])
def test_a_writer_that_is_killed_leaves_a_whole_object_and_no_lock(delay_s, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=SOURCE) as child:
        assert child.stdout.readline() == b"ready\n"
        threading.Event().wait(delay_s)
        child.kill()
    storage = folder.open(str(tmp_path))
    for entry in storage.entries():
        data, _ = storage.read(entry.name)
        assert (entry.name, len(data), len(set(data))) == ("a", 3_000_000, 1)
    storage.write("a", b"next")
    assert storage.read("a")[0] == b"next"
