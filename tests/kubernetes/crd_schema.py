"""What a strict API server and the KubeRay operator would refuse, told from the published CRDs and recorded behaviour.

`refused(thing)` is for any object that is sent: core types by their published schemas, pods inside Ray's objects as
pods, Ray's own objects by their CRDs (unknown fields, types, CEL rules) and by the operator's own validation.
"""

import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

CRDS = Path(os.environ.get("DTRAIN_CRDS", Path(__file__).parents[3] / "shared" / "kuberay" / "crds"))
KUBERNETES = "1.36"
Thing = dict[str, Any]


def refused(thing: Thing) -> list[str]:
    """Everything that is wrong with an object."""
    found = metadata_mistakes(thing)
    if thing["apiVersion"] != "ray.io/v1":
        return found + core_mistakes(thing)
    for pod in pods_of(thing):
        found += metadata_mistakes(pod) + core_mistakes(pod)
    return [*found, *schema_mistakes(thing), *rule_mistakes(thing), *operator_mistakes(thing)]


def metadata_mistakes(thing: Thing) -> list[str]:
    """Names, labels and annotations that no API server takes."""
    metadata = thing.get("metadata", {})
    found = []
    if "name" in metadata and not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", metadata["name"]):
        found.append(f"metadata.name: {metadata['name']}")
    word = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
    for key in (*metadata.get("labels", {}), *metadata.get("annotations", {})):
        prefix, _, name = key.rpartition("/")
        if not re.fullmatch(word, name) or (prefix and not re.fullmatch(r"[a-z0-9][-a-z0-9.]*", prefix)):
            found.append(f"metadata: key {key}")
    found += [
        f"metadata.labels: {v!r}" for v in metadata.get("labels", {}).values() if not re.fullmatch(f"({word})?", v)
    ]
    return found


# -- core types ------------------------------------------------------------------------------------------------


def core_mistakes(thing: Thing) -> list[str]:
    """By the schemas of Kubernetes itself, unknown fields refused."""
    try:
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def pods_of(thing: Thing) -> list[Thing]:
    """The pods that the operator would make of the templates in a RayJob or RayCluster, as far as they are given."""
    cluster = thing["spec"].get("rayClusterSpec", {}) if thing["kind"] == "RayJob" else thing["spec"]
    groups = [cluster.get("headGroupSpec"), *cluster.get("workerGroupSpecs", [])]
    return [{"apiVersion": "v1", "kind": "Pod", **group["template"]} for group in groups if group]


# -- the CRDs --------------------------------------------------------------------------------------------------


@cache
def crd(kind: str) -> Thing:
    """The schema of version v1 of a kind, as published."""
    file = CRDS / f"ray.io_{kind.lower()}s.yaml"
    versions = yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    found = next(version for version in versions["spec"]["versions"] if version["name"] == "v1")
    return dict(found["schema"]["openAPIV3Schema"])


def schema_mistakes(thing: Thing) -> list[str]:
    """Fields that the CRD does not know, and values that are not what it says."""
    errors = _validator(thing["kind"]).iter_errors(thing)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


@cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(_strict(crd(kind)))


def _strict(schema: Thing) -> Thing:
    """A structural schema as JSON Schema, in which a field that would be pruned is a mistake."""
    kept = ("enum", "minimum", "maximum", "pattern", "minItems", "maxItems", "minLength", "maxLength", "required")
    made = {key: schema[key] for key in kept if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        return {**made, "type": ["integer", "string"]}
    if "type" in schema:
        made["type"] = [schema["type"], "null"] if schema.get("nullable") else schema["type"]
    if "items" in schema:
        made["items"] = _strict(schema["items"])
    if "properties" in schema:
        made["properties"] = {key: _strict(part) for key, part in schema["properties"].items()}
        made["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields", False))
    if isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = _strict(schema["additionalProperties"])
    return made


STATUSES, POLICIES = {"jobStatus", "jobDeploymentStatus"}, {"onSuccess", "onFailure"}
RULES: dict[str, Callable[[Any], bool]] = {
    "!(has(self.jobStatus) && has(self.jobDeploymentStatus))": lambda it: not set(it) >= STATUSES,
    "has(self.jobStatus) || has(self.jobDeploymentStatus)": lambda it: bool(set(it) & STATUSES),
    "!((has(self.onSuccess) || has(self.onFailure)) && has(self.deletionRules))": (
        lambda it: not (set(it) & POLICIES and "deletionRules" in it)
    ),
    "((has(self.onSuccess) && has(self.onFailure)) || has(self.deletionRules))": (
        lambda it: set(it) >= POLICIES or "deletionRules" in it
    ),
    "self in ['ray.io/kuberay-operator', 'kueue.x-k8s.io/multikueue']": (
        lambda it: it in ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
    ),
}
"""The CEL rules of the CRDs in Python; `rules_of` finds those that are not among them."""


def rule_mistakes(thing: Thing) -> list[str]:
    """By the CEL rules of the CRD; those that compare with an older object have nothing to say of a new one."""
    return [
        f"{at}: {rule['message']}"
        for at, value, rule in _ruled(crd(thing["kind"]), thing, thing["kind"])
        if "oldSelf" not in rule["rule"] and not RULES[rule["rule"]](value)
    ]


def rules_of(schema: Thing) -> Iterator[str]:
    """Every CEL rule anywhere in a schema."""
    for rule in schema.get("x-kubernetes-validations", ()):
        yield rule["rule"]
    below = [schema.get("items"), schema.get("additionalProperties"), *schema.get("properties", {}).values()]
    for part in below:
        if isinstance(part, dict):
            yield from rules_of(part)


def _ruled(schema: Thing, value: Any, at: str) -> Iterator[tuple[str, Any, Thing]]:
    """Every value that stands under a rule: where, the value, the rule."""
    for rule in schema.get("x-kubernetes-validations", ()):
        yield at, value, rule
    if isinstance(value, dict):
        for key, part in value.items():
            if key in schema.get("properties", {}):
                yield from _ruled(schema["properties"][key], part, f"{at}.{key}")
    elif isinstance(value, list) and "items" in schema:
        for number, part in enumerate(value):
            yield from _ruled(schema["items"], part, f"{at}[{number}]")


# -- the operator ----------------------------------------------------------------------------------------------


def operator_mistakes(thing: Thing) -> list[str]:
    """What the API server takes and the operator then answers with ValidationFailed, as recorded."""
    job = thing["kind"] == "RayJob"
    cluster = thing["spec"].get("rayClusterSpec") if job else thing["spec"]
    found = list(_job_mistakes(thing["spec"], cluster)) if job else []
    if cluster is not None:
        found += _cluster_mistakes(cluster)
    longest = 47 if job else 53
    name = thing["metadata"].get("name", "x")
    if len(name) > longest or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        found.append(f"{name} is not a DNS-1035 label of at most {longest} characters")
    return found


def _job_mistakes(spec: Thing, cluster: Thing | None) -> Iterator[str]:
    shuts_down, selector = spec.get("shutdownAfterJobFinishes", False), spec.get("clusterSelector")
    backoff, mode = spec.get("backoffLimit", 0), spec.get("submissionMode", "K8sJobMode")
    if spec.get("ttlSecondsAfterFinished", 0) and not shuts_down:
        yield "a TTL without shutdownAfterJobFinishes"
    if spec.get("suspend") and not shuts_down:
        yield "suspend without shutdownAfterJobFinishes"
    if spec.get("suspend") and selector:
        yield "suspend with clusterSelector"
    if cluster is None and not selector:
        yield "neither rayClusterSpec nor clusterSelector"
    if selector is not None and not selector.get("ray.io/cluster"):
        yield "clusterSelector names no cluster"
    if selector and mode == "SidecarMode":
        yield "clusterSelector in SidecarMode"
    if selector and backoff > 0:
        yield "clusterSelector with backoffLimit"
    if backoff < 0:
        yield "a negative backoffLimit"
    if mode == "InteractiveMode" and backoff > 0:
        yield "InteractiveMode with backoffLimit"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(key, 1) <= 0:
            yield f"{key} is not positive"
    try:
        environment = yaml.safe_load(spec.get("runtimeEnvYAML", ""))
    except yaml.YAMLError:
        environment = "no YAML"
    if not isinstance(environment, dict | None):
        yield "runtimeEnvYAML is not a mapping"


def _cluster_mistakes(cluster: Thing) -> Iterator[str]:
    head, scales = cluster["headGroupSpec"], bool(cluster.get("enableInTreeAutoscaling"))
    workers = cluster.get("workerGroupSpecs", [])
    for group in (head, *workers):
        name = group.get("groupName", "head")
        if not group["template"]["spec"].get("containers"):
            yield f"{name} has no containers"
            return
        if "resources" in group and {"num-cpus", "num-gpus", "memory", "resources"} & set(group["rayStartParams"]):
            yield f"{name} has resources twice"
        if "labels" in group.get("rayStartParams", {}):
            yield f"{name} has labels in rayStartParams"
        if scales and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{name} may restart in place under autoscaler v2"
    for group in workers:
        smallest, largest = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        if not 0 <= smallest <= largest:
            yield f"{group['groupName']} has minReplicas {smallest} and maxReplicas {largest}"
        if not scales and not {"minReplicas", "maxReplicas"} <= set(group):
            yield f"{group['groupName']} has no fixed size"
    variables = {variable["name"] for variable in head["template"]["spec"]["containers"][0].get("env", ())}
    if variables & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}:
        yield "Redis is told of in env instead of gcsFaultToleranceOptions"
    if cluster.get("authOptions", {}).get("mode") == "token" and _version(cluster.get("rayVersion")) < (2, 52):
        yield "token authentication needs rayVersion 2.52"
    if cluster.get("autoscalerOptions", {}).get("idleTimeoutSeconds", 0) < 0:
        yield "a negative idleTimeoutSeconds"


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (text or "0").split(".")[:2])
