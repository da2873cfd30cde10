"""`jobs/gpt2_124m.yaml` as it is shipped, over a hand-tuned loop of the same network; and what both make of the GPU.

Operations are counted as Chowdhery et al. do ("PaLM", 2022, appendix B): 6 N + 12 L H Q T a token, for N parameters
that are multiplied with (learned positions are not), L layers, H heads, their width Q and texts of T tokens; nothing
that is computed twice counts twice, and attention counts as if it were not causal.
"""

import statistics

from tests.benchmarks import on_device
from tests.benchmarks.harness import ROOT, Figure, paired
from tests.benchmarks.running import workplace

TARGET = 1 / 0.99
"""Tokens/s are at least 0.99 of the rival's."""
UTILISATION = 0.40
"""On a Hopper GPU."""
PEAKS = {
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H100 PCIe": 756.5e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362.05e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165.2e12,
}
"""bf16 operations/s without sparsity, by a part of the device's name, the longer name first (NVIDIA's data sheets)."""
JOB = ROOT / "jobs" / "gpt2_124m.yaml"
STEPS, QUICK_STEPS = 90, 50
TINY = (
    "model.num_layers=2",
    "model.num_heads=2",
    "model.width=32",
    "data.sequence_length=32",
    "data.tokenizer={name: bytes}",
    "data.held_out_limit=4096",
    "batch.global=8",
    "batch.micro=4",
    "schedule.warmup_steps=5",
)


def measure(*, is_quick: bool) -> list[Figure]:
    tiny = on_device.is_tiny(is_quick=is_quick)
    settings = (f"train.steps={QUICK_STEPS if is_quick else STEPS}", *(TINY if tiny else ()))
    with workplace() as place:
        measured = on_device.measure(place, JOB, *settings, tiny=tiny)
    arithmetic = measured.plan.arithmetic
    note = measured.says("tokens/s", arithmetic.tokens_per_step)
    figures = [paired("dtrain : by hand, GPT-2 124M", measured.ours, measured.theirs, TARGET, note)]
    peak = peak_of(measured.device)
    if peak is None:
        return figures
    for side, times in (("dtrain", measured.ours), ("by hand", measured.theirs)):
        share = arithmetic.flops_per_step / statistics.median(times) / peak
        each = arithmetic.flops_per_step / arithmetic.tokens_per_step
        said = f"{each:.3g} operations a token, of {peak:.4g} a second; the target is for Hopper"
        figures.append(
            Figure(f"utilisation, {side}", share, UTILISATION, target_is_most=False, num=len(times), note=said)
        )
    return figures


def peak_of(device: str) -> float | None:
    """bf16 operations/s of a device; None where that is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)
