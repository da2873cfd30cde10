"""A Ray head that believes it has four GPUs, and three runs of two GPUs that reserve from it; prints what they got.

python reserving.py FOLDER
"""

import json
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from dtrain.machine import Gpu, Machine
from dtrain.planning import make_plan
from dtrain.runtime.reservation import Reservation
from dtrain.settings import convert
from dtrain.spec.cluster import ClusterSpec
from dtrain.spec.load import load_job


def main(storage: Path) -> None:
    machine = Machine(num_cores=8, memory_gib=64.0, gpus=(Gpu("H200", 141.0),) * 4)
    words = {"name": "four", "backend": {"name": "local"}, "workers_per_node": 2, "device": "gpu"}
    place = convert({**words, "storage": str(storage)}, ClusterSpec)
    plan = make_plan(load_job(Path(__file__).parent / "job.yaml", []), place, machine)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": 4, "include_dashboard": False})
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        first, second = Reservation(ray, plan, "first"), Reservation(ray, plan, "second")
        assert first.is_ready(60) and second.is_ready(60)
        got = [first.gpus(), second.gpus(), first.gpus()]
        third = Reservation(ray, plan, "third")
        waits = not third.is_ready(1)
        first.release()
        got.append(third.gpus() if third.is_ready(60) else [])
        print(json.dumps({"got": got, "waits": waits}))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
