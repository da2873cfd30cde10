"""The same runs on GPUs, where there are any; skipped, and said so, where there are none."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dtrain import runs
from dtrain.machine import probe

JOB = Path(__file__).resolve().parents[1] / "ray" / "job.yaml"

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not probe().gpus, reason="this machine has no NVIDIA GPU")]


def submit(root: Path, *settings: str) -> runs.Run:
    cluster = root / "cluster.yaml"
    cluster.write_text(f"name: gpus\nbackend: {{name: local, home: {root}/home}}\nstorage: {root}/runs\n")
    words = ["submit", str(JOB), "-c", str(cluster)]
    for setting in settings:
        words += ["--set", setting]
    subprocess.run([sys.executable, "-m", "dtrain", *words], check=True, timeout=300, cwd=root)
    return runs.list_runs(root / "runs")[-1]


@pytest.mark.timeout(600)
def test_a_run_on_gpus_learns_what_one_on_cores_does() -> None:
    with tempfile.TemporaryDirectory(prefix="dt-") as folder:
        root = Path(folder)
        try:
            on_gpu = submit(root, "cluster.device=gpu", "cluster.workers_per_node=1", "model.dropout=0")
            on_cpu = submit(root, "cluster.device=cpu", "cluster.workers_per_node=1", "model.dropout=0")
        finally:
            command = [sys.executable, "-m", "dtrain", "cluster", "down", "-c", str(root / "cluster.yaml")]
            subprocess.run(command, check=True, timeout=120, cwd=root)
        assert on_gpu.plan.workers.collectives == "nccl"
        ours, theirs = (run.record.outcome["metrics"]["loss"] for run in (on_gpu, on_cpu))
        assert ours == pytest.approx(theirs, abs=0.05), "the same samples in the same order, in another arithmetic"
