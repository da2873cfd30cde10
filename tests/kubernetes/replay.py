"""Drives the loopback server through what real RayJobs were recorded to do: one change after the other, in order."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from api_server import ApiServer

from dtrain.kubernetes import names

RECORDINGS = Path(__file__).parents[3] / "shared" / "kuberay" / "recordings"
STREAMS = ("rayjobs", "rayclusters", "pods", "events", "services", "jobs")
Object = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One change of one object."""

    type: str
    """ADDED, MODIFIED or DELETED."""
    object: Object

    @property
    def kind(self) -> str:
        return str(self.object["kind"])

    @property
    def name(self) -> str:
        return str(self.object["metadata"]["name"])

    @property
    def stage(self) -> tuple[str | None, str | None]:
        """A RayJob's own status and the operator's."""
        status = self.object.get("status") or {}
        return status.get("jobStatus"), status.get("jobDeploymentStatus")


def recorded() -> list[str]:
    """The jobs that were recorded."""
    return sorted(path.name for path in (RECORDINGS / "transitions").iterdir() if path.is_dir())


def steps(job: str) -> list[Step]:
    """What happened to a job: with its pods and events where the whole stream was kept, else with its Ray cluster."""
    found = [step for step in _streamed() if _belongs(step.object, job)]
    if any(step.kind == "RayJob" for step in found):
        return found
    files = sorted((RECORDINGS / "transitions" / job).glob("*.json"))
    return [Step(made["type"], made["object"]) for made in map(_read, files)]


def play(
    api: ApiServer, job: str, until: Callable[[Step], bool] = lambda _: False, run_id: str | None = None
) -> Iterator[Step]:
    """Carry out each step on the server, up to the first for which `until` holds, and yield it.

    With a `run_id` the job is marked as that run's.
    """
    for step in steps(job):
        made = step.object
        if step.kind == "RayJob" and run_id:
            metadata = made["metadata"]
            labels = {**metadata.get("labels", {}), **names.run_labels(run_id)}
            made = {**made, "metadata": {**metadata, "labels": labels, "annotations": {names.RUN_ID: run_id}}}
        if step.type == "DELETED":
            api.put({**made, "metadata": {**made["metadata"], "finalizers": []}})
            api.remove(step.kind, step.name, made["metadata"]["namespace"])
        else:
            metadata = {key: value for key, value in made["metadata"].items() if key != "deletionTimestamp"}
            is_going = "deletionTimestamp" in made["metadata"]
            if is_going and not metadata.get("finalizers"):  # a kubelet ends it, which the next step tells
                metadata["finalizers"] = ["replay/kubelet"]
            api.put({**made, "metadata": metadata})
            if is_going:
                api.remove(step.kind, step.name, metadata["namespace"])
        yield step
        if until(step):
            return


@cache
def _streamed() -> tuple[Step, ...]:
    found = []
    for stream in STREAMS:
        file = RECORDINGS / "watch" / f"{stream}.jsonl"
        found += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found.sort(key=lambda line: line["t"])
    made = [line["event"] for line in found if line["event"]["type"] in ("ADDED", "MODIFIED", "DELETED")]
    return tuple(Step(event["type"], event["object"]) for event in made)


def _belongs(made: Object, job: str) -> bool:
    name = (made.get("involvedObject") or made["metadata"])["name"]
    return bool(name == job or name.startswith(f"{job}-"))


def _read(file: Path) -> Object:
    return dict(json.loads(file.read_text(encoding="utf-8")))
