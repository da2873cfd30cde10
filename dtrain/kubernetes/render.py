"""From a plan to the objects that are sent. Pure: no network, no clock, no chance; the same plan, the same bytes.

How a run is submitted: HTTPMode. The operator hands the entry point to the head over HTTP, word for word, and there is
no third pod. K8sJobMode would paste it into the shell of a submitter pod, whose Job has retries of its own, and would
call a run that never reached Ray a success. Its one gain, the driver's output in a pod of its own, is not needed: the
run's folder has it. `backoffLimit: 0`: failures are counted by dtrain, once.
"""

import hashlib
import shlex
from typing import TYPE_CHECKING, Any

from dtrain import __version__
from dtrain.errors import InputError
from dtrain.footprint import optimizer_bytes
from dtrain.kubernetes import names, pods
from dtrain.kubernetes.options import KubeRay
from dtrain.kubernetes.pods import Identity, Shape
from dtrain.plan import Plan

if TYPE_CHECKING:
    from dtrain.plan import AnyPlan

Object = dict[str, Any]
QUEUE = "kueue.x-k8s.io/queue-name"
QUEUE_PRIORITY = "kueue.x-k8s.io/priority-class"
GANG = {
    "volcano": ("volcano.sh/queue-name", {"ray.io/scheduler-name": "volcano"}),
    "yunikorn": ("yunikorn.apache.org/queue", {"ray.io/gang-scheduling-enabled": "true"}),
}
"""Label for the queue of each scheduler, and those by which the operator knows of it."""
YUNIKORN_APP = "yunikorn.apache.org/app-id"


def run_objects(plan: "AnyPlan", options: KubeRay, run_id: str, entrypoint: tuple[str, ...]) -> tuple[Object, ...]:
    """What is sent for a run, the RayJob first: what comes after belongs to it and goes with it."""
    name = names.object_name(run_id)
    labels = {**options.labels, **names.run_labels(run_id)}
    of_run = {
        **options.annotations,
        names.RUN_ID: run_id,
        names.STORAGE: plan.storage,
        names.PLAN: hashlib.sha256(plan.to_json().encode()).hexdigest()[:16],
        names.VERSION: __version__,
    }
    who = Identity(labels, options.annotations, {names.RUN: name})
    job: Object = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": name,
            "namespace": options.namespace,
            "labels": {**labels, names.JOB: plan.name.replace("_", "-"), **_scheduling(options, name)},
            "annotations": of_run,
        },
        "spec": _job(options, name, entrypoint),
    }
    if options.standing is not None:
        return (job,)
    workers = plan.workers
    gpus = workers.per_node if workers.device == "cuda" else 0
    shape = Shape.of(options, workers.cpus_per_node, gpus, is_one_of_many=workers.num_nodes > 1)
    _check_room(plan, shape)
    job["spec"]["rayClusterSpec"] = _cluster(options, who, shape, workers.num_nodes)
    return (job, *_policies(options, name, who))


def _check_room(plan: "AnyPlan", shape: Shape) -> None:
    """Raises `InputError` when the snapshot of the state cannot lie in /dev/shm, however the nodes share it."""
    if not isinstance(plan, Plan):
        return
    state_gib = plan.arithmetic.num_parameters * (4.0 + optimizer_bytes(plan)) / plan.workers.num_nodes / 2**30
    room_gib = shape.shm_gib - shape.object_store_gib
    if state_gib > room_gib:
        raise InputError(
            f"the snapshot of weights and optimizer state takes {state_gib:.1f} GiB of each node's /dev/shm, which has"
            f" {room_gib:.1f} for it; give more by backend.worker.shm_gib, or use more nodes"
        )


def cluster_objects(options: KubeRay) -> tuple[Object, ...]:
    """What is sent for the cluster that stands (`options.standing`), the RayCluster first."""
    standing = options.standing
    assert standing is not None
    labels = {**options.labels, **names.cluster_labels(standing.name)}
    who = Identity(labels, options.annotations, {names.CLUSTER: standing.name})
    machine = options.machine
    shape = Shape.of(options, machine.cores, machine.gpus, is_one_of_many=True)
    cluster = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {
            "name": standing.name,
            "namespace": options.namespace,
            "labels": labels,
            "annotations": {**options.annotations, names.VERSION: __version__},
        },
        "spec": _cluster(options, who, shape, standing.nodes),
    }
    return (cluster, *_policies(options, standing.name, who))


def text(objects: tuple[Object, ...]) -> str:
    """The objects as YAML that `kubectl apply -f -` takes, in the order in which they are sent."""
    import yaml

    class Plain(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]  # both write the same text
        """Writes what occurs twice twice."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    made = yaml.dump_all(objects, Dumper=Plain, sort_keys=False, allow_unicode=True, width=1000)
    return made.removesuffix("\n")


def _job(options: KubeRay, name: str, entrypoint: tuple[str, ...]) -> Object:
    spec: Object = {
        "entrypoint": shlex.join(entrypoint),
        "submissionMode": "HTTPMode",
        "backoffLimit": 0,
        # A job that cannot start says nothing of it: without this it would be Initializing for ever.
        "preRunningDeadlineSeconds": options.pending_deadline_s,
    }
    if options.active_deadline_s is not None:
        spec["activeDeadlineSeconds"] = options.active_deadline_s
    if options.standing is not None:
        # An id can be used once on a cluster: there the operator makes one for each submission.
        return {**spec, "clusterSelector": {"ray.io/cluster": options.standing.name}}
    spec["jobId"] = name
    spec["shutdownAfterJobFinishes"] = True
    spec["ttlSecondsAfterFinished"] = options.ttl_after_finished_s
    if options.queue is not None:
        spec["suspend"] = True
    return spec


def _cluster(options: KubeRay, who: Identity, shape: Shape, num_nodes: int) -> Object:
    spec: Object = {"rayVersion": options.ray_version, "authOptions": {"mode": options.auth.mode}}
    if options.auth.secret is not None:
        spec["authOptions"]["secretName"] = options.auth.secret
    redis = options.gcs_fault_tolerance
    if redis is not None:
        spec["gcsFaultToleranceOptions"] = {"redisAddress": redis.redis_address}
        if redis.password_secret is not None:
            key = {"name": redis.password_secret, "key": redis.password_key}
            spec["gcsFaultToleranceOptions"]["redisPassword"] = {"valueFrom": {"secretKeyRef": key}}
    scaling = options.autoscaling
    if scaling is not None:
        spec["enableInTreeAutoscaling"] = True
        spec["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": scaling.idle_timeout_s,
            "securityContext": pods.unprivileged(options),
        }
    spec["headGroupSpec"] = pods.head_group(options, who)
    spec["workerGroupSpecs"] = [pods.worker_group(options, who, shape, num_nodes)]
    return spec


def _scheduling(options: KubeRay, name: str) -> dict[str, str]:
    """Labels by which a queue or a scheduler takes the run up."""
    labels = {}
    if options.queue is not None:
        labels[QUEUE] = options.queue.name
        if options.queue.priority_class is not None:
            labels[QUEUE_PRIORITY] = options.queue.priority_class
    if options.gang is not None:
        queue, known_by = GANG[options.gang.scheduler]
        labels |= known_by
        if options.gang.scheduler == "yunikorn":
            labels[YUNIKORN_APP] = name
        if options.gang.queue is not None:
            labels[queue] = options.gang.queue
        if options.gang.scheduler == "volcano" and options.priority_class is not None:
            labels["ray.io/priority-class-name"] = options.priority_class
    return labels


def _policies(options: KubeRay, name: str, who: Identity) -> tuple[Object, ...]:
    """Pods of a run may talk to each other. No policy can say "those of the same run", so that each run brings one."""
    if not options.network.isolate:
        return ()
    peers = [{"podSelector": {"matchLabels": dict(who.selector)}}]
    metadata: Object = {"name": name, "namespace": options.namespace, "labels": dict(who.labels)}
    if who.annotations:
        metadata["annotations"] = dict(who.annotations)
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata,
        "spec": {
            "podSelector": {"matchLabels": dict(who.selector)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": peers}],
            "egress": [{"to": peers}],
        },
    }
    return (policy,)
