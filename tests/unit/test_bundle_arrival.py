"""What was sent arrives whole, or not at all; and a plan means the same there."""

import base64
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from bundling import TASK, a_plan_of, a_script_plan, repository, ship, write
from making import a_plan

from dtrain import bundle, code
from dtrain.bundle import archive
from dtrain.bundle.archive import Item
from dtrain.errors import ClusterError, StorageError
from dtrain.storage import Storage, at

FILES = {
    "jobs/task.py": "from lib import helper\n\ndef build(data, train):\n    return helper.WORD\n",
    "jobs/lib/helper.py": "WORD = 'helped'\n",
    "jobs/my_data.py": "def open_data():\n    return 1\n",
}


@pytest.fixture(autouse=True)
def nothing_stays_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("task", "lib", "my_data", "my_package"):
            del sys.modules[name]


def test_the_code_of_a_job_runs_where_the_client_s_folder_is_not(tmp_path: Path) -> None:
    root = repository(tmp_path / "client", FILES)
    plan = a_plan_of(root / "jobs", data={"name": "custom", "open": "./my_data.py:open_data"})
    storage = at(str(tmp_path / "storage"))
    said: list[str] = []
    sent = ship(storage, "mine-1", plan, say=said.append)
    assert said == [f"sending 3 files of {root} ({sent.shipped.total_bytes} B)"]
    shutil.rmtree(root)
    moved = bundle.arrive(storage, "mine-1", plan, tmp_path / "node")
    here = tmp_path / "node" / sent.shipped.digest[:16]
    assert moved.model.build == f"{here}/jobs/task.py:build"
    assert moved.model.path == moved.data.path == f"{here}/jobs"
    assert moved.data.open == f"{here}/jobs/my_data.py:open_data"
    assert sorted(moved.code) == [f"{here}/jobs/my_data.py", f"{here}/jobs/task.py"]
    assert code.changed(moved.code) == []
    assert code.load(moved.model.build, moved.model.path)(None, None) == "helped"
    (here / "jobs/task.py").write_text(TASK)
    assert code.changed(moved.code) == [f"{here}/jobs/task.py"]


def test_the_same_tree_has_one_name_and_is_stored_once(tmp_path: Path) -> None:
    storage = at(str(tmp_path / "storage"))
    one = repository(tmp_path / "one", FILES)
    two = write(tmp_path / "two", FILES)
    for path in two.rglob("*.py"):
        os.utime(path, (1, 1))
        path.chmod(0o600)
    first = ship(storage, "mine-1", a_plan_of(one / "jobs"))
    stored = storage.entries("code/")
    second = ship(storage, "mine-2", a_plan_of(two / "jobs"), two)
    assert first.archive == second.archive
    assert first.name == second.name == stored[0].name
    assert storage.entries("code/") == stored
    names = {first.name}
    (two / "jobs/task.py").chmod(0o700)
    names.add(bundle.pack(a_plan_of(two / "jobs"), two).name)
    (two / "jobs/task.py").rename(two / "jobs/task_.py")
    names.add(bundle.pack(a_plan_of(two / "jobs", "./task_.py:build"), two).name)
    (two / "jobs/task_.py").write_text(TASK)
    names.add(bundle.pack(a_plan_of(two / "jobs", "./task_.py:build"), two).name)
    assert len(names) == 4


def test_neither_time_nor_order_leaves_a_trace_in_an_archive() -> None:
    items = [Item(name, "file", name.encode()) for name in ("b", "a/c", "a.b", "ä")]
    assert archive.pack(items) == archive.pack(items[::-1])
    assert archive.digest(items) == archive.digest(items[::-1])
    assert archive.pack(items)[4:8] == bytes(4)  # where gzip keeps the time


class Counting:
    """A storage that counts what is written to it."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.written: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def write(self, name: str, data: bytes, **conditions: Any) -> str:
        self.written.append(name)
        return self._storage.write(name, data, **conditions)


def test_code_that_is_there_is_not_sent_again(tmp_path: Path) -> None:
    root = write(tmp_path / "client", {"train.py": ""})
    storage = Counting(at(str(tmp_path / "storage")))
    sent = ship(storage, "mine-1", a_script_plan(root))
    ship(storage, "mine-2", a_script_plan(root))
    assert storage.written == [sent.name, "mine-1/code.json", "mine-2/code.json"]


def test_modes_links_and_odd_names_arrive_as_they_were(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9 \n'x'.txt")
    root = write(
        tmp_path / "client", {"train.py": "", "run.sh": "#!/bin/sh\n", odd: "odd", "größe/é.txt": "1", "x" * 120: ""}
    )
    (root / "run.sh").chmod(0o755)
    (root / "link.sh").symlink_to("run.sh")
    storage = at(str(tmp_path / "storage"))
    sent = ship(storage, "mine-1", a_script_plan(root))
    here = bundle.fetch(storage, sent.shipped.digest, tmp_path / "node")
    names = [str(path.relative_to(here)) for path in here.rglob("*") if not path.is_dir()]
    assert sorted(names) == sorted(["train.py", "run.sh", odd, "größe/é.txt", "x" * 120, "link.sh"])
    assert os.readlink(here / "link.sh") == "run.sh"
    assert (here / "run.sh").stat().st_mode & 0o777 == 0o755
    assert (here / "train.py").stat().st_mode & 0o777 == 0o644
    assert (here / odd).read_text() == "odd"


def test_a_damaged_word_of_where_the_code_is_is_named(tmp_path: Path) -> None:
    plan, storage = a_script_plan(write(tmp_path / "client", {"train.py": ""})), at(str(tmp_path / "storage"))
    ship(storage, "mine-1", plan)
    storage.write("mine-1/code.json", b'{"digest": ')
    with pytest.raises(StorageError, match=r"mine-1/code\.json is damaged"):
        bundle.arrive(storage, "mine-1", plan, tmp_path / "node")


def test_many_processes_of_a_node_may_fetch_at_once(tmp_path: Path) -> None:
    root = write(tmp_path / "client", {"train.py": "", **{f"f{n}.py": "x" * n for n in range(200)}})
    storage = at(str(tmp_path / "storage"))
    sent = ship(storage, "mine-1", a_script_plan(root))

    def fetch(_: int) -> int:
        return len(list(bundle.fetch(storage, sent.shipped.digest, tmp_path / "node").iterdir()))

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(fetch, range(16))) == {201}
    assert [path.name for path in (tmp_path / "node").iterdir()] == [sent.shipped.digest[:16]]


def test_an_archive_that_is_not_what_was_sent_is_refused_and_nothing_of_it_written(tmp_path: Path) -> None:
    root = write(tmp_path / "client", {"train.py": "print(1)\n" * 100})
    plan, storage = a_script_plan(root), at(str(tmp_path / "storage"))
    sent = ship(storage, "mine-1", plan)
    other = archive.pack([Item("train.py", "file", b"import os")])
    flipped = bytearray(sent.archive)
    flipped[len(flipped) // 2] ^= 1
    for broken in (other, bytes(flipped), sent.archive[:-20], b"", b"no archive"):
        storage.write(sent.name, broken)
        with pytest.raises(StorageError) as refused:
            bundle.arrive(storage, "mine-1", plan, tmp_path / "node")
        assert f"{sent.name} in {tmp_path}/storage is not what was submitted; delete it and" in refused.value.message
        assert not (tmp_path / "node").exists()
    storage.delete([sent.name])
    with pytest.raises(StorageError, match=rf"there is no {sent.name} in .*; submit the job again"):
        bundle.arrive(storage, "mine-1", plan, tmp_path / "node")


@pytest.mark.parametrize(
    "items",
    [
        [Item("/tmp/x", "file", b"")],
        [Item("../x", "file", b"")],
        [Item("a/../../x", "file", b"")],
        [Item("a//b", "file", b"")],
        [Item("./x", "file", b"")],
        [Item("x", "link", b"/etc/passwd")],
        [Item("x", "link", b"../x")],
        [Item("a/x", "link", b"../../x")],
        [Item("d", "link", b"."), Item("e", "link", b"d/..")],
        [Item("d", "link", b"sub"), Item("sub/f", "file", b""), Item("d/x", "file", b"")],
        [Item("d", "link", b"sub"), Item("e", "link", b"d/x")],
        [Item("d", "link", b"e"), Item("e", "link", b"d")],
        [Item("f", "file", b""), Item("f/g", "file", b"")],
        [Item("f", "file", b""), Item("f", "file", b"1")],
    ],
)
def test_an_archive_that_leads_out_of_its_folder_is_not_unpacked_even_if_its_name_is_right(items: list[Item]) -> None:
    with pytest.raises(StorageError, match="leads out of its folder; it is not unpacked"):
        archive.open_verified(archive.pack(items), archive.digest(items), "here")


def special(kind: bytes) -> Callable[[tarfile.TarFile], None]:
    def add(made: tarfile.TarFile) -> None:
        entry = tarfile.TarInfo("x")
        entry.type, entry.linkname = kind, "train.py"
        made.addfile(entry)

    return add


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_an_archive_of_anything_else_than_files_and_links_is_refused(kind: bytes) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as made:
        special(kind)(made)
    with pytest.raises(StorageError, match="x is neither a file nor a link"):
        archive.open_verified(out.getvalue(), "0" * 64, "here")


def test_an_archive_that_unpacks_to_more_than_anybody_sends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [Item("zeros", "file", bytes(100_000))]
    packed, name = archive.pack(items), archive.digest(items)
    assert archive.open_verified(packed, name, "here") == items
    monkeypatch.setattr(archive, "UNPACKED_LIMIT", 99_999)
    with pytest.raises(StorageError, match="it unpacks to more than 99,999 bytes"):
        archive.open_verified(packed, name, "here")


def test_a_tiny_archive_may_come_as_a_config_map_and_is_verified_all_the_same(tmp_path: Path) -> None:
    root = write(tmp_path / "client", {"train.py": ""})
    plan, storage = a_script_plan(root), at(str(tmp_path / "storage"))
    sent = ship(storage, "mine-1", plan)
    storage.delete([sent.name])
    ((key, encoded),) = bundle.config_map_data(sent).items()
    mounted = write(tmp_path / "mounted", {key: base64.b64decode(encoded)})
    moved = bundle.arrive(storage, "mine-1", plan, tmp_path / "node", mounted)
    assert Path(moved.entrypoint.script).is_file()
    (mounted / key).write_bytes(b"")
    with pytest.raises(StorageError, match="is not what was submitted"):
        bundle.arrive(storage, "mine-1", plan, tmp_path / "another", mounted)
    large = write(root, {"noise.bin": os.urandom(600_000)})
    assert bundle.config_map_data(bundle.pack(a_script_plan(large))) is None


def test_a_run_that_sent_nothing_keeps_its_plan_where_its_code_can_be_seen(tmp_path: Path) -> None:
    storage = at(str(tmp_path / "storage"))
    shipped_parts = a_plan(tmp_path)
    assert ship(storage, "tiny-1", shipped_parts) is None
    assert storage.entries() == []
    assert bundle.arrive(storage, "tiny-1", shipped_parts, tmp_path / "node") == shipped_parts
    root = write(tmp_path / "shared", {"task.py": TASK})
    plan = a_plan_of(root)
    assert bundle.arrive(storage, "mine-1", plan, tmp_path / "node") == plan
    (root / "task.py").unlink()
    with pytest.raises(
        StorageError, match=r"task\.py is not on this node, and mine-1 has no code\.json that says where"
    ):
        bundle.arrive(storage, "mine-1", plan, tmp_path / "node")


@pytest.mark.parametrize("with_git", [True, False])
def test_a_package_of_ones_own_that_the_client_imports_from_its_source_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_git: bool
) -> None:
    """As `pip install -e` leaves it: found through the import path, in the project's src/."""
    files = {"src/my_package/__init__.py": "", "src/my_package/task.py": TASK, "jobs/j.yaml": ""}
    root = (repository if with_git else write)(tmp_path / "client", files)
    monkeypatch.syspath_prepend(str(root / "src"))
    plan = a_plan_of(root / "jobs", "my_package.task:build")
    storage = at(str(tmp_path / "storage"))
    ship(storage, "mine-1", plan)
    shutil.rmtree(root)
    moved = bundle.arrive(storage, "mine-1", plan, tmp_path / "node")
    assert moved.model.build == "my_package.task:build"
    assert code.changed(moved.code) == []
    words = [sys.executable, "-c", "import sys\nfrom dtrain import code\nprint(code.load(*sys.argv[1:])(0, 0))"]
    done = subprocess.run([*words, moved.model.build, moved.model.path], capture_output=True, text=True, timeout=60)
    assert done.stdout == "the task\n", done.stderr


def test_in_a_folder_that_the_nodes_see_too_the_code_is_put_once_for_all(tmp_path: Path) -> None:
    root = write(tmp_path / "client", FILES)
    storage, plan = at(str(tmp_path / "storage")), a_plan_of(root / "jobs")
    sent = ship(storage, "mine-1", plan)
    shutil.rmtree(root)
    settled = bundle.settle(storage, plan, sent)
    assert settled.model.path == f"{tmp_path}/storage/code/{sent.shipped.digest[:16]}"
    assert code.load(settled.model.build, settled.model.path)(None, None) == "helped"
    assert bundle.arrive(storage, "mine-2", settled, tmp_path / "node") == settled


def test_a_package_that_only_the_client_has_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = write(tmp_path / "site-packages", {"my_package/__init__.py": "", "my_package/task.py": TASK})
    storage = at(str(tmp_path / "storage"))
    with monkeypatch.context() as client:
        client.syspath_prepend(str(installed))
        plan = a_plan_of(tmp_path, "my_package.task:build")
        assert ship(storage, "mine-1", plan) is None
        said: list[str] = []
        assert bundle.arrive(storage, "mine-1", plan, tmp_path / "node", say=said.append) == plan
        assert said == []
        write(installed, {"my_package/task.py": "def build(data, train): ...\n"})
        bundle.arrive(storage, "mine-1", plan, tmp_path / "node", say=said.append)
        assert len(said) == 1
        assert "task.py is not what my_package.task was when the job was submitted" in said[0]
    sys.modules.pop("my_package", None)
    with pytest.raises(ClusterError, match=r"this image has no module my_package\.task, .*; install it in the image"):
        bundle.arrive(storage, "mine-1", plan, tmp_path / "node")


def test_nothing_heavy_is_imported() -> None:
    words = "import sys, dtrain.bundle, dtrain.handshake; print({'torch', 'ray', 'fsspec'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
