"""A Ray cluster as somebody else would run it: a head with a dashboard and no room for ranks, and nodes with cores.

python ray_head.py FOLDER NUM_NODES CORES        prints the dashboard's address; ends with its standard input
"""

import os
import sys

from ray._private.utils import write_ray_address
from ray.cluster_utils import Cluster


def main(folder: str, num_nodes: int, num_cpus: int) -> None:
    settings = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0, "temp_dir": folder}
    settings["dashboard_agent_listen_port"] = 0  # else 52365, which one Ray of a machine can have
    cluster = Cluster(initialize_head=True, head_node_args=settings)
    for _ in range(num_nodes):
        cluster.add_node(num_cpus=num_cpus)
    cluster.wait_for_nodes()
    # Jobs would otherwise take any cluster of this machine for theirs.
    write_ray_address(cluster.address, folder)
    print(f"http://{cluster.head_node.webui_url}", flush=True)
    sys.stdin.read()
    cluster.shutdown()
    os._exit(0)  # its own threads would be waited for


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
