"""Who hosts the agents: whoever already holds the node: the driver on this machine, Ray Train's workers elsewhere."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dtrain.checkpoint.shared_memory import prefix
from dtrain.plan import AnyPlan
from dtrain.runtime.own_folder import is_going, node_folder
from dtrain.runtime.reservation import Reservation
from dtrain.runtime.zygote import Child, Zygote

GOING_CHECK_S = 1.0
START_TIMEOUT_S = 600


class AgentHost(Protocol):
    """The agents of a run, as the driver sees them."""

    def sentinels(self) -> list[int]:
        """Descriptors that turn readable when something has ended."""

    def is_alive(self) -> bool: ...

    def how_it_ended(self) -> str:
        """One sentence about an agent that is gone."""

    def close(self) -> None: ...


class EmbeddedHost:
    """One node: the driver forks the agent from this machine's zygote."""

    def __init__(self, args: Mapping[str, Any], folder: Path, until: int, lease: int) -> None:
        self._zygote = Zygote.connect(folder, until)
        self._child = fork_agent(self._zygote, {**args, "node": 0}, folder, until, [lease], outlive=True)

    def sentinels(self) -> list[int]:
        return [self._child.pidfd]

    def is_alive(self) -> bool:
        return self._child.is_alive

    def how_it_ended(self) -> str:
        status = self._zygote.wait(self._child, 1.0)
        return f"the agent (pid {self._child.pid}) {_ending(status)}"

    def close(self) -> None:
        self._child.kill()
        self._zygote.wait(self._child, 5.0)
        self._zygote.close()
        os.close(self._child.pidfd)


class PlacedHost:
    """Other nodes: Ray Train v2 places one worker on each, and that worker hosts the node's agent."""

    def __init__(self, args: Mapping[str, Any], plan: AnyPlan, reservation: Reservation) -> None:
        self._problem = ""
        reservation.release()  # Ray Train makes its own, of the same shape
        self._thread = threading.Thread(target=self._fit, args=(dict(args), plan), daemon=True)
        self._read, self._write = os.pipe2(os.O_CLOEXEC)
        self._thread.start()

    def _fit(self, args: dict[str, Any], plan: AnyPlan) -> None:
        # A node that was just added reads its image for the first time, and a lost one has to be replaced.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        # Not TorchTrainer: it would import torch and make a process group in the host, where neither is wanted.
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        try:
            DataParallelTrainer(
                host_on_node,
                train_loop_config=args,
                scaling_config=ScalingConfig(
                    num_workers=plan.workers.num_nodes,
                    resources_per_worker=plan.workers.resources,
                    placement_strategy="STRICT_SPREAD",
                    use_gpu=plan.workers.device == "cuda",
                ),
                run_config=RunConfig(
                    name="ray-train",
                    storage_path=str(Path(args["run"]) / "logs"),
                    failure_config=FailureConfig(max_failures=0),
                ),
            ).fit()
        except Exception as error:
            self._problem = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
            )
        finally:
            os.close(self._write)

    def sentinels(self) -> list[int]:
        return [self._read]

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def how_it_ended(self) -> str:
        return f"a node or its agent was lost ({self._problem or 'Ray Train ended early'})"

    def close(self) -> None:
        self._thread.join(timeout=30.0)
        os.close(self._read)


def host_on_node(args: dict[str, Any]) -> None:
    """What Ray Train's worker runs on each node: start the node's zygote, fork the agent, stay until it has ended."""
    from ray import get_runtime_context, train, util

    from dtrain.runtime.on_node import OnNode

    while is_going():  # nothing is begun on a node that ends in a moment
        time.sleep(GOING_CHECK_S)
    node = train.get_context().get_world_rank()
    folder = node_folder(os.getppid())
    until = os.getppid()  # the raylet: the zygote stays warm for the next run as long as the node is up
    zygote = Zygote.connect(folder, until)
    gpus = [str(number) for number in get_runtime_context().get_accelerator_ids().get("GPU", [])]
    args = {**args, "node": node, "host": util.get_node_ip_address(), "is_placed": True, "gpus": gpus}
    with contextlib.ExitStack() as stack:
        locks = []
        if "away" in args:
            here = stack.enter_context(OnNode(args["away"], node))
            args["run"] = str(here.path)
            locks = [here.lock]
        # Ray Train ends a worker without asking: its agent must go with it, or two would lead the run.
        child = fork_agent(zygote, args, folder, until, locks, outlive=False)
        try:
            is_told = False
            while zygote.wait(child, GOING_CHECK_S) is None:
                if not is_told and is_going():
                    is_told = True
                    child.kill(signal.SIGTERM)
        finally:
            child.kill()
        if child.status:
            raise RuntimeError(f"the agent of node {node} {_ending(child.status)}")


def fork_agent(
    zygote: Zygote, args: Mapping[str, Any], folder: Path, until: int, descriptors: list[int], *, outlive: bool
) -> Child:
    """Fork an agent; `descriptors` are kept open in it (the lease of the run).

    One that outlives its host puts the state on storage, and its shared memory is given back after it.
    """
    node = args["node"]
    full = {**args, "zygote_folder": str(folder), "until": until}
    with open(Path(args["run"]) / "logs" / f"agent-{node}.log", "ab") as log:
        return zygote.fork(
            "dtrain.runtime.agent:main",
            full,
            descriptors,
            log.fileno(),
            f"agent-{node}",
            outlive=outlive,
            cleanup=prefix(Path(args["run"]), node) + "-*" if outlive else "",
        )


def _ending(status: int | None) -> str:
    if status is None:
        return "is gone"
    return f"was killed by signal {-status}" if status < 0 else f"left with exit code {status}"
