"""`dtrain ps` of a thousand runs with what their cluster says of them, against an API server on loopback."""

import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from tests.benchmarks.harness import Figure, middle_half
from tests.benchmarks.running import DTRAIN, seconds, with_kubernetes

NUM_RUNS = 1000
TARGET_S = 2.0


def measure(*, is_quick: bool) -> list[Figure]:
    with_kubernetes()
    from api_server import ApiServer  # type: ignore[import-not-found]
    from submitting import submitted  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as name, ApiServer() as api:
        folder = Path(name)
        submitted(api, folder, NUM_RUNS)
        config = api.kubeconfig(folder / "kubeconfig", namespace="dtrain")
        environment = {**os.environ, "KUBECONFIG": str(config), "HOME": name}
        command = [DTRAIN, "ps", "-c", str(folder / "cluster.yaml")]
        listed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=folder).stdout
        if listed.count("gpt_small-") < NUM_RUNS:
            raise RuntimeError(f"dtrain ps does not list {NUM_RUNS} runs:\n{listed[-2000:]}")
        before = len(api.requests)
        taken = [seconds(command, env=environment, cwd=folder) for _ in range(2 if is_quick else 10)]
        num_requests = (len(api.requests) - before) / len(taken)
    typical, (low, high) = statistics.median(taken), middle_half(taken)
    note = f"seconds, {num_requests:.0f} requests"
    return [Figure(f"dtrain ps, {NUM_RUNS:,} runs", typical, TARGET_S, True, low, high, len(taken), note)]
