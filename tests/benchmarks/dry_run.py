"""`dtrain submit --dry-run` over kubectl's own client dry run of what it prints, against an API server on loopback."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.benchmarks.harness import ROOT, Figure, paired
from tests.benchmarks.running import DTRAIN, seconds, with_kubernetes

TARGET = 2.0
JOB, CLUSTER = ROOT / "jobs" / "gpt_small.yaml", ROOT / "clusters" / "kind.yaml"


def measure(*, is_quick: bool) -> list[Figure]:
    if shutil.which("kubectl") is None:
        raise SystemExit("kubectl is not installed here, so there is nothing to measure against")
    with_kubernetes()
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
            theirs.append(seconds(rival, env=environment, cwd=folder))
            ours.append(seconds(command, env=environment, cwd=folder))
            if number == 0:  # caches were cold
                ours, theirs = [], []
    return [paired("dtrain submit --dry-run : kubectl apply --dry-run=client", ours, theirs, TARGET)]
