"""A node as a driver sees it, without Ray: runs with their real agent and ranks, in a folder of their own.

with Node(folder) as node:
    ended = node.run(node.plan(job, "strategy.name=fsdp"))
"""

import secrets
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Listener, wait
from pathlib import Path
from typing import Any, Self

import pytest

from dtrain import runs
from dtrain.checkpoint import store
from dtrain.machine import probe
from dtrain.plan import Plan
from dtrain.planning import make_plan
from dtrain.runtime import zygote
from dtrain.runtime.hosts import EmbeddedHost
from dtrain.spec import load

GPUS = probe().gpus
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason="this machine has no NVIDIA GPU"),
    pytest.mark.timeout(900),
]
ON_GPU = ("cluster.device=gpu", "cluster.workers_per_node=1")
ANSWER_S = 900.0


class Ended:
    """A run that has come to its end, and all that its agent said of it."""

    def __init__(self, run: runs.Run, said: list[dict[str, Any]]) -> None:
        self.run, self.outcome = run, dict(said[-1]["end"])
        records = [message["record"] for message in said if "attempts" in message.get("record", {})]
        self.attempts: list[dict[str, Any]] = records[-1]["attempts"] if records else []

    def logs(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()[-4000:]}" for path in self.run.logs.glob("*.log"))

    def weights(self) -> dict[str, Any]:
        """What the last checkpoint holds of the networks, whatever strategy wrote it."""
        import torch
        from torch.distributed.checkpoint import FileSystemReader

        path = store.path_of(self.run.checkpoints, max(store.steps(self.run.checkpoints)))
        store.verify(path)
        kept = FileSystemReader(path).read_metadata().state_dict_metadata
        tensors = {n: torch.zeros(m.size, dtype=m.properties.dtype) for n, m in kept.items() if n.startswith("model.")}
        store.read_into(path, tensors)
        return tensors


class Node:
    """This machine; its zygote ends with it."""

    def __init__(self, settings: tuple[str, ...] = ON_GPU) -> None:
        self._settings = settings
        self._folder = Path(tempfile.mkdtemp(prefix="dt-gpu-"))  # short: sockets have little room for their names
        self._cluster = self._folder / "cluster.yaml"
        self._cluster.write_text(f"name: gpus\nbackend: {{name: local}}\nstorage: {self._folder}/runs\n")
        self._until = subprocess.Popen(["sleep", "infinity"])
        self._zygote = zygote.start(self._folder, self._until.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._until.kill()
        self._until.wait()
        self._zygote.wait(60)
        shutil.rmtree(self._folder, ignore_errors=True)

    def plan(self, job: Path, *settings: str) -> Plan:
        return make_plan(*load.load_both(job, self._cluster, [*self._settings, *settings]), folder=job.parent)

    def run(self, plan: Plan, meddle: Callable[[runs.Run], None] = lambda _: None) -> Ended:
        """`plan` to its end, while `meddle` does to it what it likes. Raises `AssertionError` when it ends badly."""
        made = runs.create(plan, "", runs.new_name(plan))
        lease = made.acquire()
        thread = threading.Thread(target=meddle, args=[made], daemon=True)
        said: list[dict[str, Any]] = []
        secret = secrets.token_bytes(32)
        with Listener(("127.0.0.1", 0), authkey=secret) as listener:
            args: Mapping[str, Any] = {
                "run": str(made.path),
                "attempts": [],
                "secret": secret.hex(),
                "host": "127.0.0.1",
                "driver": list(listener.address),
            }
            host = EmbeddedHost(args, self._folder, self._until.pid, lease)
            thread.start()
            try:
                with listener.accept() as agent:
                    while not said or "end" not in said[-1]:
                        assert wait([agent], ANSWER_S), "the agent says nothing"
                        said.append(agent.recv())
                assert wait(host.sentinels(), ANSWER_S), "the agent does not end"  # it gives its memory back
            finally:
                host.close()
        thread.join(ANSWER_S)
        ended = Ended(made, said)
        assert ended.outcome["state"] == "succeeded", f"{ended.outcome}\n{ended.logs()}"
        return ended
