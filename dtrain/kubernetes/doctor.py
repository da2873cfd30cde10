"""Whether a Kubernetes cluster has what the runs of a cluster file need: `dtrain cluster doctor`.

It only looks, and lets the server take one object on trial. What may not be looked at is said, never guessed.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dtrain.errors import ClusterError
from dtrain.finding import Finding
from dtrain.kubernetes import client, errors, kubeconfig
from dtrain.kubernetes.capacity import nodes, quotas, trial
from dtrain.kubernetes.client import RAY_CLUSTER, Client, Kind, Object
from dtrain.kubernetes.errors import Refused

if TYPE_CHECKING:
    from dtrain.kubernetes.options import KubeRay

NEEDED = (
    ("ray.io", "rayjobs", ("create", "delete", "get", "list", "watch"), "submit, stop, status, ps"),
    ("ray.io", "rayclusters", ("get", "list", "watch"), "status"),
    ("", "pods", ("list", "watch"), "status, stop"),
    ("", "pods/log", ("get",), "logs"),
)
"""Group, resource, verbs and what for: without them no run."""
NEEDED_TO_ISOLATE = ("networking.k8s.io", "networkpolicies", ("create",), "submit (network.isolate)")
NEEDED_FOR_STANDING = ("ray.io", "rayclusters", ("create", "delete", "patch"), "cluster up, down, scale")
HELPFUL = (
    ("", "events", ("list",), "why a run waits"),
    ("", "resourcequotas", ("list",), "this doctor"),
    ("", "nodes", ("list",), "this doctor"),
)
"""Without them less can be said."""
REVIEW = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
CLAIM = Kind("PersistentVolumeClaim", "persistentvolumeclaims")
ACCOUNT = Kind("ServiceAccount", "serviceaccounts")
PRIORITY = Kind("PriorityClass", "priorityclasses", "scheduling.k8s.io", namespaced=False)
RUNTIME = Kind("RuntimeClass", "runtimeclasses", "node.k8s.io", namespaced=False)
SECRET = client.KINDS["Secret"]
MANY_NODES = "ReadWriteMany"
Needed = tuple[str, str, tuple[str, ...], str]


def examine(options: "KubeRay") -> list[Finding]:
    """Look at everything, the cluster itself first: without it the rest is not looked at."""
    found: list[Finding] = []
    try:
        access = kubeconfig.find(options.kubeconfig, options.context)
        with Client(access) as api:
            version = api.ask("GET", "/version").json().get("gitVersion", "of an unknown version")
            found.append(Finding("cluster", "ok", f"Kubernetes {version} at {access.host} ({access.source})"))
            for look in _looks(api, options):
                found += _safely(*look)
    except ClusterError as error:
        found.append(_problem("cluster", error))
    return found


def _looks(api: Client, options: "KubeRay") -> Iterator[tuple[str, Callable[[], Iterable[Finding]]]]:
    yield "permissions", lambda: _permissions(api, options)
    yield "KubeRay", lambda: _kuberay(api, options)
    if options.queue is not None:
        yield "queue", lambda: _queue(api, options)
    yield "quota", lambda: quotas(api, options)
    yield "nodes", lambda: nodes(api, options)
    for area, kind, name, remedy in _named(options):
        yield area, lambda a=area, k=kind, n=name, r=remedy: _exists(api, options, a, k, n, r)  # type: ignore[misc]
    for volume in options.volumes:
        if volume.claim:
            yield "storage", lambda claim=volume.claim: _claim(api, options, claim)  # type: ignore[misc]


def _safely(area: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What one look found; that it may not look is a warning, that the cluster does not answer a problem."""
    try:
        return list(look())
    except Refused as refusal:
        if refusal.code == 403:
            return [Finding(area, "warning", "cannot be looked at", refusal.message)]
        return [_problem(area, refusal)]


def _problem(area: str, error: ClusterError) -> Finding:
    text, _, remedy = error.message.rpartition("; ")
    return Finding(area, "problem", text or error.message, remedy if text else "see the message")


# -- what we may do ----------------------------------------------------------------------------------------------


def _permissions(api: Client, options: "KubeRay") -> Iterator[Finding]:
    needed: list[Needed] = [*NEEDED]
    needed += [NEEDED_TO_ISOLATE] if options.network.isolate else []
    needed += [NEEDED_FOR_STANDING] if options.standing is not None else []
    missing = [word for need in needed for word in _missing(api, options, need)]
    if missing:
        rules = "; ".join(f"{_rule(need, verbs)}" for need, verbs in missing)
        what = ", ".join(f"{'/'.join(verbs)} {need[1]} (for {need[3]})" for need, verbs in missing)
        text = f"in namespace {options.namespace} you may not {what}"
        yield Finding("permissions", "problem", text, f"ask for a role with {rules} (helm/dtrain has one)")
    else:
        yield Finding("permissions", "ok", f"all that runs need in namespace {options.namespace}")
    lacking = [word for need in HELPFUL for word in _missing(api, options, need)]
    if lacking:
        what = ", ".join(f"{'/'.join(verbs)} {need[1]} (for {need[3]})" for need, verbs in lacking)
        rules = "; ".join(f"{_rule(need, verbs)}" for need, verbs in lacking)
        yield Finding("permissions", "warning", f"you may not {what}", f"runs work without; else ask for {rules}")


def _missing(api: Client, options: "KubeRay", need: Needed) -> list[tuple[Needed, list[str]]]:
    group, resource, verbs, _ = need
    plural, _, part = resource.partition("/")
    lacking = []
    for verb in verbs:
        asked: dict[str, Any] = {"group": group, "resource": plural, "verb": verb}
        asked |= {"namespace": options.namespace} if plural != "nodes" else {}
        asked |= {"subresource": part} if part else {}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
        answer = api.ask("POST", REVIEW, None, {**review, "spec": {"resourceAttributes": asked}}).json()
        if not answer["status"]["allowed"]:
            lacking.append(verb)
    return [(need, lacking)] if lacking else []


def _rule(need: Needed, verbs: list[str]) -> str:
    group, resource = need[0] or '""', need[1]
    return f"{{apiGroups: [{group}], resources: [{resource}], verbs: [{', '.join(verbs)}]}}"


# -- what is installed -------------------------------------------------------------------------------------------


def _kuberay(api: Client, options: "KubeRay") -> Iterator[Finding]:
    """Its CRDs, and whether they know every field that dtrain writes: the server takes a Ray cluster on trial."""
    served = api.ask("GET", "/apis/ray.io/v1").json()
    plurals = {resource["name"] for resource in served["resources"]}
    if lacking := {"rayjobs", "rayclusters"} - plurals:
        text = f"the cluster serves no {', '.join(sorted(lacking))} of ray.io/v1"
        yield Finding("KubeRay", "problem", text, errors.INSTALL["ray.io"])
        return
    num_warnings = len(api.warnings)
    try:
        api.create(RAY_CLUSTER, options.namespace, trial(options), is_trial=True)
    except Refused as refusal:
        if refusal.code != 403:
            raise
        text = "RayJob and RayCluster of ray.io/v1 are served; whether they know all fields could not be tried"
        yield Finding("KubeRay", "ok", text)
        return
    for text in api.warnings[num_warnings:]:
        yield Finding("KubeRay", "warning", f"the server warns: {text}", "upgrade the KubeRay operator")
    yield Finding("KubeRay", "ok", "RayJob and RayCluster of ray.io/v1 are served, and know every field that is sent")


def _queue(api: Client, options: "KubeRay") -> Iterator[Finding]:
    assert options.queue is not None
    name = options.queue.name
    group = api.ask("GET", "/apis/kueue.x-k8s.io").json()
    version = group["preferredVersion"]["version"]
    queue = api.get(Kind("LocalQueue", "localqueues", "kueue.x-k8s.io", version), options.namespace, name)
    if queue is None:
        text = f"there is no LocalQueue {name} in namespace {options.namespace}"
        yield Finding("queue", "problem", text, "create it (helm/dtrain can), or change backend.queue.name")
        return
    active = _condition(queue, "Active")
    if active.get("status") == "False":
        text = f"LocalQueue {name} is not active: {active.get('message') or active.get('reason')}"
        yield Finding("queue", "problem", text, "ask whoever runs Kueue")
        return
    status = queue.get("status") or {}
    waiting, admitted = status.get("pendingWorkloads", 0), status.get("admittedWorkloads", 0)
    to = (queue.get("spec") or {}).get("clusterQueue", "?")
    yield Finding("queue", "ok", f"{name} (to {to}): {waiting} waiting, {admitted} admitted")


def _named(options: "KubeRay") -> Iterator[tuple[str, Kind, str, str]]:
    if options.service_account:
        yield "service account", ACCOUNT, options.service_account, "create it, or change backend.service_account"
    if options.priority_class:
        yield "priority class", PRIORITY, options.priority_class, "create it, or change backend.priority_class"
    if options.worker.runtime_class:
        yield "runtime class", RUNTIME, options.worker.runtime_class, "install it, or change worker.runtime_class"
    secrets = dict.fromkeys(options.image_pull_secrets, "backend.image_pull_secrets")
    secrets |= dict.fromkeys(options.env_from, "backend.env_from")
    secrets |= {options.auth.secret: "backend.auth.secret"} if options.auth.secret else {}
    if redis := options.gcs_fault_tolerance:
        secrets |= {redis.password_secret: "backend.gcs_fault_tolerance"} if redis.password_secret else {}
    for name, where in secrets.items():
        yield "secret", SECRET, name, f"create it, or change {where}"


def _exists(api: Client, options: "KubeRay", area: str, kind: Kind, name: str, remedy: str) -> Iterator[Finding]:
    try:
        found = api.get(kind, options.namespace if kind.namespaced else None, name)
    except Refused as refusal:
        if refusal.code != 403:
            raise
        text = f"whether there is a {kind.name} {name} cannot be seen"
        yield Finding(area, "warning", text, f"ask whoever runs the cluster, or may get {kind.plural}")
        return
    where = f" in namespace {options.namespace}" if kind.namespaced else ""
    if found is None:
        yield Finding(area, "problem", f"there is no {kind.name} {name}{where}", remedy)
    else:
        yield Finding(area, "ok", f"{kind.name} {name} is there")


def _claim(api: Client, options: "KubeRay", name: str) -> Iterator[Finding]:
    claim = api.get(CLAIM, options.namespace, name)
    if claim is None:
        text = f"there is no PersistentVolumeClaim {name} in namespace {options.namespace}"
        yield Finding("storage", "problem", text, "create it (helm/dtrain can), or change backend.volumes")
        return
    spec, phase = claim.get("spec") or {}, (claim.get("status") or {}).get("phase")
    kind = spec.get("storageClassName") or "the default storage class"
    if phase == "Lost":
        yield Finding("storage", "problem", f"the volume of {name} is lost", "restore it, or make another claim")
    elif phase != "Bound":
        text = f"{name} has no volume yet ({phase or 'new'}; {kind})"
        yield Finding("storage", "warning", text, "with WaitForFirstConsumer it gets one from the first pod; else look"
                      f" at kubectl describe pvc -n {options.namespace} {name}")  # fmt: skip
    modes = spec.get("accessModes") or []
    if MANY_NODES not in modes:
        text = f"{name} can be written from one node only ({', '.join(modes)}), and the head is on one of its own"
        yield Finding("storage", "problem", text, f"make a claim with {MANY_NODES}, or keep runs in a bucket")
    elif phase == "Bound":
        yield Finding("storage", "ok", f"{name}: {spec.get('resources', {}).get('requests', {}).get('storage', '?')}")


def _condition(made: Object, kind: str) -> Object:
    found = (made.get("status") or {}).get("conditions") or ()
    return next((condition for condition in found if condition["type"] == kind), {})
