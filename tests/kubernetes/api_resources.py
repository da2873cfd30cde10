"""Which resources the loopback API server knows, and how it describes itself to those who ask (discovery)."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Resource:
    """One kind of object: `rayjobs.ray.io`, `pods`."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    short: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified(self) -> str:
        """As messages name it: `rayjobs.ray.io`, and just `pods`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def path(self, namespace: str | None = None, name: str | None = None) -> str:
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        words = [root]
        if self.namespaced and namespace:
            words += ["namespaces", namespace]
        words.append(self.plural)
        return "/".join(words + ([name] if name else []))


CORE = (
    Resource("", "v1", "pods", "Pod", short=("po",), subresources=("log", "status")),
    Resource("", "v1", "services", "Service", short=("svc",), subresources=("proxy", "status")),
    Resource("", "v1", "secrets", "Secret"),
    Resource("", "v1", "configmaps", "ConfigMap", short=("cm",)),
    Resource("", "v1", "events", "Event", short=("ev",)),
    Resource("", "v1", "serviceaccounts", "ServiceAccount", short=("sa",)),
    Resource("", "v1", "resourcequotas", "ResourceQuota", short=("quota",), subresources=("status",)),
    Resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim", short=("pvc",), subresources=("status",)),
    Resource("", "v1", "namespaces", "Namespace", namespaced=False, short=("ns",), subresources=("status",)),
    Resource("", "v1", "nodes", "Node", namespaced=False, short=("no",), subresources=("status",)),
    Resource("batch", "v1", "jobs", "Job", subresources=("status",)),
    Resource("apps", "v1", "deployments", "Deployment", short=("deploy",), subresources=("status",)),
    Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", short=("netpol",)),
    Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", short=("pdb",)),
    Resource("storage.k8s.io", "v1", "storageclasses", "StorageClass", namespaced=False, short=("sc",)),
    Resource("scheduling.k8s.io", "v1", "priorityclasses", "PriorityClass", namespaced=False, short=("pc",)),
    Resource("rbac.authorization.k8s.io", "v1", "roles", "Role"),
    Resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding"),
    Resource(
        "apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False,
        short=("crd",),
    ),
)  # fmt: skip
REVIEW = Resource("authorization.k8s.io", "v1", "selfsubjectaccessreviews", "SelfSubjectAccessReview", namespaced=False)
"""Made and answered, never kept."""
RAY = (
    Resource("ray.io", "v1", "rayjobs", "RayJob", subresources=("status",)),
    Resource("ray.io", "v1", "rayclusters", "RayCluster", subresources=("status",)),
)
KUEUE = (
    Resource("kueue.x-k8s.io", "v1beta1", "localqueues", "LocalQueue", subresources=("status",)),
    Resource("kueue.x-k8s.io", "v1beta1", "clusterqueues", "ClusterQueue", namespaced=False, subresources=("status",)),
    Resource("kueue.x-k8s.io", "v1beta1", "resourceflavors", "ResourceFlavor", namespaced=False),
    Resource("kueue.x-k8s.io", "v1beta1", "workloads", "Workload", subresources=("status",)),
)
VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
VERSION = {"major": "1", "minor": "36", "gitVersion": "v1.36.2", "platform": "linux/amd64"}


class Catalogue:
    """The resources of one server: all there are, or fewer where nobody installed Ray's or Kueue's."""

    def __init__(self, *, ray: bool = True, kueue: bool = False) -> None:
        self.resources = [*CORE, *(RAY if ray else ()), *(KUEUE if kueue else ())]

    def find(self, group: str, version: str, plural: str) -> Resource | None:
        for resource in [*self.resources, REVIEW]:
            if (resource.group, resource.version, resource.plural) == (group, version, plural):
                return resource
        return None

    def of_kind(self, kind: str) -> Resource:
        """The resource of a kind. Raises `KeyError`."""
        for resource in self.resources:
            if resource.kind == kind:
                return resource
        raise KeyError(kind)

    def describe(self, path: str) -> dict[str, Any] | None:
        """The answer to a question about the API itself; None for another path."""
        words = [word for word in path.split("/") if word]
        versions = sorted({(r.group, r.version) for r in [*self.resources, REVIEW] if r.group})
        if words == ["version"]:
            return VERSION
        if words == ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
        if words == ["apis"]:
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(g, v) for g, v in versions]}
        if len(words) == 2 and words[0] == "apis" and words[1] in dict(versions):
            return {"kind": "APIGroup", "apiVersion": "v1", **_group(words[1], dict(versions)[words[1]])}
        if words == ["openapi", "v3"]:
            roots = ["api/v1", *(f"apis/{group}/{version}" for group, version in versions)]
            return {"paths": {root: {"serverRelativeURL": f"/openapi/v3/{root}?hash=1"} for root in roots}}
        if words[:2] == ["openapi", "v3"]:
            return self._openapi("/" + "/".join(words[2:]))
        if words == ["api", "v1"]:
            return self._list("", "v1")
        if len(words) == 3 and words[0] == "apis" and (words[1], words[2]) in versions:
            return self._list(words[1], words[2])
        return None

    def _list(self, group: str, version: str) -> dict[str, Any]:
        rows = []
        for resource in [*self.resources, REVIEW]:
            if (resource.group, resource.version) != (group, version):
                continue
            row = {
                "name": resource.plural,
                "singularName": resource.kind.lower(),
                "namespaced": resource.namespaced,
                "kind": resource.kind,
                "verbs": ["create"] if resource is REVIEW else VERBS,
                "shortNames": list(resource.short),
            }
            rows.append(row)
            rows += [
                {**row, "name": f"{resource.plural}/{sub}", "singularName": "", "verbs": ["get", "patch", "update"]}
                for sub in resource.subresources
            ]
        return {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": f"{group}/{version}" if group else version,
            "resources": rows,
        }

    def _openapi(self, root: str) -> dict[str, Any]:
        """As much as kubectl reads: that the server itself checks fields (`fieldValidation`)."""
        paths = {}
        for resource in self.resources:
            if resource.path().startswith(root + "/"):
                kind = {"group": resource.group, "version": resource.version, "kind": resource.kind}
                names = ("dryRun", "fieldManager", "fieldValidation", "force")
                operation = {
                    "x-kubernetes-action": "patch",
                    "x-kubernetes-group-version-kind": kind,
                    "parameters": [{"name": name, "in": "query", "schema": {"type": "string"}} for name in names],
                }
                paths[resource.path("{namespace}", "{name}")] = {"patch": operation}
        return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.36.2"}, "paths": paths}


def _group(group: str, version: str) -> dict[str, Any]:
    words = {"groupVersion": f"{group}/{version}", "version": version}
    return {"name": group, "versions": [words], "preferredVersion": words}
