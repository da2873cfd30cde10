"""Why pods are not there yet, each in one sentence: from their conditions, their containers and what was said of them.

Pure: objects as the API server gives them go in, words come out.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dtrain.kubernetes.errors import QUOTA
from dtrain.sight import Phase

Object = Mapping[str, Any]
IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError",
         "RegistryUnavailable")  # fmt: skip
BROKEN = ("CrashLoopBackOff", "CreateContainerConfigError", "CreateContainerError", "RunContainerError")
MEMORY = 137
"""Exit code of a process that was killed; with reason OOMKilled, for its memory."""
_NODES = re.compile(r"^0/(?P<all>\d+) nodes are available:? ?(?P<why>.*?)\.?(?: (?:no new claims|preemption):? .*)?$")
_TAINT = r"(\d+) node\(s\) had untolerated taint(?:\(s\))?"
_SPEC = (
    (r"(\d+) Insufficient ([^\s,]+)", r"\1 have too little \2 free"),
    (r"(\d+) node\(s\) didn't match Pod's node affinity/selector", r"\1 lack the labels of node_selector"),
    (_TAINT + r" \{([^:}]*):? ?([^}]*)\}", r"\1 have the taint \2 that is not tolerated"),
    (_TAINT, r"\1 have taints that are not tolerated"),
    (r"(\d+) node\(s\) were unschedulable", r"\1 take no new pods"),
    (
        r"(\d+) node\(s\) didn't match pod (?:anti-affinity rules|topology spread constraints)",
        r"\1 are taken by this run",
    ),
    (r"(\d+) Too many pods", r"\1 have as many pods as they may"),
)
"""The scheduler's words, and ours."""
_WAYS_OUT = {
    "pulling": "check backend.image and backend.image_pull_secrets",
    "quota": "end another run, or ask for more",
    "nodes": "`dtrain cluster doctor` lays what is asked for beside the nodes there are",
}


@dataclass(frozen=True)
class Reason:
    """Why a pod, or a cluster, is not ready."""

    phase: Phase
    text: str
    weight: int
    """Of several reasons the heaviest is told: what never passes by itself weighs most."""


def of_pod(pod: Object, events: Iterable[Object] = ()) -> Reason | None:
    """None for a pod that is ready, or has done its work."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    who, said = _who(pod), _latest(events, metadata.get("uid"))
    if metadata.get("deletionTimestamp"):
        return Reason("recovering", f"{who} is being ended", 30)
    conditions = {c["type"]: c for c in status.get("conditions") or ()}
    scheduled = conditions.get("PodScheduled") or {}
    if scheduled.get("status") == "False":
        return _unscheduled(who, scheduled, said)
    if status.get("phase") == "Failed" and not status.get("containerStatuses"):
        text = status.get("message") or status.get("reason") or "it failed"
        return Reason("recovering", f"{who} is lost: {_short(text)}", 60)
    parts = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    for part in parts:
        if reason := _of_container(who, part):
            return reason
    is_ready = (conditions.get("Ready") or {}).get("status") == "True"
    if is_ready or status.get("phase") == "Succeeded":
        return None
    if mount := said.get("FailedMount") or said.get("FailedAttachVolume") or said.get("FailedCreatePodSandBox"):
        return Reason("starting", f"{who} cannot be set up: {_short(mount)}; check backend.volumes and the node", 70)
    waiting = {(p.get("state") or {}).get("waiting", {}).get("reason") for p in parts}
    if "ContainerCreating" in waiting or not parts:
        if "Pulling" in said and "Pulled" not in said:
            return Reason("pulling", f"{who} waits for its image, which is being pulled", 20)
        return Reason("starting", f"{who} is being set up on its node", 15)
    if "PodInitializing" in waiting:
        return Reason("starting", f"{who} waits for Ray's head", 10)
    if any(part.get("restartCount") for part in parts):
        return Reason("recovering", f"{who} was started again, and Ray in it is not ready yet", 45)
    return Reason("starting", f"{who} runs, and Ray in it is not ready yet", 12)


def of_cluster(events: Iterable[Object]) -> Reason | None:
    """Why an operator cannot make the pods that a Ray cluster wants; None when nothing was said of that."""
    said = [event for event in events if str(event.get("reason", "")).startswith("FailedToCreate")]
    if not said:
        return None
    return Reason("queued", refusal(str(max(said, key=_time).get("message", ""))), 80)


def refusal(message: str) -> str:
    """What keeps pods from being made, in one sentence."""
    if over := QUOTA.search(message):
        text = f"quota {over['quota']} of the namespace is used up: asked for {over['asked']}, in use {over['used']}"
        return f"{text}, allowed {over['hard']}; {_WAYS_OUT['quota']}"
    if "violates PodSecurity" in message:
        text = message[message.index("violates PodSecurity") :]
        return f"the namespace does not admit its pods: {_short(text)}; change backend.security, or the namespace"
    if found := re.search(r'serviceaccount "(\S+)" not found', message):
        return f"service account {found[1]} is not in the namespace; create it, or change backend.service_account"
    if found := re.search(r"no PriorityClass with name (\S+) was found", message):
        return f"there is no PriorityClass {found[1]}; create it, or change backend.priority_class"
    return f"its pods cannot be made: {_short(message)}; `dtrain cluster doctor` looks further"


def scheduler(message: str) -> str:
    """A scheduler's message in fewer words: `2 of 3 nodes have too little nvidia.com/gpu free`."""
    found = _NODES.match(" ".join(message.split()))
    if found is None:
        return _short(message)
    if found["all"] == "0":
        return "there are no nodes"
    text = found["why"].rstrip(". ")
    for theirs, ours in _SPEC:
        text = re.sub(theirs, ours, text)
    return f"of {found['all']} node{'s' if found['all'] != '1' else ''} {text}" if text else "no node fits"


def _unscheduled(who: str, condition: Object, said: dict[str, str]) -> Reason:
    if condition.get("reason") == "SchedulingGated":
        return Reason("queued", f"{who} is held back until a queue admits it", 50)
    message = str(condition.get("message") or said.get("FailedScheduling") or "")
    text = f"no node fits {who}: {scheduler(message)}" if message else f"{who} waits for a node"
    last = next((kind for kind in reversed(said) if kind in ("TriggeredScaleUp", "NotTriggerScaleUp")), "")
    if last == "TriggeredScaleUp":
        return Reason("queued", f"{text}; a node is being added ({_short(said[last], 120)})", 40)
    if refused := said.get("NotTriggerScaleUp"):
        return Reason("queued", f"{text}; none will be added ({_short(refused, 160)}); {_WAYS_OUT['nodes']}", 75)
    return Reason("queued", f"{text}; {_WAYS_OUT['nodes']}" if message else text, 65 if message else 40)


def _of_container(who: str, part: Object) -> Reason | None:
    state, last = part.get("state") or {}, part.get("lastState") or {}
    waiting = state.get("waiting") or {}
    kind, message = waiting.get("reason"), str(waiting.get("message") or "")
    if kind in IMAGE:
        cause = message.rpartition("failed to do request: ")[2] if "failed to do request: " in message else message
        text = f"{who} cannot pull {part.get('image')}: {_short(cause or str(kind))}; {_WAYS_OUT['pulling']}"
        return Reason("pulling", text, 90)
    if kind in BROKEN:
        ended = last.get("terminated") or {}
        text = _ended(ended) if ended else _short(message)
        return Reason("starting", f"{who} does not start: {text or kind}; `dtrain logs` shows what it printed", 85)
    ended = state.get("terminated")
    if ended and ended.get("exitCode"):
        return Reason("recovering", f"{who} has ended: {_ended(ended)}", 60)
    return None


def _ended(terminated: Object) -> str:
    code, reason = terminated.get("exitCode"), terminated.get("reason") or "Error"
    if reason == "OOMKilled":
        return "it was killed for using more memory than it may; raise backend.head.memory_gib or machine.memory_gib"
    text = f"{_short(str(terminated['message']))}, " if terminated.get("message") else ""
    return f"{text}exit code {code}{' (killed)' if code == MEMORY else ''}"


def _who(pod: Object) -> str:
    labels = pod["metadata"].get("labels") or {}
    kind = labels.get("ray.io/node-type")
    name = str(pod["metadata"]["name"])
    return f"the head's pod {name}" if kind == "head" else f"worker pod {name}" if kind == "worker" else f"pod {name}"


def _latest(events: Iterable[Object], uid: str | None) -> dict[str, str]:
    """The latest message of each reason, of one object, the latest of all last."""
    own = [e for e in events if uid is None or (e.get("involvedObject") or {}).get("uid") in (None, uid)]
    said: dict[str, str] = {}
    for event in sorted(own, key=_time):
        said.pop(str(event.get("reason")), None)
        said[str(event.get("reason"))] = str(event.get("message") or "")
    return said


def _time(event: Object) -> str:
    """KubeRay's events have only `eventTime`, a kubelet's only `lastTimestamp`."""
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or "")


def _short(text: str, most: int = 240) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"
