"""Batches that loaders read reach a GPU through memory that is pinned where it lies."""

import sys
import time
from pathlib import Path

import pytest

from dtrain.machine import probe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

pytestmark = pytest.mark.skipif(not probe().gpus, reason="this machine has no NVIDIA GPU")


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
