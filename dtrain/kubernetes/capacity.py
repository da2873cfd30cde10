"""What a run asks of nodes and quotas, laid beside those there are."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from dtrain.finding import Finding
from dtrain.kubernetes.client import Client, Kind, Object

if TYPE_CHECKING:
    from dtrain.kubernetes.options import KubeRay

TRIAL = "dtrain-doctor"
NODE = Kind("Node", "nodes", namespaced=False)
QUOTA = Kind("ResourceQuota", "resourcequotas")
SUFFIXES = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
            "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50, "Ei": 2.0**60}  # fmt: skip
HARD_EFFECTS = ("NoSchedule", "NoExecute")
SHAPE_LABELS = ("node.kubernetes.io/instance-type", "nvidia.com/gpu.product", "cloud.google.com/gke-accelerator")
"""Labels that say what kind of machine a node is."""
UNITS = {"memory": 2.0**30, "ephemeral-storage": 2.0**30}


def trial(options: "KubeRay") -> Object:
    """A Ray cluster as runs of these options bring it, with one node; it is never kept."""
    from dtrain.kubernetes import render
    from dtrain.kubernetes.options import Standing

    changed = {"standing": Standing(name=TRIAL), "queue": None, "gang": None}
    return render.cluster_objects(replace(options, **changed))[0]


def amount(text: Any) -> float:
    """A quantity as Kubernetes writes it (`500m`, `1900Gi`, `8`), as a number. Raises `ValueError`."""
    found = re.fullmatch(r"\s*([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([numkMGTPE]?i?)\s*", str(text))
    if found is None or found[2] not in SUFFIXES:
        raise ValueError(f"{text!r} is no quantity")
    return float(found[1]) * SUFFIXES[found[2]]


# -- nodes -------------------------------------------------------------------------------------------------------


def nodes(api: Client, options: "KubeRay") -> Iterator[Finding]:
    """Nodes by their shape, how many could take a worker's pod and the head's, and whether they have the image."""
    found, _ = api.list(NODE, None)
    made = trial(options)
    worker = made["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    head = made["spec"]["headGroupSpec"]["template"]["spec"]
    for area, spec, where in (("nodes", worker, "worker"), ("nodes for the head", head, "head")):
        yield _fit(area, spec, found, where)
    yield _image(options, found)


def _fit(area: str, spec: Mapping[str, Any], found: Iterable[Object], where: str) -> Finding:
    wanted = _requests(spec)
    text = ", ".join(_shown(key, value) for key, value in wanted.items())
    reasons: dict[str, int] = {}
    fitting: dict[str, int] = {}
    for node in found:
        shape, reason = _shape(node), _obstacle(node, spec, wanted)
        if reason is None:
            fitting[shape] = fitting.get(shape, 0) + 1
        else:
            reasons[f"{shape}: {reason}"] = reasons.get(f"{shape}: {reason}", 0) + 1
    if fitting:
        counts = ", ".join(f"{number} x {shape}" for shape, number in sorted(fitting.items()))
        return Finding(area, "ok", f"{sum(fitting.values())} could take a pod of {text}: {counts}")
    why = "; ".join(f"{number} x {reason}" for reason, number in sorted(reasons.items())[:6]) or "there are no nodes"
    asked = f"no node that is there could take a pod of {text} ({why})"
    remedy = f"if nodes are added on demand, that is all right; else change backend.machine or backend.{where}"
    return Finding(area, "warning", asked, remedy)


def _obstacle(node: Object, spec: Mapping[str, Any], wanted: Mapping[str, float]) -> str | None:
    """Why a node cannot take a pod, whatever else runs there; None when it could."""
    labels, status = node["metadata"].get("labels") or {}, node.get("status") or {}
    for key, value in (spec.get("nodeSelector") or {}).items():
        if labels.get(key) != value:
            return f"label {key} is {labels.get(key) or 'missing'}, not {value}"
    for taint in (node.get("spec") or {}).get("taints") or ():
        if taint.get("effect") in HARD_EFFECTS and not any(_tolerates(t, taint) for t in spec.get("tolerations") or ()):
            return f"taint {taint['key']} is not tolerated"
    ready: Object = next((c for c in status.get("conditions") or () if c["type"] == "Ready"), {})
    if ready.get("status") != "True":
        return "it is not ready"
    there = {key: amount(value) for key, value in (status.get("allocatable") or {}).items()}
    for key, value in wanted.items():
        if there.get(key, 0.0) < value:
            return f"has {_shown(key, there.get(key, 0.0))}"
    return None


def _tolerates(toleration: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    is_effect = toleration.get("effect") in (None, "", taint.get("effect"))
    is_key = toleration.get("key") in (None, "", taint.get("key"))
    is_value = toleration.get("operator", "Equal") == "Exists" or toleration.get("value", "") == taint.get("value", "")
    return is_effect and is_key and is_value


def _requests(spec: Mapping[str, Any]) -> dict[str, float]:
    """What a pod's containers ask for, added up."""
    total: dict[str, float] = {}
    for container in spec["containers"]:
        resources = container.get("resources") or {}
        for key, value in {**(resources.get("limits") or {}), **(resources.get("requests") or {})}.items():
            total[key] = total.get(key, 0.0) + amount(value)
    return total


def _shape(node: Object) -> str:
    labels = node["metadata"].get("labels") or {}
    words = [str(labels[key]) for key in SHAPE_LABELS if key in labels]
    return " ".join(words) or str(node["metadata"]["name"])


def _shown(key: str, value: float) -> str:
    unit = UNITS.get(key)
    return f"{value / unit:.4g} GiB of {key}" if unit else f"{value:g} {key}"


def _image(options: "KubeRay", found: Iterable[Object]) -> Finding:
    """Whether nodes have the image already: a registry can only be tried by pulling from it."""
    image = options.image
    spelled = {image, f"docker.io/{image}", f"docker.io/library/{image}"}
    listed = list(found)
    having = [node for node in listed if spelled & _images(node)]
    if having:
        return Finding("image", "ok", f"{image} is on {len(having)} of {len(listed)} nodes")
    if options.image_pull_policy == "Never":
        text = f"{image} is on none of the nodes (of which each lists its 50 largest), and is never pulled"
        return Finding(
            "image", "warning", text, "load it (kind load docker-image), or change backend.image_pull_policy"
        )
    secrets = ", ".join(options.image_pull_secrets)
    text = f"{image} is on none of the nodes yet; the first pod on each pulls it" + (
        f" with {secrets}" if secrets else ""
    )
    return Finding("image", "ok", text)


def _images(node: Object) -> set[str]:
    return {str(name) for image in (node.get("status") or {}).get("images") or () for name in image.get("names") or ()}


# -- quotas ------------------------------------------------------------------------------------------------------


def quotas(api: Client, options: "KubeRay") -> Iterator[Finding]:
    """Whether the namespace's quotas have room for a head and one node."""
    made = trial(options)
    specs = [made["spec"]["headGroupSpec"]["template"]["spec"], made["spec"]["workerGroupSpecs"][0]["template"]["spec"]]
    wanted: dict[str, float] = {"pods": float(len(specs)), "count/rayjobs.ray.io": 1.0, "count/rayclusters.ray.io": 1.0}
    for spec in specs:
        for key, value in _requests(spec).items():
            for name in (f"requests.{key}", f"limits.{key}", *((key,) if key in ("cpu", "memory") else ())):
                wanted[name] = wanted.get(name, 0.0) + value
    found, _ = api.list(QUOTA, options.namespace)
    if not found:
        yield Finding("quota", "ok", f"namespace {options.namespace} has none")
    for quota in found:
        name, status = quota["metadata"]["name"], quota.get("status") or {}
        hard = {**((quota.get("spec") or {}).get("hard") or {}), **(status.get("hard") or {})}
        used = status.get("used") or {}
        left = {key: amount(hard[key]) - amount(used.get(key, 0)) for key in hard if key in wanted}
        short = [key for key, room in left.items() if room < wanted[key]]
        if short:
            text = ", ".join(
                f"{key} {used.get(key, 0)} of {hard[key]} used, {wanted[key]:g} asked for" for key in short
            )
            remedy = "end a run (`dtrain ps`, `dtrain stop RUN`), ask for more, or ask for less in backend.machine"
            yield Finding("quota", "problem", f"{name} has no room for one node: {text}", remedy)
        else:
            yield Finding("quota", "ok", f"{name} has room for a head and one node")
