"""Checkpoints on storage: whole or not at all, and trusted only after every byte was checked."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dtrain.checkpoint import store
from dtrain.errors import StorageError
from dtrain.spec.job import Keep


def tensors(value=1.0, size=1000):
    return {
        "model.main.weight": torch.full((size,), float(value)),
        "model.main.half": torch.full((7, 3), float(value), dtype=torch.bfloat16),
        "optimizer.train.main.weight.step": torch.tensor(float(value)),
        "model.main.count": torch.tensor(int(value)),
    }


def write(folder, *steps, loss=None, size=1000):
    for step in steps:
        store.write(folder, step, tensors(step, size), {"metrics": {"loss": loss} if loss is not None else {}})


def newest(folder):
    """Step of the newest valid checkpoint, and what was said of those passed over."""
    said = []
    found = store.newest_valid(folder, said.append)
    return (found[1]["step"] if found else None), said


def shard(folder, step):
    return max(store.path_of(folder, step).glob("*.distcp"), key=lambda p: p.stat().st_size)


# -- written and read --------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    size = store.write(tmp_path, 7, tensors(7), {"metrics": {"loss": 2.5}, "num_workers": 2})
    path, manifest = store.newest_valid(tmp_path, pytest.fail)
    assert path.name == "step-00000007"
    assert (manifest["step"], manifest["metrics"], manifest["num_workers"]) == (7, {"loss": 2.5}, 2)
    files = {p.name: p.stat().st_size for p in path.iterdir()}
    assert files.keys() - manifest["files"].keys() == {store.MARKER, store.MANIFEST}
    assert size == sum(facts["bytes"] for facts in manifest["files"].values())
    live = tensors(0)
    store.read_into(path, live)
    assert all(torch.equal(live[name], expected) for name, expected in tensors(7).items())


def test_the_tools_of_torch_read_it(tmp_path):
    write(tmp_path, 7)
    dcp_to_torch_save(store.path_of(tmp_path, 7), tmp_path / "whole.pt")
    found = torch.load(tmp_path / "whole.pt")
    assert found.keys() == tensors().keys()
    assert all(torch.equal(found[name], expected) for name, expected in tensors(7).items())


def test_nothing_there(tmp_path):
    assert newest(tmp_path) == (None, [])
    assert newest(tmp_path / "nowhere") == (None, [])
    assert store.steps(tmp_path / "nowhere") == []


def test_steps_beyond_eight_digits_keep_their_order(tmp_path):
    write(tmp_path, 99_999_999, 100_000_000)
    assert store.steps(tmp_path) == [99_999_999, 100_000_000]
    assert newest(tmp_path)[0] == 100_000_000


def test_a_step_can_be_written_again(tmp_path):
    write(tmp_path, 5)
    store.write(tmp_path, 5, tensors(55), {})
    live = tensors(0)
    store.read_into(store.path_of(tmp_path, 5), live)
    assert int(live["model.main.count"]) == 55
    assert newest(tmp_path) == (5, [])


@pytest.mark.parametrize(
    ("live", "what"),
    [
        ({**tensors(), "model.main.new": torch.zeros(3)}, "model.main.new"),
        ({"model.main.weight": torch.zeros(1001)}, "weight"),
        ({"model.main.weight": torch.zeros(10, 100)}, "weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_where(live, what, tmp_path):
    write(tmp_path, 5)
    with pytest.raises(StorageError, match=what):
        store.read_into(store.path_of(tmp_path, 5), live)


# -- damaged -----------------------------------------------------------------------------------------------------


def flip(path, at=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def change_manifest(path):
    manifest = json.loads((path / store.MANIFEST).read_text())
    manifest["step"] = 29
    (path / store.MANIFEST).write_text(json.dumps(manifest))


DAMAGE = {
    "a flipped byte": (lambda p, s: flip(s), "has changed since it was written"),
    "a flipped byte of the index": (lambda p, s: flip(p / ".metadata"), ".metadata has changed"),
    "a truncated shard": (lambda p, s: os.truncate(s, 100), "has 100 bytes instead of"),
    "an empty shard": (lambda p, s: os.truncate(s, 0), "has 0 bytes instead of"),
    "a longer shard": (lambda p, s: os.truncate(s, s.stat().st_size + 1), "instead of"),
    "a missing shard": (lambda p, s: s.unlink(), "is missing"),
    "a missing index": (lambda p, s: (p / ".metadata").unlink(), ".metadata is missing"),
    "a shard that is a folder": (lambda p, s: (s.unlink(), s.mkdir()), "is missing"),
    "no marker": (lambda p, s: (p / store.MARKER).unlink(), "no COMMITTED marker: it was never finished"),
    "an empty marker": (lambda p, s: (p / store.MARKER).write_text(""), "not the one that was committed"),
    "a marker that is not text": (
        lambda p, s: (p / store.MARKER).write_bytes(b"\xff\xfe"),
        "not the one that was committed",
    ),
    "a changed manifest": (lambda p, s: change_manifest(p), "manifest.json is not the one that was committed"),
    "no manifest": (lambda p, s: (p / store.MANIFEST).unlink(), "manifest.json cannot be read (No such file"),
    "nothing at all": (lambda p, s: [f.unlink() for f in p.iterdir()], "no COMMITTED marker"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(what, tmp_path):
    write(tmp_path, 10, 20, 30)
    path = store.path_of(tmp_path, 30)
    damage, reason = DAMAGE[what]
    damage(path, shard(tmp_path, 30))
    step, said = newest(tmp_path)
    assert step == 20
    assert len(said) == 1
    assert said[0].startswith("checkpoint step-00000030: ")
    assert reason in said[0]
    assert said[0].endswith("going back to the one before")


def test_two_damaged_ones_are_both_named(tmp_path):
    write(tmp_path, 10, 20, 30)
    flip(shard(tmp_path, 30))
    shard(tmp_path, 20).unlink()
    step, said = newest(tmp_path)
    assert step == 10
    assert [line.split()[1] for line in said] == ["step-00000030:", "step-00000020:"]


def test_none_is_left(tmp_path):
    write(tmp_path, 10)
    flip(shard(tmp_path, 10))
    step, said = newest(tmp_path)
    assert (step, len(said)) == (None, 1)


def test_each_byte_counts(tmp_path):
    """No byte of any file can change without being noticed."""
    store.write(tmp_path, 1, {"w": torch.ones(4)}, {})
    path = store.path_of(tmp_path, 1)
    for file in path.iterdir():
        for at in range(0, file.stat().st_size, max(1, file.stat().st_size // 25)):
            flip(file, at)
            with pytest.raises(StorageError):
                store.verify(path)
            flip(file, at)
    store.verify(path)


def test_other_things_in_the_folder_are_left_alone(tmp_path):
    write(tmp_path, 10)
    (tmp_path / "notes").mkdir()
    (tmp_path / "step-abc").touch()
    (tmp_path / "step-00000099").touch()
    assert store.steps(tmp_path) == [10]
    assert newest(tmp_path)[0] == 10
    assert store.prune(tmp_path, Keep(last=1, best=0)) == []


# -- interrupted -------------------------------------------------------------------------------------------------

WRITER = """
    import sys; from pathlib import Path
    import torch
    from dtrain.checkpoint import store
    folder, size = Path(sys.argv[1]), int(sys.argv[2])
    weights = torch.empty(size)
    print("ready", flush=True)
    step = 0
    while True:
        step += 1
        weights.fill_(step)
        store.write(folder, step, {"w": weights}, {"metrics": {"loss": 1.0 / step}})
        print(step, flush=True)
        if step > 3:
            store.prune(folder, store.Keep(last=2, best=0))
"""


def killed_writer(folder, delay_s, size=200_000):
    """Let a writer write checkpoints until it is killed; returns the last step it says it has committed."""
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(folder), str(size)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"
    time.sleep(delay_s)
    child.send_signal(signal.SIGKILL)
    said = child.stdout.read().split()
    child.stdout.close()
    child.wait()
    return int(said[-1]) if said else 0


@pytest.mark.parametrize("delay_s", [0.0, 0.013, 0.055, 0.233])
def test_a_writer_killed_at_any_moment_leaves_what_was_committed(delay_s, tmp_path):
    committed = killed_writer(tmp_path, delay_s)
    step, said = newest(tmp_path)
    assert (step or 0) >= committed
    assert all("no COMMITTED marker" in line for line in said), said
    if step:
        live = {"w": torch.zeros(200_000)}
        store.read_into(store.path_of(tmp_path, step), live)
        assert bool((live["w"] == step).all())
    write(tmp_path, 10_000)  # and whoever comes next writes on
    assert newest(tmp_path) == (10_000, [])


KILL_AT = """
    import os, shutil, signal, sys; from pathlib import Path
    import torch, torch.distributed.checkpoint
    from dtrain.checkpoint import store

    def write(folder, point):
        calls = 0
        def die_at(name):
            original = getattr(os, name)
            def counted(*args, **words):
                nonlocal calls
                calls += 1
                if calls == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **words)
            setattr(os, name, counted)
        for name in ("fsync", "replace", "mkdir", "rename", "open", "unlink"):
            die_at(name)
        store.write(folder, 20, {"w": torch.full((1000,), 20.0)}, {})

    root, status, point = Path(sys.argv[1]), -1, 0
    while status:
        point += 1
        folder = root / str(point)
        shutil.copytree(root / "before", folder)
        child = os.fork()
        if not child:
            code = 1
            try:
                write(folder, point)
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), status
    print(point)
"""


def test_a_writer_killed_before_each_of_its_calls_to_the_system(tmp_path):
    """At every point either the new checkpoint is whole, or the old one is the newest and the new one unfinished."""
    store.write(tmp_path / "before", 10, {"w": torch.full((1000,), 10.0)}, {})
    command = [sys.executable, "-c", textwrap.dedent(KILL_AT), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    seen = []
    for point in range(1, int(result.stdout) + 1):
        folder = tmp_path / str(point)
        step, said = newest(folder)
        live = {"w": torch.zeros(1000)}
        store.read_into(store.path_of(folder, step), live)
        assert bool((live["w"] == step).all())
        assert said == [] or (step == 10 and "no COMMITTED marker" in said[0])
        seen.append(step)
    assert seen[0] == 10
    assert seen[-1] == 20
    assert seen == sorted(seen)
    assert len(seen) > 8


def test_a_removal_interrupted_leaves_no_checkpoint_with_holes(tmp_path, monkeypatch):
    write(tmp_path, 10, 20, 30)

    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shutil, "rmtree", fail)
    with pytest.raises(StorageError, match="step-00000020: Input/output error"):
        store.prune(tmp_path, Keep(last=1, best=0))
    monkeypatch.undo()
    assert store.steps(tmp_path) == [30]
    flip(shard(tmp_path, 30))
    step, said = newest(tmp_path)
    assert step is None
    assert "no COMMITTED marker" in said[1]


# -- kept --------------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, loss in [(10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5)]:
        write(tmp_path, step, loss=loss)
    assert store.prune(tmp_path, Keep(last=1, best=1)) == [10, 30]
    assert store.steps(tmp_path) == [20, 40]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000040"]


def test_what_cannot_be_read_is_not_counted_as_kept(tmp_path):
    write(tmp_path, 10, 20, 30)
    (store.path_of(tmp_path, 30) / store.MARKER).write_text("0" * 64)
    assert store.prune(tmp_path, Keep(last=2, best=0)) == []
    assert newest(tmp_path)[0] == 20


def test_unfinished_ones_go_when_a_newer_one_is_kept(tmp_path):
    """A writer that was killed leaves bytes that nobody would ever remove."""
    write(tmp_path, 10, 20, 30)
    for step in (10, 20):
        (store.path_of(tmp_path, step) / store.MARKER).unlink()
    store.prune(tmp_path, Keep(last=2, best=0))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000030"]


# -- storage refuses ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder, size):
    """A tiny file system at `folder`; skips where this user may not mount one."""
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a tiny tmpfs needs root")
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tiny tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


PAGE = 4096


@pytest.mark.parametrize("pages_short", [1, 2, 3, 5, 100, 190])
def test_a_full_disk_leaves_the_one_before_and_no_rubbish(pages_short, tmp_path):
    """The second checkpoint does not fit: in its marker, its manifest, its index, or its shards."""
    write(tmp_path / "sizes", 10, size=200_000)
    sizes = [p.stat().st_size for p in store.path_of(tmp_path / "sizes", 10).iterdir()]
    num_pages = sum(-(-size // PAGE) for size in sizes)
    disk = tmp_path / "disk"
    with small_disk(disk, PAGE * (2 * num_pages - pages_short)):
        folder = disk / "checkpoints"
        write(folder, 10, size=200_000)
        with pytest.raises(StorageError, match="No space left on device"):
            write(folder, 20, size=200_000)
        assert newest(folder) == (10, [])
        assert [p.name for p in folder.iterdir()] == ["step-00000010"]
        write(folder, 30, size=1000)
        assert newest(folder) == (30, [])


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Not a directory"):
        write(tmp_path / "file" / "checkpoints", 10)


@pytest.mark.parametrize("call", range(1, 9))
def test_a_disk_that_fails_while_data_is_made_durable(call, tmp_path, monkeypatch):
    write(tmp_path, 10)
    original, calls = os.fsync, [0]

    def fsync(descriptor):
        calls[0] += 1
        if calls[0] == call:
            raise OSError(errno.EIO, "Input/output error")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    try:
        write(tmp_path, 20)
    except StorageError as error:
        assert "Input/output error" in error.message
        assert newest(tmp_path) == (10, [])
        assert not store.path_of(tmp_path, 20).exists()
    else:
        assert calls[0] < call
        assert newest(tmp_path) == (20, [])


def test_the_same_step_that_fails_to_be_written_again(tmp_path, monkeypatch):
    """Rewriting a step removes the old one first; what was before it is not touched."""
    write(tmp_path, 10, 20)
    monkeypatch.setattr(store, "_sha256", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(StorageError):
        write(tmp_path, 20)
    monkeypatch.undo()
    assert newest(tmp_path) == (10, [])


def test_what_dcp_says_without_a_process_group_is_no_warning(tmp_path, recwarn):
    write(tmp_path, 1)
    store.read_into(store.path_of(tmp_path, 1), tensors(0))
    assert [str(w.message) for w in recwarn if Path(w.filename).name != "typed_storage"] == []
