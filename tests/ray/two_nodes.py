"""Two Ray nodes on this machine, and a driver that has Ray Train place an agent on each.

python two_nodes.py STORAGE [KEY=VALUE...]        prints the run folder; ends when the driver has
"""

import os
import subprocess
import sys
from pathlib import Path

from ray.cluster_utils import Cluster

from dtrain import runs
from dtrain.machine import Machine
from dtrain.planning import make_plan
from dtrain.settings import convert
from dtrain.spec.cluster import ClusterSpec
from dtrain.spec.load import load_job


def main(storage: Path, settings: list[str]) -> int:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    words = {"name": "two", "backend": {"name": "local"}, "nodes": 2, "workers_per_node": 1, "device": "cpu"}
    place = convert({**words, "storage": str(storage)}, ClusterSpec)
    job = load_job(Path(__file__).parent / "job.yaml", ["train.steps=3000", "checkpoint.every_steps=500", *settings])
    run = runs.create(make_plan(job, place, Machine(num_cores=1, memory_gib=4.0)), "")
    print(run.path, flush=True)
    command = [sys.executable, "-m", "dtrain.runtime", "--run", str(run.path), "--address", cluster.address]
    command += ["--until", str(os.getpid())]
    try:
        return subprocess.run([*command, "--folder", str(storage)], check=False).returncode
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
