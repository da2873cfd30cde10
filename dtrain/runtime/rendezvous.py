"""How ranks find each other, and how the agents of several nodes agree on an attempt.

The store lives in the first node's agent, outside the ranks, so it survives every one of them. Each attempt has its
own generation of names in it: what an earlier attempt left behind cannot be mistaken for the present.
"""

import json
import os
import re
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dtrain.plan import Plan
from dtrain.training.loop import Place

COLLECTIVE_TIMEOUT = timedelta(hours=6)
"""Far beyond the watchdog's: hangs are the agent's to judge, not the collectives'."""
JOIN_TIMEOUT = timedelta(seconds=300)
PEER_LOSS = re.compile(
    r"gloo/transport|connection (closed|reset|refused)|broken pipe|socket (closed|error|timeout)|nccl.*remote|"
    r"connectfullmesh|timed out waiting|recv.*failed|store.*(timeout|closed)",
    re.IGNORECASE,
)


def is_peer_loss(error: BaseException) -> bool:
    """Whether an exception only says that another rank is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(PEER_LOSS.search(str(error))))


def serve_store(host: str) -> dist.TCPStore:
    """A store served by this process on a free port of `host`."""
    listener = socket.create_server((host, 0), backlog=1024)  # torch alone would listen on every interface
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=JOIN_TIMEOUT, master_listen_fd=listener.detach()
    )


def connect_store(host: str, port: int) -> dist.TCPStore:
    return dist.TCPStore(host, port, is_master=False, timeout=JOIN_TIMEOUT)


def join(plan: Plan, args: Mapping[str, Any], place: Place) -> None:
    """Make the process group of this attempt. A world of one needs none."""
    if place.num_workers == 1:
        return
    if plan.workers.num_nodes == 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # gloo would otherwise look this machine's name up
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    store = dist.PrefixStore(f"generation-{args['generation']}", connect_store(args["host"], args["port"]))
    dist.init_process_group(
        plan.workers.collectives,
        store=store,
        rank=place.worker,
        world_size=place.num_workers,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=place.device if place.device.type == "cuda" else None,
    )


class Agreement:
    """What the agents of several nodes tell each other: the first node's decides, the others follow."""

    def __init__(self, store: dist.Store, node: int, num_nodes: int) -> None:
        self._store, self._node, self._num_nodes = store, node, num_nodes

    def announce(self, generation: int, order: Mapping[str, Any]) -> None:
        """Leader: what everybody does in this generation."""
        self._store.set(f"order/{generation}", json.dumps(dict(order)))

    def order(self, generation: int) -> dict[str, Any] | None:
        """Follower: the leader's order for this generation, when there is one yet."""
        key = f"order/{generation}"
        return dict(json.loads(self._store.get(key))) if self._store.check([key]) else None

    def fail(self, generation: int) -> None:
        """Tell all that this generation has failed somewhere."""
        if self._num_nodes > 1:
            self._store.set(f"failed/{generation}", "1")

    def has_failed(self, generation: int) -> bool:
        return self._num_nodes > 1 and bool(self._store.check([f"failed/{generation}"]))

    def stop_after(self, generation: int, step: int) -> None:
        """Leader: the step after which the ranks of all nodes leave."""
        self._store.set(f"stop/{generation}", str(step))

    def last_step(self, generation: int) -> int:
        """The step after which to leave; 0 while there is none."""
        key = f"stop/{generation}"
        return int(self._store.get(key)) if self._store.check([key]) else 0

    def submit(self, generation: int, report: Mapping[str, Any]) -> None:
        self._store.set(f"report/{generation}/{self._node}", json.dumps(dict(report)))

    def reports(self, generation: int, timeout_s: float) -> dict[int, dict[str, Any]]:
        """Leader: what every node saw of a failed generation, as far as it arrives in time."""
        found: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + timeout_s
        while len(found) < self._num_nodes:
            for node in range(self._num_nodes):
                key = f"report/{generation}/{node}"
                if node not in found and self._store.check([key]):
                    found[node] = json.loads(self._store.get(key))
            if time.monotonic() > deadline:
                break
            time.sleep(0.002)
        return found
