"""What lies in shared memory is copied to and from a GPU where it lies, pinned, and beside what the GPU computes."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dtrain.machine import probe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not probe().gpus, reason="this machine has no NVIDIA GPU")]


def test_batches_are_copied_from_pinned_memory_before_it_is_written_to_again() -> None:
    import torch
    from test_feed import Source, order

    from dtrain.training.feed import Feed, pinned
    from dtrain.training.loading import Loaders

    assert not torch.cuda.is_initialized()  # loaders are forked before
    loaders = Loaders(Source, 2, 2, register=pinned)
    try:
        device = torch.device("cuda", 0)
        ahead, plain = Feed(Source(), order(), device, loaders), Feed(Source(), order(), torch.device("cpu"))
        for step in range(50):
            for number in range(2):
                torch.cuda._sleep(1_000_000)  # the device lags behind, and with it the copies
                batch, expected = ahead.micro_batch(step, number), plain.micro_batch(step, number)
                for name, tensor in batch.items():
                    assert tensor.device == device
                    assert torch.equal(tensor.cpu(), expected[name]), (step, number, name)
        memory = [m.bytes for loader in loaders.loaders for m in loader._memory.values()]
        assert memory and all(torch.from_numpy(m).is_pinned() for m in memory)
        started = time.monotonic()
    finally:
        loaders.close()
    assert time.monotonic() - started < 5.0
    torch.zeros(1, device="cuda")  # undoing it left no error behind


def test_a_batch_is_copied_while_the_device_still_computes() -> None:
    import torch

    from dtrain.training.feed import Mover

    device = torch.device("cuda", 0)
    move = Mover(device)
    arrays = {"numbers": np.arange(2**22, dtype=np.float32)}
    move(arrays)  # memory is pinned and taken
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    moved = move(arrays)
    wait = move.when_copied()
    assert wait is not None
    wait()
    assert not torch.cuda.current_stream().query(), "the copy has not waited for what was computed before it"
    assert torch.equal(moved["numbers"].cpu(), torch.arange(2**22, dtype=torch.float32))


def test_no_more_batches_are_copied_than_a_device_will_soon_want() -> None:
    """A process runs far ahead of a device: without a bound it would fill the device's memory."""
    import torch

    from dtrain.training.feed import Mover

    device = torch.device("cuda", 0)
    move = Mover(device)
    numbers = np.arange(2**22, dtype=np.float32)
    before = torch.cuda.memory_reserved()
    sums = []
    for _ in range(40):
        sums.append(move({"numbers": numbers})["numbers"].sum())
        torch.cuda._sleep(10_000_000)
        assert torch.cuda.memory_reserved() - before < 10 * numbers.nbytes
    assert len({float(total) for total in sums}) == 1


def test_a_snapshot_is_copied_into_pinned_memory(tmp_path: Path) -> None:
    import torch

    from dtrain.checkpoint.snapshot import Snapshot
    from dtrain.training.feed import pinned

    state = {"weights": torch.randn(3_000_000, device="cuda"), "step": torch.tensor(7.0, device="cuda")}
    snapshot = Snapshot.create(tmp_path / "state", state, 1)
    share = snapshot.share(0, state)
    undo = pinned(snapshot.room(share))
    assert all(destination.is_pinned() for destination, _ in share)
    snapshot.write_share(0, 3, share)
    held = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    assert snapshot.read_into(held) == 3
    assert all(torch.equal(held[name], tensor) for name, tensor in state.items())
    undo()
