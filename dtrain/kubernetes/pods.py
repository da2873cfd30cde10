"""Pods of a Ray cluster, as templates: what they ask of a node, and what they are kept from. Pure."""

import math
from dataclasses import dataclass, replace
from typing import Any

from dtrain.kubernetes.options import KubeRay, Placement
from dtrain.settings import to_builtins

HEAD_SHM_GIB = 1.0
HEAD_OBJECT_STORE = 2**28
"""Bytes; the head holds what Ray's own actors say to each other."""
ALL_INTERFACES = "0.0.0.0"  # noqa: S104 -- of a pod, for the operator; a policy and a token say who else
HOSTNAME = "kubernetes.io/hostname"
NODE_TYPE = "ray.io/node-type"
"""Label that the operator puts on pods: `head` or `worker`."""
DO_NOT_MOVE = {
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}
"""For those who would save nodes: moving a pod stops a whole run."""
PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
METRICS = {"metrics": 8080}
PREEMPTED = "dtrain.runtime.preempted"
"""The module that has the runs of a node put their state aside, before its pod is stopped."""
API_ACCESS = {"dtrain.dev/api-access": "true"}
"""Label of the pods that talk to the API server, for the policies of a namespace."""
Mapping = dict[str, Any]


@dataclass(frozen=True)
class Identity:
    """Whose pods they are."""

    labels: dict[str, str]
    annotations: dict[str, str]
    selector: dict[str, str]
    """The label that these pods have and no others."""


@dataclass(frozen=True)
class Shape:
    """What a pod that trains takes of its node."""

    cores: int
    gpus: int
    memory_gib: float
    shm_gib: float
    object_store_gib: float
    is_one_of_many: bool
    """Whether there are more of them, on other nodes."""

    @classmethod
    def of(cls, options: KubeRay, cores: int, gpus: int, is_one_of_many: bool) -> "Shape":
        """Of a run that takes so much of each node: of memory the share that it takes of the GPUs."""
        share = gpus / options.machine.gpus if gpus and options.machine.gpus else 1.0
        shm = share * (options.worker.shm_gib or options.machine.memory_gib / 2)
        return cls(
            cores=cores,
            gpus=gpus,
            memory_gib=share * options.machine.memory_gib,
            shm_gib=shm,
            object_store_gib=min(options.worker.object_store_gib, shm / 2),
            is_one_of_many=is_one_of_many,
        )


def head_group(options: KubeRay, who: Identity) -> Mapping:
    """The head: no GPUs and nothing for Ray to schedule on; the driver runs there."""
    head = options.head
    amounts = {"cpu": _number(head.cores), "memory": _gib(head.memory_gib)}
    spec = _pod(options, head, HEAD_SHM_GIB)
    spec["containers"] = [_container(options, "ray-head", amounts, {**PORTS, **METRICS}, options.env, False)]
    if options.autoscaling is not None:
        # The autoscaler beside it changes the cluster's size through the API server.
        spec["automountServiceAccountToken"] = True
        spec |= _account(options.autoscaling.service_account or options.service_account)
        who = replace(who, labels={**who.labels, **API_ACCESS})
    return {
        "rayStartParams": {
            "dashboard-host": ALL_INTERFACES,
            "num-cpus": "0",
            "num-gpus": "0",
            "object-store-memory": str(HEAD_OBJECT_STORE),
        },
        "template": _template(who, spec, head),
    }


def worker_group(options: KubeRay, who: Identity, shape: Shape, num_nodes: int) -> Mapping:
    """One group of equal nodes, a pod on each."""
    worker, scaling = options.worker, options.autoscaling
    amounts: Mapping = {"cpu": _number(shape.cores), "memory": _gib(shape.memory_gib)}
    if shape.gpus:
        amounts[worker.gpu_resource] = shape.gpus
    if shape.is_one_of_many:
        amounts |= options.network.resources
    spec = _pod(options, worker, shape.shm_gib)
    if worker.runtime_class is not None:
        spec["runtimeClassName"] = worker.runtime_class
    if shape.is_one_of_many:
        spec |= _apart(options, who)
    env = {**options.env, **options.network.env}
    container = _container(options, "ray-worker", amounts, METRICS, env, options.network.lock_memory)
    if worker.scratch_gib is not None:  # asked for and not a limit: going over it is no reason to end a run
        container["resources"]["requests"]["ephemeral-storage"] = _gib(worker.scratch_gib)
    # The grace period begins with this command; what is left after it is for Ray to end.
    patience_s = max(1, options.termination_grace_s * 5 // 6)
    leave = ["python", "-m", PREEMPTED, "--within", str(patience_s)]
    container["lifecycle"] = {"preStop": {"exec": {"command": leave}}}
    spec["containers"] = [container]
    group: Mapping = {
        "groupName": "gpu" if shape.gpus else "cpu",
        "replicas": num_nodes,
        "minReplicas": num_nodes if scaling is None else min(scaling.min_nodes, num_nodes),
        "maxReplicas": num_nodes if scaling is None else max(scaling.max_nodes, num_nodes),
        "numOfHosts": 1,
    }
    if worker.spot:
        group["labels"] = {"ray.io/market-type": "spot"}
    group["rayStartParams"] = {
        "num-cpus": str(shape.cores),
        "num-gpus": str(shape.gpus),
        "object-store-memory": str(int(shape.object_store_gib * 2**30)),
    }
    group["template"] = _template(who, spec, worker)
    return group


def unprivileged(options: KubeRay, *, locks_memory: bool = False, read_only: bool | None = None) -> Mapping:
    """What a container may do: nothing but what any process may."""
    capabilities: Mapping = {"drop": ["ALL"]}
    if locks_memory:
        capabilities["add"] = ["IPC_LOCK"]
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": capabilities,
        "readOnlyRootFilesystem": options.security.read_only_root if read_only is None else read_only,
    }


def merged(base: Any, over: Any) -> Any:
    """`over` laid on `base`: mappings merge, lists of named things by name, other lists grow; the rest is `over`."""
    if isinstance(base, dict) and isinstance(over, dict):
        return {**base, **{key: merged(base[key], value) if key in base else value for key, value in over.items()}}
    if isinstance(base, list) and isinstance(over, list):
        places = {item["name"]: number for number, item in enumerate(base) if isinstance(item, dict) and "name" in item}
        made = list(base)
        for item in over:
            number = places.get(item.get("name")) if isinstance(item, dict) else None
            if number is None:
                made.append(item)
            else:
                made[number] = merged(made[number], item)
        return made
    return over


def _template(who: Identity, spec: Mapping, placement: Placement) -> Mapping:
    return {
        "metadata": {"labels": dict(who.labels), "annotations": {**DO_NOT_MOVE, **who.annotations}},
        "spec": merged(spec, placement.overlay),
    }


def _pod(options: KubeRay, placement: Placement, shm_gib: float) -> Mapping:
    """What the pods of head and workers have in common; containers come last, and are read first."""
    spec: Mapping = {"containers": []}
    if placement.node_selector:
        spec["nodeSelector"] = dict(placement.node_selector)
    if placement.tolerations:
        spec["tolerations"] = [
            {key: value for key, value in to_builtins(taint).items() if value is not None}
            for taint in placement.tolerations
        ]
    if options.priority_class is not None:
        spec["priorityClassName"] = options.priority_class
    spec |= _account(options.service_account)
    spec["automountServiceAccountToken"] = False
    spec["enableServiceLinks"] = False
    if options.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in options.image_pull_secrets]
    spec["terminationGracePeriodSeconds"] = options.termination_grace_s
    spec["securityContext"] = {
        "runAsNonRoot": True,
        "runAsUser": options.security.user,
        "runAsGroup": options.security.group,
        "fsGroup": options.security.group,
        "fsGroupChangePolicy": "OnRootMismatch",  # a folder of many checkpoints takes minutes to walk
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    spec["volumes"] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _gib(shm_gib)}},
        {"name": "tmp", "emptyDir": {}},
    ]
    for number, volume in enumerate(options.volumes):
        source: Mapping = {"hostPath": {"path": volume.host_path, "type": "Directory"}}
        if volume.secret is not None:
            source = {"secret": {"secretName": volume.secret}}
        elif volume.claim is not None:
            source = {"persistentVolumeClaim": {"claimName": volume.claim, "readOnly": volume.read_only}}
        spec["volumes"].append({"name": f"volume-{number}", **source})
    return spec


def _container(
    options: KubeRay, name: str, amounts: Mapping, ports: dict[str, int], env: dict[str, str], locks_memory: bool
) -> Mapping:
    """The Ray container; the operator writes its command, probes, and what it must know of the head."""
    variables = {
        "HOME": "/tmp",  # noqa: S108 -- a volume of the pod's own
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # nothing in the pod goes before the ranks
        **env,
    }
    container: Mapping = {
        "name": name,
        "image": options.image,
        "imagePullPolicy": options.image_pull_policy,
        # Requests are limits: a node's pods never have to share what one of them was promised.
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "ports": [{"name": key, "containerPort": port} for key, port in ports.items()],
        "env": [{"name": key, "value": value} for key, value in variables.items()],
    }
    if options.env_from:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in options.env_from]
    container["volumeMounts"] = [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108
    for number, volume in enumerate(options.volumes):
        read_only = {"readOnly": True} if volume.read_only or volume.secret is not None else {}
        container["volumeMounts"].append({"name": f"volume-{number}", "mountPath": volume.mount, **read_only})
    container["securityContext"] = unprivileged(options, locks_memory=locks_memory)
    return container


def _apart(options: KubeRay, who: Identity) -> Mapping:
    """Where the workers are to each other: on nodes of their own, and those near each other."""
    worker, workers = options.worker, {"matchLabels": {**who.selector, NODE_TYPE: "worker"}}
    made: Mapping = {}
    affinity: Mapping = {}
    if worker.near is not None:
        term = {"topologyKey": worker.near, "labelSelector": workers}
        affinity["podAffinity"] = {
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": term}]
        }
    if worker.spread == "require":
        # A spread constraint would let two share a node as long as every other known node has one.
        term = {"topologyKey": HOSTNAME, "labelSelector": workers}
        affinity["podAntiAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
    if affinity:
        made["affinity"] = affinity
    if worker.spread == "prefer":
        made["topologySpreadConstraints"] = [
            {
                "maxSkew": 1,
                "topologyKey": HOSTNAME,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": workers,
            }
        ]
    return made


def _account(name: str | None) -> Mapping:
    return {} if name is None else {"serviceAccountName": name}


def _number(amount: float) -> str:
    return f"{amount:g}"


def _gib(gib: float) -> str:
    return f"{gib:g}Gi" if gib == int(gib) else f"{math.floor(gib * 1024)}Mi"
