"""Batch norm over all workers: what two of them compute is what one computes of the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dtrain.models.networks.batch_norm import SynchronisedBatchNorm, synchronise

SHAPES = {"2d": (8, 5, 4, 3), "1d": (8, 5), "series": (8, 5, 7), "3d": (4, 5, 2, 3, 2)}
PLAIN = {"2d": nn.BatchNorm2d, "1d": nn.BatchNorm1d, "series": nn.BatchNorm1d, "3d": nn.BatchNorm3d}
WORDS = [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}]
STEPS = 3


def the_batch(name, step):
    """Values far from zero: sums of squares would lose what little they vary by."""
    generator = torch.Generator().manual_seed(step)
    return 1000.0 + torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


def a_network(name, words, seed=0):
    network = nn.Sequential(PLAIN[name](5, **words))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
    return network


def trained(network, batches, slopes, weight=1.0):
    """Outputs, gradients of the inputs and of the weights (the mean over batches) and the buffers."""
    made, gradients = [], []
    for values, slope in zip(batches, slopes, strict=True):
        inputs = values.float().requires_grad_()
        outputs = network(inputs)
        (weight * (outputs * slope).sum()).backward()
        made.append(outputs.detach())
        gradients.append(inputs.grad)
    network.eval()
    made.append(network(batches[0].float()).detach())
    return {
        "made": made,
        "gradients": gradients,
        "weights": [p.grad for p in network.parameters()],
        "buffers": dict(network.named_buffers()),
    }


def slopes_of(name):
    return [the_batch(name, 100 + step).float() - 1000.0 for step in range(STEPS)]


def on_a_rank(rank, num_workers, name, words):
    network = a_network(name, words)
    synchronise(network)
    assert isinstance(network[0], SynchronisedBatchNorm)
    batches = [the_batch(name, step).chunk(num_workers)[rank] for step in range(STEPS)]
    slopes = [slope.chunk(num_workers)[rank] for slope in slopes_of(name)]
    return trained(network, batches, slopes)


@pytest.mark.parametrize("words", WORDS, ids=["plain", "cumulative", "bare", "forgetful"])
@pytest.mark.parametrize("name", SHAPES)
def test_two_workers_compute_what_one_does(name, words, ranks):
    found = ranks.run(on_a_rank, 2, name, words)
    alone = trained(a_network(name, words), [the_batch(name, s) for s in range(STEPS)], slopes_of(name))
    if words.get("track_running_stats", True):
        alone_steps, found_steps = (
            alone["made"],
            [torch.cat(pair) for pair in zip(*(f["made"] for f in found), strict=True)],
        )
    else:  # without running statistics each evaluates by the batch it sees
        alone_steps = alone["made"][:-1]
        found_steps = [torch.cat(pair) for pair in zip(*(f["made"][:-1] for f in found), strict=True)]
    # One process takes its sums in fp32 of values near 1000: the last digits are its own.
    torch.testing.assert_close(found_steps, alone_steps, rtol=1e-3, atol=1e-3)
    gradients = [torch.cat(pair) for pair in zip(*(f["gradients"] for f in found), strict=True)]
    torch.testing.assert_close(gradients, alone["gradients"], rtol=1e-3, atol=1e-3)
    for total, *shares in zip(alone["weights"], *(f["weights"] for f in found), strict=True):
        torch.testing.assert_close(sum(shares), total, rtol=1e-3, atol=1e-3)
    for f in found:
        assert f["buffers"].keys() == alone["buffers"].keys()
        for key, buffer in alone["buffers"].items():
            torch.testing.assert_close(f["buffers"][key], buffer, rtol=1e-5, atol=1e-5)
            assert torch.equal(f["buffers"][key], found[0]["buffers"][key])


def exactly(rank, num_workers):
    network = a_network("2d", {})
    synchronise(network)
    return network(the_batch("2d", 0).chunk(num_workers)[rank].float()).detach()


def test_nothing_is_lost_to_cancellation(ranks):
    """Held against double precision, which torch's own fp32 kernel need not reach."""
    made = torch.cat(ranks.run(exactly, 2))
    values = the_batch("2d", 0).float().double()
    exact = a_network("2d", {}).double()(values).float()
    torch.testing.assert_close(made, exact.detach(), rtol=1e-4, atol=2e-4)


def in_bf16(rank, num_workers):
    network = a_network("2d", {})
    synchronise(network)
    inputs = (the_batch("2d", 0) - 1000.0).chunk(num_workers)[rank].bfloat16()
    made = network(inputs)
    with torch.no_grad():
        quiet = network(inputs)  # in training mode without a gradient, as the generator in the other phase
    assert made.dtype == torch.bfloat16 and torch.equal(made, quiet)
    return made.detach(), int(network[0].num_batches_tracked)


def test_low_precision_goes_in_and_out_and_is_summed_in_fp32(ranks):
    found = ranks.run(in_bf16, 2)
    alone = a_network("2d", {})((the_batch("2d", 0) - 1000.0).bfloat16().float())
    torch.testing.assert_close(torch.cat([f[0] for f in found]).float(), alone.detach(), rtol=0.01, atol=0.01)
    assert [f[1] for f in found] == [2, 2]


def with_one_worker(rank, num_workers):
    assert dist.is_initialized() == (num_workers > 1)
    network = a_network("2d", {})
    synchronise(network)
    return network(the_batch("2d", 0).float()).detach()


def test_one_worker_has_torch_s_own(ranks):
    (made,) = ranks.run(with_one_worker, 1)
    assert torch.equal(made, a_network("2d", {})(the_batch("2d", 0).float()).detach())


def test_synchronising_keeps_weights_and_names():
    network = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Sequential(nn.BatchNorm2d(5, eps=0.1), nn.ReLU()))
    network[1].eval()
    before = {**network.state_dict(keep_vars=True)}
    synchronise(network)
    after = network.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    assert all(after[name] is tensor for name, tensor in before.items())
    assert isinstance(network[1][0], SynchronisedBatchNorm)
    assert network[1][0].eps == 0.1 and not network[1][0].training
    kept = network[1][0]
    synchronise(network)
    assert network[1][0] is kept
