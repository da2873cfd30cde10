"""`dtrain submit --dry-run` over kubectl's own client dry run of what it prints, against an API server on loopback."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.harness import ROOT, Figure, paired
from tests.benchmarks.running import DTRAIN

TARGET = 2.0
JOB, CLUSTER = ROOT / "jobs" / "gpt_small.yaml", ROOT / "clusters" / "kind.yaml"
SERVERS = ROOT / "tests" / "kubernetes"
"""Where the API server of the tests is; those are no package."""


def measure(*, is_quick: bool) -> list[Figure]:
    if shutil.which("kubectl") is None:
        raise SystemExit("kubectl is not installed here, so there is nothing to measure against")
    sys.path.insert(0, str(SERVERS))
    from api_server import ApiServer  # type: ignore[import-not-found]

    ours, theirs = [], []
    command = [DTRAIN, "submit", str(JOB), "--cluster", str(CLUSTER), "--dry-run"]
    with tempfile.TemporaryDirectory() as folder, ApiServer() as api:
        config = api.kubeconfig(Path(folder) / "kubeconfig", namespace="default")
        environment = {**os.environ, "KUBECONFIG": str(config), "HOME": folder}
        objects = Path(folder) / "objects.yaml"
        objects.write_bytes(subprocess.run(command, check=True, capture_output=True, cwd=folder).stdout)
        rival = ["kubectl", "apply", "--dry-run=client", "-f", str(objects)]
        for number in range(4 if is_quick else 30):
            theirs.append(_seconds(rival, environment, folder))
            ours.append(_seconds(command, environment, folder))
            if number == 0:  # caches were cold
                ours, theirs = [], []
    return [paired("dtrain submit --dry-run : kubectl apply --dry-run=client", ours, theirs, TARGET)]


def _seconds(command: list[str], environment: dict[str, str], folder: str) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment, cwd=folder)
    return time.perf_counter() - started
