"""The chart helm/dtrain, rendered by the real Helm engine, and the value sets that its tests look at."""

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

CHART = Path(__file__).parents[2] / "helm" / "dtrain"
JOBS = Path(__file__).parents[2] / "jobs"
RUNS = "dtrain-runs"
OPERATOR = """
apiVersion: v1
kind: ServiceAccount
metadata:
  name: kuberay-operator
  namespace: {{ .Release.Namespace }}
  annotations: {watches: {{ .Values.watchNamespace }}}
"""
Object = dict[str, Any]
Values = dict[str, Any]

GKE: Values = {
    "image": {"repository": "europe-docker.pkg.dev/acme/train/dtrain", "tag": "0.1.0-cu128"},
    "storage": {
        "kind": "bucket",
        "bucket": {"uri": "gs://acme-runs/dtrain"},
        "identity": {"provider": "gke", "gkeServiceAccount": "dtrain@acme.iam.gserviceaccount.com"},
    },
    "clusterFile": {
        "nodes": 2,
        "device": "gpu",
        "workersPerNode": 8,
        "machine": {"cores": 200, "memory_gib": 1700, "gpus": 8, "gpu": "H100", "gpu_memory_gib": 80},
        "backend": {"worker": {"node_selector": {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}}},
    },
}
EKS: Values = {
    "image": {"repository": "123456789012.dkr.ecr.us-east-1.amazonaws.com/dtrain", "digest": "sha256:" + "0" * 64},
    "storage": {
        "kind": "bucket",
        "bucket": {"uri": "s3://acme-runs/dtrain"},
        "identity": {"provider": "eks", "eksRoleArn": "arn:aws:iam::123456789012:role/dtrain"},
    },
}
AKS: Values = {
    "image": {"repository": "acme.azurecr.io/dtrain"},
    "storage": {
        "kind": "bucket",
        "bucket": {"uri": "abfs://runs@acme.dfs.core.windows.net/dtrain"},
        "identity": {"provider": "aks", "aksClientId": "01234567-89ab-cdef-0123-456789abcdef"},
    },
}
ON_PREMISES: Values = {
    "image": {"repository": "registry.acme.internal/ml/dtrain", "pullSecrets": ["registry"]},
    "runs": {"createNamespaces": False},
    "storage": {"kind": "bucket", "bucket": {"uri": "s3://runs"}, "existingSecret": "dtrain-storage"},
    "networkPolicy": {"internet": False, "allow": [{"cidr": "10.2.0.0/16", "ports": [9000]}]},
}
EVERYTHING: Values = {
    "runs": {
        "namespaces": ["team-a", "team-b"],
        "quota": {"requests.nvidia.com/gpu": "64", "pods": 200},
        "limits": {"defaultRequest": {"cpu": "100m"}, "max": {"memory": "2Ti"}},
    },
    "access": {
        "submitters": {"groups": ["ml"], "users": ["ann@acme.example"], "serviceAccounts": ["ci/submit"]},
        "viewers": {"groups": ["everybody"]},
        "dashboard": True,
    },
    "kueue": {
        "enabled": True,
        "cohort": "acme",
        "flavors": [
            {
                "name": "h100",
                "nodeLabels": {"gpu": "h100"},
                "taints": [{"key": "gpu", "value": "h100", "effect": "NoSchedule"}],
                "tolerations": [{"key": "gpu", "operator": "Exists"}],
                "topology": "racks",
                "quota": {"cpu": 800, "memory": "7Ti", "nvidia.com/gpu": 32},
            },
            {"name": "cpu", "quota": {"cpu": "64", "memory": "256Gi"}},
        ],
    },
    "networkPolicy": {
        "dashboardFrom": [{"namespace": "tools", "podLabels": {"app": "portal"}}, {"cidr": "10.0.0.2/32"}]
    },
    "redis": {"enabled": True},
    "supervisor": {"nodeSelector": {"pool": "system"}, "tolerations": [{"key": "system", "operator": "Exists"}]},
    "monitoring": {
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "dashboard": {"enabled": True, "namespace": "monitoring"},
    },
    "kuberay-operator": {"enabled": True},
}
KIND: Values = {"storage": {"pvc": {"hostPath": "/mnt/dtrain", "size": "10Gi"}}, "kuberay-operator": {"enabled": True}}
MINIMAL: Values = {
    "runs": {"createNamespaces": False},
    "access": {"create": False},
    "storage": {"kind": "bucket", "bucket": {"uri": "s3://runs"}},
    "priorityClasses": {"create": False},
    "networkPolicy": {"enabled": False},
    "supervisor": {"enabled": False},
}
VALUE_SETS: dict[str, Values] = {
    "defaults": {},
    "everything": EVERYTHING,
    "minimal": MINIMAL,
    "gke": GKE,
    "eks": EKS,
    "aks": AKS,
    "on_premises": ON_PREMISES,
    "kind": KIND,
}


@functools.cache
def _texts(values: str, name: str, namespace: str) -> dict[str, str]:
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(json.loads(values))
        return chart.render(json.loads(values), name=name, namespace=namespace, is_install=True)


def texts(values: Values, *, name: str = "dtrain", namespace: str = "dtrain") -> dict[str, str]:
    """What each template becomes. Raises `HelmValuesError` for values that the schema refuses."""
    return _texts(json.dumps(values), name, namespace)


@functools.cache
def _objects(values: str, name: str, namespace: str) -> tuple[Object, ...]:
    return tuple(
        one
        for template, text in _texts(values, name, namespace).items()
        if not template.endswith("NOTES.txt")
        for one in yaml.safe_load_all(text)
        if one is not None
    )


def objects(values: Values, *, name: str = "dtrain", namespace: str = "dtrain") -> list[Object]:
    """Every object of an installation, those of `helm test` too, in the order of the templates. Not to be changed."""
    return list(_objects(json.dumps(values), name, namespace))


def notes(values: Values) -> str:
    """What is printed after an installation."""
    return next(text for template, text in texts(values).items() if template.endswith("NOTES.txt"))


def of_kind(all_objects: list[Object], *kinds: str) -> list[Object]:
    return [one for one in all_objects if one["kind"] in kinds]


def named(all_objects: list[Object], kind: str, name: str, namespace: str | None = None) -> Object:
    """The one object of this kind and name."""
    (found,) = [
        one
        for one in of_kind(all_objects, kind)
        if one["metadata"]["name"] == name and namespace in (None, one["metadata"].get("namespace"))
    ]
    return found


def pod_specs(all_objects: list[Object]) -> Iterator[tuple[str, Object, Object]]:
    """Every pod that the objects are or make: where it is, its metadata, its spec."""
    for one in all_objects:
        where = f"{one['kind']} {one['metadata'].get('namespace')}/{one['metadata']['name']}"
        if one["kind"] == "Pod":
            yield where, one["metadata"], one["spec"]
        elif "template" in one.get("spec", {}):
            template = one["spec"]["template"]
            yield where, template["metadata"] | {"namespace": one["metadata"]["namespace"]}, template["spec"]


def with_operator(folder: Path) -> Path:
    """The chart with a stand-in for KubeRay's own, which is fetched from its place before a real installation."""
    whole = Path(shutil.copytree(CHART, folder / "dtrain"))
    (wanted,) = yaml.safe_load((CHART / "Chart.yaml").read_text())["dependencies"]
    part = whole / "charts" / wanted["name"]
    (part / "templates").mkdir(parents=True)
    about = {"apiVersion": "v2", "name": wanted["name"], "version": wanted["version"]}
    (part / "Chart.yaml").write_text(yaml.safe_dump(about))
    (part / "templates" / "operator.yaml").write_text(OPERATOR)
    return whole


def cluster_file(values: Values, folder: Path, namespace: str | None = None) -> Path:
    """The cluster file that users get of an installation, in its first run namespace or another."""
    made = of_kind(objects(values), "ConfigMap")
    made = [one for one in made if one["metadata"]["name"] == "dtrain-cluster"]
    text = next(one["data"]["cluster.yaml"] for one in made if namespace in (None, one["metadata"]["namespace"]))
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def run_objects(cluster: Path, run_id: str = "gpt_small-k3f9", backend: Values | None = None) -> list[Object]:
    """What dtrain itself would send for a run with this cluster file, other options of its backend laid over."""
    from dtrain.backends import kuberay
    from dtrain.planning import make_plan
    from dtrain.spec import load

    if backend:
        spec = yaml.safe_load(cluster.read_text())
        cluster.write_text(yaml.safe_dump(spec | {"backend": spec["backend"] | backend}))
    plan = make_plan(load.load_job(JOBS / "gpt_small.yaml"), load.load_cluster(cluster))
    return list(kuberay.render(plan, run_id).objects)


def pods_of_run(run: list[Object]) -> dict[str, Object]:
    """Head and worker of a run: their labels and specs, with the labels that the operator adds."""
    spec = run[0]["spec"]["rayClusterSpec"]
    templates = {"head": spec["headGroupSpec"], "worker": spec["workerGroupSpecs"][0]}
    added = {"ray.io/is-ray-node": "yes", "ray.io/cluster": f"{run[0]['metadata']['name']}-x7k2p"}
    return {
        kind: {
            "namespace": run[0]["metadata"]["namespace"],
            "labels": group["template"]["metadata"]["labels"] | added | {"ray.io/node-type": kind},
            "spec": group["template"]["spec"],
        }
        for kind, group in templates.items()
    }
