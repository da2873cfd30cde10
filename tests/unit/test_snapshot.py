"""The training state in shared memory: every byte once, torn copies known for what they are."""

import errno
import itertools
import mmap
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.checkpoint import snapshot as module
from dtrain.checkpoint.snapshot import HEADER, SLOT, Snapshot, layout
from dtrain.errors import StorageError

DTYPES = ["float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool", "complex64"]
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
STATES = st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES), st.booleans()), min_size=1, max_size=8)


def tensor(shape, dtype="float32", is_contiguous=True, seed=0):
    """Every byte pattern there is, laid out in memory as asked."""
    dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)
    if is_contiguous or len(shape) < 2:
        return numbers
    return numbers.transpose(0, -1).contiguous().transpose(0, -1)


def state(described):
    return {f"t{i}": tensor(*words, seed=i) for i, words in enumerate(described)}


def contents(snapshot):
    return {piece.name: piece.tensor for piece in snapshot.pieces()}


def fill(snapshot, value):
    for entry in snapshot.entries:
        snapshot.view(entry).fill_(value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state"


# -- shares ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(described=STATES, num_slots=st.integers(1, 9))
def test_shares_cover_every_number_once(described, num_slots, tmp_path_factory):
    tensors = state(described)
    snapshot = Snapshot.create(tmp_path_factory.mktemp("s") / "state", tensors, num_slots)
    written = {name: torch.zeros(t.shape, dtype=torch.int32) for name, t in tensors.items()}
    begin = torch.frombuffer(snapshot._memory, dtype=torch.uint8).data_ptr() + snapshot._data_offset
    for slot in range(num_slots):
        for destination, source in snapshot.share(slot, tensors):
            assert destination.shape == source.shape
            at = destination.data_ptr() - begin
            entry = next(e for e in snapshot.entries if e.num_bytes and e.offset <= at < e.offset + e.num_bytes)
            size = destination.element_size()
            first = (at - entry.offset) // size
            if destination.shape == entry.shape:
                written[entry.name] += 1
            else:
                written[entry.name].view(-1)[first : first + destination.numel()] += 1
    assert all(bool((count == 1).all()) for count in written.values())


@settings(deadline=None, max_examples=100)
@given(described=STATES, num_slots=st.integers(1, 5), step=st.integers(0, 2**62))
def test_what_all_ranks_copied_is_read_back_bit_for_bit(described, num_slots, step, tmp_path_factory):
    tensors = state(described)
    snapshot = Snapshot.create(tmp_path_factory.mktemp("s") / "state", tensors, num_slots)
    for slot in range(num_slots):
        assert snapshot.step is None
        snapshot.write_share(slot, step, snapshot.share(slot, tensors))
    found = {name: torch.zeros_like(t) for name, t in tensors.items()}
    assert Snapshot.open(snapshot.path).read_into(found) == step
    for name, expected in tensors.items():
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)


def test_shares_are_about_equal(path):
    tensors = {"a": torch.zeros(1000), "b": torch.zeros(3, 333), "c": torch.zeros(7)}
    snapshot = Snapshot.create(path, tensors, 4)
    sizes = [sum(source.numel() for _, source in snapshot.share(slot, tensors)) for slot in range(4)]
    assert sum(sizes) == 2006
    assert max(sizes) - min(sizes) <= 2


@pytest.mark.parametrize("num_slots", [1, 3])
def test_the_room_of_a_share_is_the_memory_that_is_written_to(path, num_slots):
    state = {"big": torch.arange(50_000.0), "small": torch.arange(7, dtype=torch.int64), "none": torch.zeros(0)}
    snapshot = Snapshot.create(path, state, num_slots)
    for slot in range(num_slots):
        share = snapshot.share(slot, state)
        room = snapshot.room(share)
        first, last = room.ctypes.data, room.ctypes.data + room.nbytes
        for destination, _ in share:
            assert first <= destination.data_ptr()
            assert destination.data_ptr() + destination.numel() * destination.element_size() <= last
        assert first % mmap.PAGESIZE == 0, "what is pinned is pinned page by page"
        assert room.nbytes < path.stat().st_size / num_slots + 3 * mmap.PAGESIZE, "no more than that is pinned"
        before = room.copy()
        snapshot.write_share(slot, 1, share)
        assert not np.array_equal(before, room)


def test_entries_are_aligned_and_do_not_overlap():
    entries, size = layout({"a": torch.zeros(3), "b": torch.zeros(0), "c": torch.zeros(17, dtype=torch.uint8)})
    assert [e.offset % 64 for e in entries] == [0, 0, 0]
    assert all(a.offset + a.num_bytes <= b.offset for a, b in itertools.pairwise(entries))
    assert size >= entries[-1].offset + entries[-1].num_bytes


# -- torn ------------------------------------------------------------------------------------------------------


def test_a_share_that_is_missing_or_old_makes_it_torn(path):
    tensors = {"w": torch.ones(100)}
    snapshot = Snapshot.create(path, tensors, 2)
    assert snapshot.step is None
    snapshot.write_share(0, 5, snapshot.share(0, tensors))
    assert snapshot.step is None
    snapshot.write_share(1, 4, snapshot.share(1, tensors))
    assert snapshot.step is None
    with pytest.raises(StorageError, match="not complete"):
        snapshot.read_into(tensors)
    snapshot.write_share(1, 5, snapshot.share(1, tensors))
    assert snapshot.step == 5
    snapshot.invalidate()
    assert snapshot.step is None


def test_a_copy_that_fails_leaves_its_slot_torn(path, monkeypatch):
    tensors = {"w": torch.ones(100)}
    snapshot = Snapshot.create(path, tensors, 1)
    snapshot.write_share(0, 5, snapshot.share(0, tensors))

    def fail(pairs):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(module, "_copy", fail)
    with pytest.raises(RuntimeError):
        snapshot.write_share(0, 6, snapshot.share(0, tensors))
    assert snapshot.step is None
    with pytest.raises(RuntimeError):
        snapshot.write_whole(7, tensors)
    assert snapshot.step is None


def test_a_survivor_writes_in_the_name_of_all(path):
    tensors = {"w": torch.arange(100.0)}
    snapshot = Snapshot.create(path, tensors, 3)
    snapshot.write_share(1, 6, snapshot.share(1, tensors))
    snapshot.write_whole(7, tensors)
    assert snapshot.step == 7
    assert torch.equal(contents(snapshot)["w"], tensors["w"])


COPY_FOREVER = """
    import sys; from pathlib import Path
    import torch
    from dtrain.checkpoint.snapshot import Snapshot
    tensors = {"w": torch.zeros(8_000_000)}
    snapshot = Snapshot.create(Path(sys.argv[1]), tensors, 2)
    share = snapshot.share(1, tensors)
    print("ready", flush=True)
    step = 0
    while True:
        step += 1
        tensors["w"].fill_(step)
        snapshot.write_share(0, step, [])
        snapshot.write_share(1, step, share)
"""


@pytest.mark.parametrize("attempt", range(6))
def test_a_process_killed_while_it_copies_never_leaves_half_a_state(path, attempt):
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(COPY_FOREVER), str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.0037 * attempt)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    snapshot = Snapshot.open(path)
    share = snapshot.view(snapshot.entries[0])[4_000_000:]
    if snapshot.step is not None:
        assert bool((share == snapshot.step).all())


KILLED_IN_MID_COPY = """
    import os, signal, sys; from pathlib import Path
    import torch
    from dtrain.checkpoint import snapshot as module
    tensors = {"w": torch.full((1000,), 2.0)}
    snapshot = module.Snapshot.create(Path(sys.argv[1]), tensors, 2)
    def copy(pairs):
        for destination, source in pairs:
            destination[:100].copy_(source[:100])
        os.kill(os.getpid(), signal.SIGKILL)
    module._copy = copy
    snapshot.write_share(1, 20, snapshot.share(1, tensors))
"""


def test_a_rank_killed_in_the_middle_of_its_copy_leaves_a_torn_slot(path):
    tensors = {"w": torch.full((1000,), 1.0)}
    snapshot = Snapshot.create(path, tensors, 2)
    snapshot.write_whole(10, tensors)
    assert snapshot.step == 10
    command = [sys.executable, "-c", textwrap.dedent(KILLED_IN_MID_COPY), str(path)]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    assert float(contents(snapshot)["w"][599]) == 2.0  # it had begun
    assert snapshot.step is None
    snapshot.write_share(0, 20, snapshot.share(0, tensors))
    assert snapshot.step is None


# -- making ----------------------------------------------------------------------------------------------------


def test_what_is_there_and_fits_is_kept(path):
    tensors = {"w": torch.ones(10), "n": torch.tensor(3)}
    Snapshot.create(path, tensors, 2).write_whole(5, tensors)
    assert Snapshot.create(path, tensors, 2).step == 5


@pytest.mark.parametrize(
    ("tensors", "num_slots"),
    [
        ({"w": torch.ones(11)}, 2),
        ({"w": torch.ones(10, dtype=torch.float64)}, 2),
        ({"v": torch.ones(10)}, 2),
        ({"w": torch.ones(2, 5)}, 2),
        ({"w": torch.ones(10)}, 3),
    ],
)
def test_what_is_laid_out_otherwise_is_made_anew(tensors, num_slots, path):
    old = {"w": torch.ones(10)}
    Snapshot.create(path, old, 2).write_whole(5, old)
    snapshot = Snapshot.create(path, tensors, num_slots)
    assert snapshot.step is None
    snapshot.write_whole(6, tensors)
    assert Snapshot.open(path).step == 6


def test_who_still_reads_the_old_one_goes_on_reading_it(path):
    """The writer may be at work when a smaller world makes its segment anew."""
    old = {"w": torch.full((50_000,), 3.0)}
    held = Snapshot.create(path, old, 2)
    held.write_whole(5, old)
    Snapshot.create(path, {"w": torch.zeros(10)}, 1)
    assert held.step == 5
    assert torch.equal(contents(held)["w"], old["w"])


@pytest.mark.parametrize("content", [b"", b"x", bytes(4096), b"dtrainS1" + bytes(8), os.urandom(8192)])
def test_a_file_that_is_no_snapshot(content, path):
    path.write_bytes(content)
    with pytest.raises(StorageError, match="not a snapshot"):
        Snapshot.open(path)
    assert Snapshot.create(path, {"w": torch.ones(3)}, 1).step is None


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_damaged_header_is_refused_or_holds_no_more_than_the_file(data, tmp_path_factory):
    """A segment is mapped by several processes: what it says of itself must never lead outside it."""
    path = tmp_path_factory.mktemp("s") / "state"
    tensors = {"w": torch.ones(10), "b": torch.ones(3, dtype=torch.int64)}
    Snapshot.create(path, tensors, 2).write_whole(5, tensors)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, HEADER.size + 2 * SLOT.size + 200))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        snapshot = Snapshot.open(path)
    except StorageError:
        return
    assert snapshot.num_slots < len(content)
    assert sum(t.numel() for t in contents(snapshot).values()) <= 13
    _ = snapshot.step


def test_nothing_there(path):
    with pytest.raises(StorageError, match="no snapshot"):
        Snapshot.open(path)


CREATE = """
    import sys, time; from pathlib import Path
    import torch
    from dtrain.checkpoint.snapshot import Snapshot
    tensors = {f"t{i}": torch.full((1000 + i,), float(i)) for i in range(50)}
    slot = int(sys.argv[2])
    print("ready", flush=True); sys.stdin.readline()
    for turn in range(40):
        path = Path(f"{sys.argv[1]}-{turn}")
        snapshot = Snapshot.create(path, tensors, 2)
        snapshot.write_share(slot, turn, snapshot.share(slot, tensors))
"""


def test_processes_that_create_at_the_same_time_share_one_segment(path):
    command = [sys.executable, "-c", textwrap.dedent(CREATE), str(path)]
    children = [
        subprocess.Popen([*command, str(slot)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for slot in range(2)
    ]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        child.communicate(timeout=60)
        assert child.returncode == 0
    for turn in range(40):
        snapshot = Snapshot.open(Path(f"{path}-{turn}"))
        assert snapshot.step == turn
        assert all(bool((t == int(name[1:])).all()) for name, t in contents(snapshot).items())


# -- no room ---------------------------------------------------------------------------------------------------


def test_no_room_is_an_error_at_once_and_leaves_nothing(path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "posix_fallocate", refuse)
    with pytest.raises(StorageError, match=r"no room for a snapshot of 4 MiB .*No space left"):
        Snapshot.create(path, {"w": torch.ones(2**20)}, 1)
    assert not path.exists()


def test_no_room_in_real_shared_memory():
    room = os.statvfs("/dev/shm")
    path = Path(f"/dev/shm/dtrain-test-{os.getpid()}-state")
    with torch.device("meta"):
        tensors = {"w": torch.empty(room.f_blocks * room.f_frsize // 4 + 2**20)}
    try:
        with pytest.raises(StorageError, match="no room"):
            Snapshot.create(path, tensors, 1)
        assert not path.exists()
    finally:
        for left in path.parent.glob(path.name + "*"):
            left.unlink()
