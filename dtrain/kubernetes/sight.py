"""What a cluster sees of a run: its RayJob, Ray cluster, pods and what was said of them, as one phase and one sentence.

Pure. After the recorded behaviour of the operator: done means Complete, Failed or ValidationFailed; a job's own status
comes earlier, and vanishes again when a head is lost; a Ray cluster's `ready` never goes back, its conditions do.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from dtrain.kubernetes import why
from dtrain.kubernetes.why import Reason
from dtrain.sight import Sight

Object = Mapping[str, Any]
DONE = frozenset({"Complete", "Failed", "ValidationFailed"})
UNNOTICED_S = 15.0
"""An operator takes up a new object within a second; after this time it is missing."""
QUEUE = "kueue.x-k8s.io/queue-name"


def is_done(job: Object) -> bool:
    return (job.get("status") or {}).get("jobDeploymentStatus") in DONE


def see(
    job: Object,
    cluster: Object | None = None,
    pods: Sequence[Object] = (),
    events: Sequence[Object] = (),
    workload: Object | None = None,
    now: float | None = None,
) -> Sight:
    """What is seen of a run; the more is given beside its RayJob, the more is known of why it waits."""
    status = job.get("status") or {}
    stage = str(status.get("jobDeploymentStatus") or "")
    if stage in DONE:
        return _ended(status, stage)
    if job["metadata"].get("deletionTimestamp"):
        return Sight(phase="ended", why="it is being taken off the cluster")
    is_held = bool((job.get("spec") or {}).get("suspend")) and not status.get("rayClusterName")
    if stage in ("Suspending", "Suspended") or (is_held and stage in ("", "Initializing")):
        return Sight(phase="queued", why=_queued(job, workload))
    if not status:
        return _unnoticed(job, now)
    if not stage:
        return Sight(phase="starting", why="the operator starts it again")
    if stage == "Retrying":
        return Sight(phase="recovering", why="the operator starts it again with another Ray cluster")
    if stage == "Running" and status.get("jobStatus") in ("SUCCEEDED", "FAILED", "STOPPED"):
        return Sight(phase="ended", why="its driver has ended, and the operator is about to say so")
    reason = heaviest(cluster, pods, events)
    if stage == "Running" and status.get("jobStatus") == "RUNNING":
        return _running(cluster, pods, reason)
    if reason is not None:
        return _sight(reason if reason.phase != "recovering" else Reason("starting", reason.text, reason.weight))
    if stage == "Running":
        return Sight(phase="starting", why="Ray is up, and its driver is being started")
    return Sight(phase="starting", why="Ray is being started" if pods else "its pods are being made")


def _ended(status: Object, stage: str) -> Sight:
    job_status, message = status.get("jobStatus"), " ".join(str(status.get("message") or "").split())
    if stage == "Complete":
        if job_status == "STOPPED":
            return Sight(phase="ended", why="it was stopped", is_over=True, succeeded=False)
        return Sight(phase="ended", is_over=True, succeeded=True)
    if stage == "ValidationFailed":
        text = f"the operator finds it invalid: {message}; this is a mistake of dtrain's, or of an `overlay`"
    elif status.get("reason") == "PreRunningDeadlineExceeded":
        text = "it did not start within backend.pending_deadline_s; `dtrain cluster doctor` looks for the cause"
    elif status.get("reason") == "DeadlineExceeded":
        done = "end" if job_status else "start"
        text = f"it did not {done} within backend.active_deadline_s; raise it, or leave it out"
    else:
        told = message.partition(", last available logs")[0] or str(status.get("reason") or "it failed")
        text = f"its driver failed: {told[:300]}; `dtrain logs --driver` shows more"
    return Sight(phase="ended", why=text, is_over=True, succeeded=False)


def _queued(job: Object, workload: Object | None) -> str:
    queue = (job["metadata"].get("labels") or {}).get(QUEUE)
    if queue is None:
        return "somebody has suspended it; `dtrain stop` and `dtrain resume` start it anew"
    conditions = {c["type"]: c for c in ((workload or {}).get("status") or {}).get("conditions") or ()}
    for kind in ("Evicted", "Preempted", "QuotaReserved", "Admitted"):
        found = conditions.get(kind)
        is_bad = found is not None and found.get("status") == ("True" if kind in ("Evicted", "Preempted") else "False")
        if found is not None and is_bad and found.get("message"):
            return f"queue {queue} has not admitted it: {' '.join(str(found['message']).split())}"
    return f"it waits for queue {queue} to admit it"


def _unnoticed(job: Object, now: float | None) -> Sight:
    made = job["metadata"].get("creationTimestamp")
    moment = datetime.now(UTC).timestamp() if now is None else now
    if made and moment - datetime.fromisoformat(made).timestamp() > UNNOTICED_S:
        text = "the KubeRay operator has not taken it up; check that it runs and watches this namespace"
        return Sight(phase="queued", why=f"{text} (`dtrain cluster doctor`)")
    return Sight(phase="queued", why="it was handed over to the KubeRay operator")


def _running(cluster: Object | None, pods: Sequence[Object], reason: Reason | None) -> Sight:
    head = conditions(cluster).get("HeadPodReady", {})
    if head.get("status") == "False":
        return Sight(phase="recovering", why=f"Ray's head is lost ({_said(head)}); the operator starts another")
    ending = [pod for pod in pods if pod["metadata"].get("deletionTimestamp")]
    if ending:
        names = ", ".join(pod["metadata"]["name"] for pod in ending[:3])
        return Sight(phase="checkpointing", why=f"{names} will be taken away, after a last checkpoint")
    if reason is not None and reason.weight >= 40:
        return Sight(phase="recovering", why=reason.text)
    return Sight(phase="running")


def conditions(made: Object | None) -> dict[str, Object]:
    return {c["type"]: c for c in ((made or {}).get("status") or {}).get("conditions") or ()}


def _said(condition: Object) -> str:
    return " ".join(str(condition.get("message") or condition.get("reason") or "not ready").split())


def heaviest(cluster: Object | None, pods: Sequence[Object], events: Iterable[Object]) -> Reason | None:
    """What weighs most of all that keeps a Ray cluster from being ready."""
    told = list(events)
    reasons = [reason for pod in pods if (reason := why.of_pod(pod, told)) is not None]
    failure = conditions(cluster).get("ReplicaFailure", {})
    uid = (cluster or {}).get("metadata", {}).get("uid")
    about = [event for event in told if uid and (event.get("involvedObject") or {}).get("uid") == uid]
    wanted = 1 + int(((cluster or {}).get("status") or {}).get("desiredWorkerReplicas") or 0)
    if failure.get("status") == "True":  # the operator takes it back once it succeeds
        reasons.append(Reason("queued", why.refusal(_said(failure)), 80))
    elif len(pods) < wanted and (made := why.of_cluster(about)):
        reasons.append(made)
    if not reasons:
        return None
    heaviest = max(reasons, key=lambda reason: reason.weight)
    num_alike = sum(reason.weight == heaviest.weight for reason in reasons)
    if num_alike == 1:
        return heaviest
    text, stop, remedy = heaviest.text.partition("; ")
    return Reason(heaviest.phase, f"{text} (and {num_alike - 1} more like it){stop}{remedy}", heaviest.weight)


def _sight(reason: Reason) -> Sight:
    return Sight(phase=reason.phase, why=reason.text)
