"""NCCL: every collective that strategies use, among all GPUs of this machine and on one of them alone."""

import subprocess
import sys
import textwrap

import pytest
from node import GPUS, needs_gpu

pytestmark = needs_gpu
ALONE = """
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    given = torch.arange(1024.0, device="cuda")
    taken = torch.empty_like(given)
    dist.all_reduce(given)
    dist.broadcast(given, 0)
    dist.all_gather_into_tensor(taken, given)
    assert torch.equal(given, taken)
    dist.reduce_scatter_tensor(taken, given)
    assert torch.equal(taken.cpu(), torch.arange(1024.0))
    low = given.bfloat16()
    dist.all_reduce(low)
    assert torch.equal(low, given.bfloat16())
    dist.barrier(device_ids=[0])
    dist.destroy_process_group()
"""


def test_a_worker_alone_has_a_group_of_one() -> None:
    """What FSDP, DeepSpeed and Accelerate are given on one GPU."""
    subprocess.run([sys.executable, "-c", textwrap.dedent(ALONE)], check=True, timeout=120)


@pytest.mark.skipif(len(GPUS) < 2, reason="this machine has fewer than two NVIDIA GPUs")
def test_all_gpus_exchange_what_was_sent() -> None:
    """The doctor's ranks: forked as those of a run, and they train to the weights of one worker alone."""
    from dtrain.doctor import ranks
    from dtrain.machine import probe

    findings = ranks.check(probe(), print)
    assert [finding for finding in findings if finding.state != "ok"] == []
    named = {finding.name for finding in findings}
    assert named >= {f"{name} (nccl)" for name in ranks.COLLECTIVES}
