"""The network side of the backend `kuberay`: hand a run over, look at it, end it.

Every verb can be repeated: a run is one RayJob under the run's own name, so that a second try finds the first.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from dtrain.errors import ClusterError
from dtrain.kubernetes import client, names, sight
from dtrain.kubernetes.client import EVENT, KINDS, POD, RAY_CLUSTER, RAY_JOB, Client, Kind, Object
from dtrain.kubernetes.errors import Refused
from dtrain.kubernetes.watch import watch
from dtrain.sight import Sight

if TYPE_CHECKING:
    from dtrain.finding import Finding
    from dtrain.kubernetes.options import KubeRay

FIRST_WORD_S = 2.0
"""How long the operator gets to say that it finds a run invalid; it takes well under a second."""
GONE_S = 30.0
"""How long objects get to go away, beside the time that pods have for a last checkpoint."""
COLLECTED_S = 0.5
"""Between two looks whether the garbage of an earlier attempt is collected."""
NUM_TOLD = 2
"""Pods whose events are asked for: those that keep the others waiting."""
Say = Callable[[str], None]


class Sendable(Protocol):
    """A backend's submission, as far as it is sent."""

    @property
    def run_id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def namespace(self) -> str: ...
    @property
    def objects(self) -> tuple[Object, ...]: ...


# -- hand over -------------------------------------------------------------------------------------------------


def send(submission: Sendable, options: "KubeRay", say: Say) -> None:
    """Create the run's objects; what is left of an earlier try of it is taken for this one, or replaced.

    Raises `ClusterError`, and then leaves nothing behind.
    """
    with client.of(options) as api:
        job, is_new = _create_job(api, submission, options, say)
        try:
            for made in submission.objects[1:]:
                create_beside(api, made, job, is_new)
            _await_first_word(api, submission)
        except (ClusterError, KeyboardInterrupt):
            if not is_new:
                raise  # it was under way before
            with contextlib.suppress(ClusterError):  # what went wrong first is what is told
                api.delete(RAY_JOB, submission.namespace, submission.name, job["metadata"]["uid"])
            raise
        for text in dict.fromkeys(api.warnings):
            say(f"the cluster warns: {text}")


def check(submission: Sendable, options: "KubeRay") -> list[str]:
    """Let the server take the objects on trial. Returns its warnings; raises `ClusterError` with what it refuses."""
    with client.of(options) as api:
        for made in submission.objects:
            api.create(kind_of(made), made["metadata"]["namespace"], made, is_trial=True)
        return list(dict.fromkeys(api.warnings))


def _create_job(api: Client, submission: Sendable, options: "KubeRay", say: Say) -> tuple[Object, bool]:
    """The run's RayJob, and whether it was made just now."""
    wanted, namespace, name = submission.objects[0], submission.namespace, submission.name
    deadline = time.monotonic() + options.termination_grace_s + GONE_S
    while True:
        repeated = api.num_repeated
        try:
            return api.create(RAY_JOB, namespace, wanted), True
        except Refused as refusal:
            if refusal.code != 409 or time.monotonic() > deadline:
                raise
        found = api.get(RAY_JOB, namespace, name)
        if found is None:
            continue  # it went away in between
        is_own = api.num_repeated > repeated  # the answer was lost, and what is there is what was just made
        if _is_handed_over(found, submission, is_own):
            return found, is_own
        say("taking what is left of an earlier attempt off the cluster")
        api.delete(RAY_JOB, namespace, name, found["metadata"]["uid"])
        await_gone(api, RAY_JOB, namespace, f"metadata.name={name}", deadline)


def _is_handed_over(found: Object, submission: Sendable, is_own: bool) -> bool:
    """Whether the RayJob that is there is this very submission, and not an attempt of the same run that has ended.

    Raises `ClusterError` when the name belongs to another run, or to somebody else.
    """
    ours, theirs = _annotations(submission.objects[0]), _annotations(found)
    where = f"namespace {submission.namespace}"
    if any(ours.get(mark) != theirs.get(mark) for mark in (names.RUN_ID, names.STORAGE)):
        whose = (
            f"run {theirs[names.RUN_ID]} in {theirs.get(names.STORAGE)}" if names.RUN_ID in theirs else "somebody else"
        )
        raise ClusterError(
            f"{where} has a RayJob {submission.name} of {whose} already; give the job another name, or delete that one"
            f" (kubectl delete rayjob -n {submission.namespace} {submission.name})"
        )
    if found["metadata"].get("deletionTimestamp"):
        return False
    if sight.is_done(found):
        return is_own
    if ours.get(names.PLAN) != theirs.get(names.PLAN):
        text = f"run {submission.run_id} is under way with another plan"
        raise ClusterError(f"{where}: {text}; `dtrain stop {submission.run_id}` ends it")
    return True


def create_beside(api: Client, made: Object, owner: Object, is_new: bool) -> None:
    """Create an object that belongs to a RayJob or RayCluster, which may be new, and goes with it.

    Raises `ClusterError` where another has its name, and keeps it.
    """
    metadata = {**made["metadata"], "ownerReferences": [owner_reference(owner)]}
    deadline = time.monotonic() + GONE_S
    while True:
        repeated = api.num_repeated
        try:
            api.create(kind_of(made), metadata["namespace"], {**made, "metadata": metadata})
            return
        except Refused as refusal:
            if refusal.code != 409 or time.monotonic() > deadline:
                raise
        # Where it may not be read, it is this owner's if that was there before, or an answer was lost.
        found, is_readable = _find(api, made)
        owners = (found or {}).get("metadata", {}).get("ownerReferences") or ()
        if any(reference["uid"] == owner["metadata"]["uid"] for reference in owners):
            return
        if not is_readable and (not is_new or api.num_repeated > repeated):
            return
        time.sleep(COLLECTED_S)  # that of an earlier attempt is about to be collected


def _find(api: Client, made: Object) -> tuple[Object | None, bool]:
    """The object that has this one's name, and whether it may be read at all."""
    try:
        return api.get(kind_of(made), made["metadata"]["namespace"], made["metadata"]["name"]), True
    except Refused as refusal:
        if refusal.code != 403:
            raise
        return None, False


def _await_first_word(api: Client, submission: Sendable) -> None:
    """Raises `ClusterError` when the operator finds the run invalid; no word is no error."""
    chosen, job = f"metadata.name={submission.name}", None
    with contextlib.suppress(ClusterError):
        seen = watch(api, RAY_JOB, submission.namespace, fields=chosen, timeout_s=FIRST_WORD_S)
        with contextlib.closing(seen):
            for found in seen:
                job = found.get(submission.name)
                if job is not None and (job.get("status") or {}).get("jobDeploymentStatus"):
                    break
    if job is not None and (job.get("status") or {}).get("jobDeploymentStatus") == "ValidationFailed":
        raise ClusterError(f"namespace {submission.namespace}: {sight.see(job).why}")


def kind_of(made: Mapping[str, Any]) -> Kind:
    """Raises `KeyError` for a kind that dtrain does not send."""
    return KINDS[made["kind"]]


def owner_reference(owner: Object) -> Object:
    metadata = owner["metadata"]
    kind = kind_of(owner)
    version = f"{kind.group}/{kind.version}" if kind.group else kind.version
    return {"apiVersion": version, "kind": kind.name, "name": metadata["name"], "uid": metadata["uid"]}


# -- look ------------------------------------------------------------------------------------------------------


def look(run_id: str, options: "KubeRay") -> Sight | None:
    """What the cluster sees of a run; None when it has none of this id. Raises `ClusterError`."""
    with client.of(options) as api:
        job = find_job(api, run_id, options)
        if job is None:
            return None
        return look_at(api, job, options)


def find_job(api: Client, run_id: str, options: "KubeRay") -> Object | None:
    """The RayJob of a run."""
    job = api.get(RAY_JOB, options.namespace, names.object_name(run_id))
    is_ours = job is not None and (job["metadata"].get("annotations") or {}).get(names.RUN_ID) == run_id
    return job if is_ours else None


def look_at(api: Client, job: Object, options: "KubeRay") -> Sight:
    """A handful of requests at most, and fewer the less there is to explain."""
    namespace, status = options.namespace, job.get("status") or {}
    if sight.is_done(job) or job["metadata"].get("deletionTimestamp"):
        return sight.see(job)
    if sight.see(job).phase == "queued":
        return sight.see(job, workload=_workload(api, job))
    name = status.get("rayClusterName")
    if not name:
        return sight.see(job)
    cluster = api.get(RAY_CLUSTER, namespace, name)
    pods, _ = api.list(POD, namespace, f"ray.io/cluster={name}")
    first = sight.see(job, cluster, pods)
    if first.phase in ("running", "checkpointing") or cluster is None:
        return first
    return sight.see(job, cluster, pods, told_of(api, namespace, cluster, pods))


def told_of(api: Client, namespace: str, cluster: Object, pods: list[Object]) -> list[Object]:
    """Events of a Ray cluster and of the pods that keep it waiting; none where events may not be read."""
    waiting = [pod for pod in pods if sight.conditions(pod).get("Ready", {}).get("status") != "True"]
    waiting.sort(key=lambda pod: sight.conditions(pod).get("PodScheduled", {}).get("status") != "False")
    told: list[Object] = []
    with contextlib.suppress(Refused):
        for made in [cluster, *waiting[:NUM_TOLD]]:
            found, _ = api.list(EVENT, namespace, fields=f"involvedObject.uid={made['metadata']['uid']}")
            told += found
    return told


def _workload(api: Client, job: Object) -> Object | None:
    """Kueue's own record of a run that it holds back; None without Kueue, or where it may not be read."""
    if sight.QUEUE not in (job["metadata"].get("labels") or {}):
        return None
    try:
        group = api.ask("GET", "/apis/kueue.x-k8s.io").json()
        kind = Kind("Workload", "workloads", "kueue.x-k8s.io", group["preferredVersion"]["version"])
        chosen = f"kueue.x-k8s.io/job-uid={job['metadata']['uid']}"
        found, _ = api.list(kind, job["metadata"]["namespace"], chosen)
    except (Refused, KeyError):
        return None
    return found[0] if found else None


def sights(options: "KubeRay") -> dict[str, Sight]:
    """Every run of the namespace, by its id: pages of RayJobs, and one list of pods where some of them wait."""
    with client.of(options) as api:
        jobs, _ = api.list(RAY_JOB, options.namespace, names.SELECTOR)
        ours = {marks[names.RUN_ID]: job for job in jobs if names.RUN_ID in (marks := _annotations(job))}
        pods: dict[str, list[Object]] = {}
        if any(job.get("status", {}).get("rayClusterName") and not sight.is_done(job) for job in ours.values()):
            for pod in api.list(POD, options.namespace, names.SELECTOR)[0]:
                pods.setdefault((pod["metadata"].get("labels") or {}).get("ray.io/cluster", ""), []).append(pod)
    return {
        run_id: sight.see(job, _cluster_of(job), pods.get(job.get("status", {}).get("rayClusterName") or "-", ()))
        for run_id, job in ours.items()
    }


def _annotations(made: Object) -> dict[str, str]:
    return dict(made["metadata"].get("annotations") or {})


def _cluster_of(job: Object) -> Object | None:
    """The Ray cluster as its RayJob tells of it: the operator copies its status, a little late."""
    status = (job.get("status") or {}).get("rayClusterStatus")
    return {"metadata": {}, "status": status} if status else None


# -- end -------------------------------------------------------------------------------------------------------


def end(run_id: str, options: "KubeRay") -> bool:
    """Delete the run's RayJob, and with it all it owns, and wait until its pods are gone.

    False when it was not there. Raises `ClusterError` when something of it stays.
    """
    namespace, name = options.namespace, names.object_name(run_id)
    deadline = time.monotonic() + options.termination_grace_s + GONE_S
    with client.of(options) as api:
        job = find_job(api, run_id, options)
        chosen = f"{names.SELECTOR},{names.RUN}={name}"
        if job is not None:
            api.delete(RAY_JOB, namespace, name, job["metadata"]["uid"])
            await_gone(api, RAY_JOB, namespace, f"metadata.name={name}", deadline, job["metadata"]["uid"])
        await_gone(api, POD, namespace, "", deadline, labels=chosen)
        return job is not None


def await_gone(
    api: Client, kind: Kind, namespace: str, fields: str, deadline: float, uid: str | None = None, labels: str = ""
) -> None:
    """Raises `ClusterError` when objects are still there at the deadline."""
    left: dict[str, Object] = {}
    time_left = max(1.0, deadline - time.monotonic())
    with contextlib.closing(watch(api, kind, namespace, labels, fields, timeout_s=time_left)) as seen:
        for found in seen:
            left = {name: made for name, made in found.items() if uid in (None, made["metadata"]["uid"])}
            if not left:
                return
    holders = sorted({word for made in left.values() for word in made["metadata"].get("finalizers") or ()})
    why = f"{', '.join(holders)} holds it: check that the operator runs" if holders else "look at its node"
    raise ClusterError(
        f"namespace {namespace}: {kind.name} {', '.join(sorted(left)[:5])} is deleted and does not go away; {why}"
        f" (kubectl describe {kind.name.lower()} -n {namespace} {min(left)})"
    )


# -- the others, each in a file of its own -----------------------------------------------------------------------


def logs(run_id: str, options: "KubeRay", which: str, follows: bool) -> Iterator[bytes]:
    from dtrain.kubernetes import logs

    return logs.read(run_id, options, which, follows)


def cluster_up(options: "KubeRay", say: Say) -> dict[str, Any]:
    from dtrain.kubernetes import standing

    return standing.up(options, say)


def cluster_status(options: "KubeRay") -> dict[str, Any]:
    from dtrain.kubernetes import standing

    return standing.status(options)


def cluster_scale(options: "KubeRay", num_nodes: int, say: Say) -> dict[str, Any]:
    from dtrain.kubernetes import standing

    return standing.scale(options, num_nodes, say)


def cluster_down(options: "KubeRay") -> list[str]:
    from dtrain.kubernetes import standing

    return standing.down(options)


def cluster_doctor(options: "KubeRay") -> "list[Finding]":
    from dtrain.kubernetes import doctor

    return doctor.examine(options)
