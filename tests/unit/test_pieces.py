"""Pieces of a state: rectangles cover it exactly, and what some workers saved others load, or hear what is missing."""

import itertools
import math
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dtrain.checkpoint import dcp_files, store
from dtrain.checkpoint.pieces import Piece, as_pieces, of_range, rectangles, whole
from dtrain.checkpoint.snapshot import Snapshot, held_step, path_of, segments
from dtrain.errors import StorageError
from dtrain.spec.job import Keep

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
NAME = "model.main.weight"


@st.composite
def runs(draw):
    shape = draw(SHAPES)
    size = math.prod(shape)
    start = draw(st.integers(0, size))
    return shape, start, draw(st.integers(start, size))


def numbered(shape, kind=torch.float32):
    return torch.arange(math.prod(shape), dtype=kind).view(shape)


def window(tensor, at, size):
    for dimension, (begin, length) in enumerate(zip(at, size, strict=True)):
        tensor = tensor.narrow(dimension, begin, length)
    return tensor


def by_rows(name, tensor, worker, num_workers, is_primary=True):
    """Rows of `tensor` as FSDP deals them out: equal shares, the last ones smaller or empty."""
    share = -(-tensor.shape[0] // num_workers)
    first = min(worker * share, tensor.shape[0])
    part = tensor[first : min(first + share, tensor.shape[0])].clone()
    return Piece(name, part, tuple(tensor.shape), (first, *(0 for _ in tensor.shape[1:])), is_primary)


def by_range(name, tensor, worker, num_workers, is_primary=True):
    """A run of numbers of `tensor` as ZeRO deals them out, which cuts rows."""
    size = tensor.numel()
    first, last = size * worker // num_workers, size * (worker + 1) // num_workers
    return of_range(name, tensor.reshape(-1)[first:last].clone(), tensor.shape, first, is_primary)


def dealt(how, tensors, num_workers):
    """For each worker its pieces of `tensors`; one that has no rows is held by all, and the first writes it."""
    held = []
    for worker in range(num_workers):
        mine = []
        for name, tensor in tensors.items():
            if tensor.ndim == 0:
                mine.append(whole(name, tensor.clone(), is_primary=worker == 0))
            elif how == "rows":
                mine.append(by_rows(name, tensor, worker, num_workers))
            else:
                mine += by_range(name, tensor, worker, num_workers)
        held.append(mine)
    return held


def empty(pieces):
    return [Piece(p.name, torch.full_like(p.tensor, -7), p.whole, p.at, p.is_primary) for p in pieces]


def a_state(value=1.0):
    numbers = torch.Generator().manual_seed(int(value))
    return {
        "model.main.weight": torch.randn(13, 6, generator=numbers),
        "model.main.bias": torch.randn(5, generator=numbers).to(torch.bfloat16),
        "optimizer.train.main.weight.exp_avg": torch.randn(3, 4, 5, generator=numbers),
        "optimizer.train.main.weight.step": torch.tensor(value),
    }


def on_nodes(folder, step, nodes, attempt=1, facts=None):
    """Write a checkpoint of pieces that `nodes` hold between them, as their writers do."""
    parts = [store.part_of(folder, step, number, attempt) for number in range(1, len(nodes))]
    for path, pieces in zip(parts, nodes[1:], strict=True):
        store.write_part(path, pieces)
    store.await_parts(parts, 0.0)
    return store.write(folder, step, nodes[0], facts or {}, parts)


# -- rectangles --------------------------------------------------------------------------------------------------


@given(run=runs())
def test_rectangles_cover_a_run_exactly_once_and_in_order(run):
    shape, start, stop = run
    numbers = numbered(shape)
    covered = [n for at, size in rectangles(shape, start, stop) for n in window(numbers, at, size).reshape(-1).tolist()]
    assert covered == list(range(start, stop))


@given(run=runs())
def test_rectangles_are_few_and_none_is_empty(run):
    shape, start, stop = run
    found = list(rectangles(shape, start, stop))
    assert len(found) <= max(2 * len(shape) - 1, 1)
    assert all(len(at) == len(size) == len(shape) and math.prod(size) > 0 for at, size in found)


@given(run=runs())
def test_a_run_as_pieces_is_the_numbers_of_the_whole_and_shares_their_memory(run):
    shape, start, stop = run
    numbers = numbered(shape)
    flat = numbers.reshape(-1)[start:stop].clone()
    pieces = of_range(NAME, flat, shape, start, is_primary=False)
    for piece in pieces:
        assert torch.equal(piece.tensor, window(numbers, piece.at, piece.tensor.shape))
        assert (piece.name, piece.whole, piece.is_primary) == (NAME, shape, False)
        piece.tensor.fill_(-1)
    assert bool((flat == -1).all())


def test_the_most_rectangles_there_can_be():
    assert list(rectangles((3, 3, 3), 1, 26)) == [
        ((0, 0, 1), (1, 1, 2)),
        ((0, 1, 0), (1, 2, 3)),
        ((1, 0, 0), (1, 3, 3)),
        ((2, 0, 0), (1, 2, 3)),
        ((2, 2, 0), (1, 1, 2)),
    ]


def test_tensors_by_name_are_whole_pieces():
    weight, count = torch.ones(2, 3), torch.tensor(3)
    first, second = as_pieces({"w": weight, "n": count})
    assert (first.name, first.whole, first.at, first.is_whole, first.is_primary) == ("w", (2, 3), (0, 0), True, True)
    assert first.tensor is weight
    assert (second.whole, second.at, second.is_whole) == ((), (), True)
    assert not by_rows("w", weight, 0, 2).is_whole
    assert as_pieces([first]) == [first]


# -- saved by some, loaded by others -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "num_written"), [("rows", 1), ("rows", 2), ("rows", 4), ("range", 2), ("range", 3)]
)
@pytest.mark.parametrize(("read", "num_read"), [("rows", 1), ("rows", 3), ("range", 2), ("range", 5)])
def test_what_n_workers_saved_m_workers_load(written, num_written, read, num_read, tmp_path):
    """Each half of the workers is a node, as far as there are two of them."""
    dealt_out = dealt(written, a_state(), num_written)
    nodes = [list(itertools.chain(*dealt_out[:2]))]
    if num_written > 2:
        nodes.append(list(itertools.chain(*dealt_out[2:])))
    size = on_nodes(tmp_path, 5, nodes)
    path, manifest = store.newest_valid(tmp_path, pytest.fail)
    assert size == sum(facts["bytes"] for facts in manifest["files"].values())
    for expected in dealt(read, a_state(), num_read):
        live = empty(expected)
        store.read_into(path, live)
        for found, right in zip(live, expected, strict=True):
            assert found.tensor.dtype == right.tensor.dtype
            assert torch.equal(found.tensor, right.tensor), found
    together = {name: torch.zeros_like(tensor) for name, tensor in a_state().items()}
    store.read_into(path, together)
    assert all(torch.equal(together[name], tensor) for name, tensor in a_state().items())


@settings(deadline=None, max_examples=25)
@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), data=st.data())
def test_any_two_ways_of_cutting_a_tensor_agree(shape, data, tmp_path_factory):
    tensor, folder = numbered(shape), tmp_path_factory.mktemp("c")
    size = math.prod(shape)

    def cut():
        points = sorted(data.draw(st.lists(st.integers(0, size), max_size=4)))
        return [
            piece
            for first, last in zip([0, *points], [*points, size], strict=True)
            for piece in of_range(NAME, tensor.reshape(-1)[first:last].clone(), shape, first)
        ]

    written, expected = cut(), cut()
    middle = len(written) // 2
    on_nodes(folder, 1, [written[:middle], written[middle:]])
    live = empty(expected)
    store.read_into(store.path_of(folder, 1), live)
    assert all(torch.equal(one.tensor, other.tensor) for one, other in zip(live, expected, strict=True))


def test_the_tools_of_torch_read_what_two_nodes_wrote(tmp_path):
    held = dealt("range", a_state(), 3)
    on_nodes(tmp_path, 5, [held[0], held[1] + held[2]])
    dcp_to_torch_save(store.path_of(tmp_path, 5), tmp_path / "whole.pt")
    found = torch.load(tmp_path / "whole.pt")
    assert found.keys() == a_state().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in a_state().items())


def test_only_primary_pieces_are_written(tmp_path):
    """Hybrid sharding: every rectangle is held twice."""
    tensor = numbered((4, 3))
    nodes = [[by_rows(NAME, tensor, worker, 2, is_primary=node == 0) for worker in (0, 1)] for node in (0, 1)]
    nodes[1][0].tensor.fill_(-1)
    on_nodes(tmp_path, 5, nodes)
    live = {NAME: torch.zeros(4, 3)}
    store.read_into(store.path_of(tmp_path, 5), live)
    assert torch.equal(live[NAME], tensor)
    assert len(list(store.path_of(tmp_path, 5).glob("*.distcp"))) == 1


def test_a_worker_without_numbers_of_a_tensor_disturbs_nobody(tmp_path):
    """Three workers share four rows: FSDP leaves the last with none, wherever it says that they begin."""
    tensor = numbered((4, 3))
    nothing = [Piece(NAME, torch.empty(0, 3), (4, 3), at, True) for at in ((4, 0), (0, 0))]
    on_nodes(tmp_path, 5, [[by_rows(NAME, tensor, 0, 2), nothing[0]], [by_rows(NAME, tensor, 1, 2), nothing[1]]])
    on_nodes(tmp_path, 6, [[by_rows(NAME, tensor, 0, 1), nothing[1]]])
    for step in (5, 6):
        live = [by_rows(NAME, torch.zeros(4, 3), 0, 1), *nothing]
        store.read_into(store.path_of(tmp_path, step), live)
        assert torch.equal(live[0].tensor, tensor)


def test_a_tensor_without_numbers_is_kept(tmp_path):
    store.write(tmp_path, 5, {"w": torch.ones(2), "none": torch.empty(0, 3)}, {})
    store.read_into(store.path_of(tmp_path, 5), {"w": torch.zeros(2), "none": torch.empty(0, 3)})
    assert dcp_files.names(store.path_of(tmp_path, 5)) == {"w", "none"}


def test_a_state_of_rank_zero_tensors_of_two_nodes(tmp_path):
    on_nodes(tmp_path, 5, [[whole("a", torch.tensor(1.0))], [whole("b", torch.tensor(2, dtype=torch.int64))]])
    live = {"a": torch.tensor(0.0), "b": torch.tensor(0)}
    store.read_into(store.path_of(tmp_path, 5), live)
    assert (float(live["a"]), int(live["b"])) == (1.0, 2)


# -- what is missing ---------------------------------------------------------------------------------------------


def test_a_rectangle_that_nobody_wrote_is_refused_and_nothing_is_left(tmp_path):
    tensor = numbered((6, 3))
    store.write(tmp_path, 4, {NAME: tensor}, {})
    with pytest.raises(StorageError, match=f"12 numbers of {NAME} are held, and it has 18"):
        on_nodes(tmp_path, 5, [[by_rows(NAME, tensor, 0, 3)], [by_rows(NAME, tensor, 1, 3)]])
    with pytest.raises(StorageError, match=f"6 numbers of {NAME} are held, and it has 18"):
        on_nodes(tmp_path, 6, [[by_rows(NAME, tensor, 0, 3)]])
    assert store.steps(tmp_path) == [4]
    assert not store.path_of(tmp_path, 5).exists()
    assert store.newest_valid(tmp_path, pytest.fail)[1]["step"] == 4


def test_a_rectangle_written_twice_does_not_stand_for_one_that_is_missing(tmp_path):
    tensor = numbered((6, 3))
    with pytest.raises(StorageError, match=f"{NAME}: a rectangle of it was written by two workers"):
        on_nodes(tmp_path, 5, [[by_rows(NAME, tensor, 0, 2)], [by_rows(NAME, tensor, 0, 2)]])
    assert store.steps(tmp_path) == []


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    tensor = numbered((6, 3))
    store.write(tmp_path, 5, {NAME: tensor}, {})
    with pytest.raises(StorageError, match=rf"{NAME} has shape \(6, 3\) in it, and \(8, 3\) in the model"):
        store.read_into(store.path_of(tmp_path, 5), [by_rows(NAME, numbered((8, 3)), 0, 2)])
    with pytest.raises(StorageError, match=r"it holds no model\.main\.other: it was written by another model"):
        store.read_into(store.path_of(tmp_path, 5), [by_rows("model.main.other", tensor, 1, 2)])


# -- parts -------------------------------------------------------------------------------------------------------


def two_nodes():
    tensor = numbered((6, 3))
    return [by_rows(NAME, tensor, 0, 2)], [by_rows(NAME, tensor, 1, 2)]


def test_a_part_that_does_not_come_is_waited_for_no_longer_than_asked(tmp_path):
    part = store.part_of(tmp_path, 5, 1, 1)
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"\.step-00000005-1-1: another node did not write its part within 0 s"):
        store.await_parts([part], 0.2)
    assert 0.2 <= time.monotonic() - started < 2.0
    dcp_files_only = store.part_of(tmp_path, 6, 1, 1)
    dcp_files_only.mkdir()
    dcp_files.save(dcp_files_only, two_nodes()[1])  # a node that was lost before its part was whole
    with pytest.raises(StorageError, match="did not write its part"):
        store.await_parts([dcp_files_only], 0.0)


def test_a_part_that_comes_late_is_waited_for(tmp_path):
    mine, others = two_nodes()
    part = store.part_of(tmp_path, 5, 1, 1)
    late = threading.Timer(0.3, store.write_part, (part, others))
    late.start()
    store.await_parts([part], 30.0)
    late.join()
    store.write(tmp_path, 5, mine, {}, [part])
    live = {NAME: torch.zeros(6, 3)}
    store.read_into(store.path_of(tmp_path, 5), live)
    assert torch.equal(live[NAME], numbered((6, 3)))


def test_parts_become_the_checkpoint_and_are_gone(tmp_path):
    mine, others = two_nodes()
    on_nodes(tmp_path, 5, [mine, others], facts={"num_workers": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    files = {p.name for p in store.path_of(tmp_path, 5).iterdir()}
    assert files == {".metadata", "__0_0.distcp", "__1_0.distcp", store.MANIFEST, store.MARKER}
    assert store.verify(store.path_of(tmp_path, 5))["num_workers"] == 2


def test_a_part_is_written_again_over_one_that_was_begun(tmp_path):
    mine, others = two_nodes()
    part = store.part_of(tmp_path, 5, 1, 1)
    store.write_part(part, [by_rows(NAME, torch.zeros(6, 3), 0, 1), whole("old", torch.ones(2))])
    store.write_part(part, others)
    store.write(tmp_path, 5, mine, {}, [part])
    assert dcp_files.names(store.path_of(tmp_path, 5)) == {NAME}


def test_a_part_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Not a directory"):
        store.write_part(store.part_of(tmp_path / "file", 5, 1, 1), two_nodes()[1])
    others = [*two_nodes()[1], Piece("broken", torch.empty(2, device="meta"), (2,), (0,))]
    with pytest.raises(StorageError):
        store.write_part(store.part_of(tmp_path, 5, 1, 1), others)
    assert not store.part_of(tmp_path, 5, 1, 1).exists()


def test_a_damaged_part_does_not_become_a_checkpoint(tmp_path):
    mine, others = two_nodes()
    part = store.part_of(tmp_path, 5, 1, 1)
    store.write_part(part, others)
    next(part.glob("*.distcp")).unlink()
    with pytest.raises(StorageError):
        store.write(tmp_path, 5, mine, {}, [part])
    assert store.newest_valid(tmp_path, pytest.fail) is None


def test_the_index_is_on_the_disk_before_the_checkpoint_counts(tmp_path, monkeypatch):
    """The index of parts joined is written anew: a power cut must not leave a committed checkpoint without it."""
    durable, original = [], store.os.fsync

    def fsync(descriptor):
        durable.append(store.os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2])
        original(descriptor)

    mine, others = two_nodes()
    part = store.part_of(tmp_path, 5, 1, 1)
    store.write_part(part, others)
    monkeypatch.setattr(store.os, "fsync", fsync)
    store.write(tmp_path, 5, mine, {}, [part])
    marker = durable.index(f"{store.MARKER}.making")  # renamed to the marker once it is whole
    assert marker > max(i for i, name in enumerate(durable) if name == ".metadata")
    assert durable.count(".metadata") + durable.count(".metadata.tmp") == 2


def test_stale_parts_go_and_others_stay(tmp_path):
    """Parts of checkpoints that were never committed, before the newest one; those of later ones are being written."""
    mine, others = two_nodes()
    for step, attempt in ((90, 1), (99, 2), (100, 1), (110, 1), (1_000_000_000, 1)):
        store.write_part(store.part_of(tmp_path, step, 1, attempt), others)
    (tmp_path / ".step-notes").mkdir()
    on_nodes(tmp_path, 100, [mine, others], attempt=2)
    store.prune(tmp_path, Keep(last=1, best=0))
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {
        "step-00000100",
        ".step-00000100-1-1",
        ".step-00000110-1-1",
        ".step-1000000000-1-1",
        ".step-notes",
    }
    assert store.steps(tmp_path) == [100]


# -- from the ranks' shared memory -------------------------------------------------------------------------------


def test_segments_of_sharded_ranks_are_written_as_one_checkpoint(tmp_path):
    """What a node's writer does: each rank has a segment of its own, and all of them together are the state."""
    base = tmp_path / "state"
    for local, pieces in enumerate(dealt("range", a_state(), 3)):
        segment = Snapshot.create(path_of(base, local, is_replicated=False), pieces, 1)
        assert held_step(base, 3) is None
        segment.write_share(0, 7, segment.share(0, pieces))
    assert held_step(base, 3) == 7
    pieces = [piece for segment in segments(base, 3) for piece in segment.pieces()]
    store.write(tmp_path / "checkpoints", 7, pieces, {})
    live = {name: torch.zeros_like(tensor) for name, tensor in a_state().items()}
    store.read_into(store.path_of(tmp_path / "checkpoints", 7), live)
    assert all(torch.equal(live[name], tensor) for name, tensor in a_state().items())


def test_ranks_that_hold_different_steps_hold_no_state(tmp_path):
    base = tmp_path / "state"
    for local, pieces in enumerate(dealt("rows", a_state(), 2)):
        Snapshot.create(path_of(base, local, is_replicated=False), pieces, 1).write_whole(7 + local, pieces)
    assert held_step(base, 2) is None
    assert held_step(base, 3) is None


def test_a_segment_of_pieces_is_made_anew_when_they_lie_elsewhere(tmp_path):
    """Another number of workers: the same names and shapes, and other numbers."""
    tensor = numbered((6, 3))
    first = [by_rows(NAME, tensor, 0, 2)]
    Snapshot.create(tmp_path / "state", first, 1).write_whole(5, first)
    assert Snapshot.create(tmp_path / "state", first, 1).step == 5
    assert Snapshot.create(tmp_path / "state", [by_rows(NAME, tensor, 1, 2)], 1).step is None
