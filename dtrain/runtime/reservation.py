"""The run's resources, reserved with Ray: two runs never share a GPU, and a third waits its turn."""

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

from dtrain.errors import ClusterError
from dtrain.plan import AnyPlan

CONNECT_TIMEOUT_S = 60


def connect(address: str, token_path: Path | None, name: str) -> Any:
    """Join the Ray cluster at `address` as a job called `name`; returns the `ray` module.

    Raises `ClusterError` when there is no cluster there, or it refuses.
    """
    if token_path is not None:  # Ray reads these once, when it is imported
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_path)
    if address.startswith("127."):
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray would otherwise turn loopback into a public address
    os.environ.setdefault("RAY_raylet_start_wait_time_s", str(CONNECT_TIMEOUT_S))
    import ray
    from ray.job_config import JobConfig

    try:
        ray.init(
            address=address,
            namespace="dtrain",
            log_to_driver=False,
            configure_logging=False,
            job_config=JobConfig(metadata={"dtrain": name}),
        )
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ClusterError(f"the Ray cluster at {address} cannot be joined: {first}") from None
    return ray


def answers(address: str, timeout_s: float = 1.0) -> bool:
    """Whether anything still listens at the head's address."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=timeout_s):
        return True
    return False


class Reservation:
    """A placement group with one bundle a node; held from `is_ready` to `release`."""

    def __init__(self, ray: Any, plan: AnyPlan, name: str) -> None:
        from ray.util.placement_group import placement_group

        self._ray = ray
        self._bundle = plan.workers.resources
        self._num_nodes = plan.workers.num_nodes
        strategy = "STRICT_SPREAD" if self._num_nodes > 1 else "STRICT_PACK"
        self._holder: Any = None
        self._gpus: list[str] = []
        self.group = placement_group([dict(self._bundle)] * self._num_nodes, strategy=strategy, name=f"dtrain:{name}")

    def is_ready(self, timeout_s: float) -> bool:
        return bool(self.group.wait(timeout_seconds=timeout_s))

    def gpus(self) -> list[str]:
        """The GPUs of this machine that are the run's, as CUDA numbers them; nobody else gets them before `release`.

        Only a process of Ray's is told which they are: one holds them in the run's name. Empty for a run on CPUs.
        """
        if self._holder is None and self._bundle.get("GPU"):
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

            ray = self._ray

            class Holder:
                def gpus(self) -> list[str]:
                    return [str(number) for number in ray.get_runtime_context().get_accelerator_ids()["GPU"]]

            where = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=0)
            needs = {"num_cpus": 0, "num_gpus": self._bundle["GPU"], "scheduling_strategy": where}
            self._holder = ray.remote(**needs)(Holder).remote()
            self._gpus = ray.get(self._holder.gpus.remote())
        return self._gpus

    def why_waiting(self) -> str:
        """One sentence: what is asked for, and what the cluster has."""
        with contextlib.suppress(Exception):
            total, free = self._ray.cluster_resources(), self._ray.available_resources()
            asked = {name: amount * self._num_nodes for name, amount in self._bundle.items()}
            short = [n for n, amount in asked.items() if total.get(n, 0) < amount]
            parts = ", ".join(f"{a:g} {n} ({free.get(n, 0):g} of {total.get(n, 0):g} free)" for n, a in asked.items())
            reason = "the cluster will never have that many" if short else "other runs hold them"
            return f"waiting for {parts}: {reason}"
        return "waiting for resources"

    def release(self) -> None:
        from ray.util.placement_group import remove_placement_group

        with contextlib.suppress(Exception):
            remove_placement_group(self.group)
