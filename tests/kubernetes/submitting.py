"""What is submitted to the loopback API server: options, a cluster file, a shipped job; an operator takes it up."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from api_server import ApiServer
from msgspec.structs import replace

from dtrain import runs
from dtrain.backends import kuberay
from dtrain.kubernetes import names
from dtrain.planning import make_plan
from dtrain.settings import convert
from dtrain.spec.load import load_cluster, load_job

ROOT = Path(__file__).parents[2]
CLUSTER = """
name: here
backend:
  name: kuberay
  namespace: dtrain
  image: dtrain:test
  machine: {{cores: 2, memory_gib: 4}}
  worker: {{object_store_gib: 0.25}}
  volumes: [{{mount: {folder}, host_path: {folder}}}]
device: cpu
storage: {folder}/runs
"""
"""A cluster file; runs are kept in `folder`."""


def some_options(**words: Any) -> kuberay.Options:
    machine = {"cores": 4, "memory_gib": 16, **words.pop("machine", {})}
    known = {"image": "dtrain:test", "namespace": "dtrain", "termination_grace_s": 1, "pending_deadline_s": 20}
    return convert({"machine": machine, **known, **words}, kuberay.Options)


def submission(run_id: str = "gpt_small-k3f9", **words: Any) -> kuberay.Submission:
    """A shipped job, planned and rendered for the server's namespace."""
    cluster = load_cluster(ROOT / "clusters" / "kind.yaml")
    backend = replace(cluster.backend, **{"namespace": "dtrain", "context": None, **words})
    plan = make_plan(load_job(ROOT / "jobs" / "gpt_small.yaml"), replace(cluster, backend=backend))
    return kuberay.render(plan, Path(plan.storage) / run_id)


def submitted(api: ApiServer, folder: Path, number: int) -> None:
    """So many runs in `folder` that the cluster of its `cluster.yaml` has taken up; it cannot pull an image of one."""
    (folder / "cluster.yaml").write_text(CLUSTER.format(folder=folder))
    plan = make_plan(load_job(ROOT / "jobs" / "gpt_small.yaml"), load_cluster(folder / "cluster.yaml"))
    made = submission().objects[0]
    for count in range(number):
        run = runs.create(plan, "", f"gpt_small-{count}")
        metadata = {**made["metadata"], "name": names.object_name(run.id)}
        metadata["annotations"] = {**metadata["annotations"], names.RUN_ID: run.id}
        cluster = f"gpt-small-{count}-x"
        status = {"jobDeploymentStatus": "Initializing", "rayClusterName": cluster}
        api.put({**made, "metadata": metadata, "status": status})
    labels = {**names.run_labels("gpt_small-1"), "ray.io/cluster": "gpt-small-1-x", "ray.io/node-type": "worker"}
    waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image: not found"}
    containers = [{"name": "ray-worker", "image": "dtrain:test", "state": {"waiting": waiting}}]
    pod = {"name": "p", "namespace": "dtrain", "labels": labels}
    api.put({"kind": "Pod", "metadata": pod, "status": {"containerStatuses": containers}})


FINALIZER = {"metadata": {"finalizers": ["ray.io/rayjob-finalizer"]}}


@contextmanager
def operator(api: ApiServer, status: dict | None = None, once: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Takes up each RayJob as the real one does, and lets go of what is deleted."""

    def act(event: str, made: dict) -> None:
        name = made["metadata"]["name"]
        if event == "ADDED" and "finalizers" not in made["metadata"]:
            api.patch("RayJob", name, FINALIZER)
            api.set_status("RayJob", name, status or {"jobDeploymentStatus": "Initializing"})
        elif event != "DELETED" and "deletionTimestamp" in made["metadata"]:
            _await(once)
            api.patch("RayJob", name, {"metadata": {"finalizers": []}})

    with api.listen("RayJob", act):
        yield


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
