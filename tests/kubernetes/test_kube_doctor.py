"""`dtrain cluster doctor` on Kubernetes: a cluster that has everything, and clusters that lack one thing each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server import ApiServer
from submitting import some_options

from dtrain.backends import kuberay
from dtrain.finding import Finding
from dtrain.kubernetes.capacity import amount

GPU_WORDS: dict[str, Any] = {
    "machine": {"cores": 32, "memory_gib": 200, "gpus": 8, "gpu_memory_gib": 80},
    "worker": {"node_selector": {"pool": "h100"}, "tolerations": [{"key": "nvidia.com/gpu"}]},
}
ALL_WORDS: dict[str, Any] = {
    **GPU_WORDS,
    "service_account": "dtrain-run",
    "priority_class": "dtrain-high",
    "image_pull_secrets": ["registry"],
    "queue": {"name": "team"},
    "volumes": [{"mount": "/mnt/dtrain", "claim": "runs"}],
}


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """A cluster that has everything."""
    with ApiServer(kueue=True) as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "k")))
        put(server, "ServiceAccount", "dtrain-run")
        put(server, "Secret", "registry")
        put(server, "PriorityClass", "dtrain-high", namespace=None)
        put(server, "LocalQueue", "team", spec={"clusterQueue": "gpus"}, status={"pendingWorkloads": 3})
        spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Ti"}}}
        put(server, "PersistentVolumeClaim", "runs", spec=spec, status={"phase": "Bound"})
        node(server, "cpu-1", cpu="8", memory="32Gi")
        for number in (1, 2):
            taints = [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]
            labels = {"pool": "h100", "node.kubernetes.io/instance-type": "a3-highgpu-8g"}
            sizes = {"cpu": "208", "memory": "1800Gi", "nvidia.com/gpu": "8"}
            node(server, f"gpu-{number}", labels, taints, images=["dtrain:test"], **sizes)
        yield server


def put(api: ApiServer, kind: str, name: str, namespace: str | None = "dtrain", **words: Any) -> None:
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    api.put({"kind": kind, "metadata": metadata, **words})


def node(
    api: ApiServer,
    name: str,
    labels: dict | None = None,
    taints: list | None = None,
    images: list | None = None,
    **sizes: str,
) -> None:
    status = {
        "allocatable": sizes,
        "conditions": [{"type": "Ready", "status": "True"}],
        "images": [{"names": images or []}],
    }
    api.put({"kind": "Node", "metadata": {"name": name, "labels": labels or {}}, "spec": {"taints": taints or []},
             "status": status})  # fmt: skip


def examine(**words: Any) -> dict[str, Finding]:
    """The worst finding of each area."""
    found: dict[str, Finding] = {}
    for finding in kuberay.cluster_doctor(some_options(**words)):
        worse = ["ok", "warning", "problem"].index
        if finding.area not in found or worse(finding.state) > worse(found[finding.area].state):
            found[finding.area] = finding
    return found


def test_a_cluster_that_has_everything(api: ApiServer, recordings: Path) -> None:
    found = examine(**ALL_WORDS)
    assert {area: finding.state for area, finding in found.items() if finding.state != "ok"} == {}
    assert set(found) == {
        "cluster", "permissions", "KubeRay", "queue", "quota", "nodes", "nodes for the head", "image",
        "service account", "priority class", "secret", "storage",
    }  # fmt: skip
    assert found["cluster"].text.startswith("Kubernetes v1.36.2 at 127.0.0.1:")
    assert found["nodes"].text.endswith("8 nvidia.com/gpu: 2 x a3-highgpu-8g")
    assert found["queue"].text == "team (to gpus): 3 waiting, 0 admitted"
    assert found["image"].text == "dtrain:test is on 2 of 3 nodes"
    assert [made for kind in ("RayJob", "RayCluster", "Pod") for made in api.list(kind)] == []  # it only looked
    assert len(api.requests) < 45


@pytest.mark.parametrize(
    ("kind", "name", "area", "told", "remedy"),
    [
        ("ServiceAccount", "dtrain-run", "service account", "there is no ServiceAccount dtrain-run in namespace dtrain",
         "create it, or change backend.service_account"),
        ("PriorityClass", "dtrain-high", "priority class", "there is no PriorityClass dtrain-high",
         "create it, or change backend.priority_class"),
        ("Secret", "registry", "secret", "there is no Secret registry in namespace dtrain",
         "create it, or change backend.image_pull_secrets"),
        ("LocalQueue", "team", "queue", "there is no LocalQueue team in namespace dtrain",
         "create it (helm/dtrain can), or change backend.queue.name"),
        ("PersistentVolumeClaim", "runs", "storage", "there is no PersistentVolumeClaim runs in namespace dtrain",
         "create it (helm/dtrain can), or change backend.volumes"),
    ],
)  # fmt: skip
def test_what_is_missing(api: ApiServer, kind: str, name: str, area: str, told: str, remedy: str) -> None:
    assert api.remove(kind, name)
    assert examine(**ALL_WORDS)[area] == Finding(area, "problem", told, remedy)


def test_nodes_that_do_not_fit(api: ApiServer) -> None:
    asks_more = {**GPU_WORDS, "machine": {**GPU_WORDS["machine"], "gpus": 16}}
    found = examine(**asks_more)["nodes"]
    assert found.state == "warning"  # nodes may be added on demand
    assert "2 x a3-highgpu-8g: has 8 nvidia.com/gpu" in found.text
    assert "1 x cpu-1: label pool is missing, not h100" in found.text
    assert "backend.machine" in found.remedy
    intolerant = {**GPU_WORDS, "worker": {"node_selector": {"pool": "h100"}}}
    assert "taint nvidia.com/gpu is not tolerated" in examine(**intolerant)["nodes"].text
    for number in (1, 2):
        api.patch("Node", f"gpu-{number}", {"status": {"conditions": [{"type": "Ready", "status": "False"}]}}, "")
    assert "2 x a3-highgpu-8g: it is not ready" in examine(**GPU_WORDS)["nodes"].text


def test_a_quota_without_room(api: ApiServer) -> None:
    hard = {"requests.nvidia.com/gpu": "16", "count/rayjobs.ray.io": "5"}
    quota = {"spec": {"hard": hard}, "status": {"hard": hard, "used": {"requests.nvidia.com/gpu": "12"}}}
    put(api, "ResourceQuota", "team", **quota)
    found = examine(**GPU_WORDS)["quota"]
    assert found.state == "problem"
    assert found.text == "team has no room for one node: requests.nvidia.com/gpu 12 of 16 used, 8 asked for"
    quota["status"]["used"]["requests.nvidia.com/gpu"] = "8"
    put(api, "ResourceQuota", "team", **quota)
    assert examine(**GPU_WORDS)["quota"].state == "ok"


def test_a_claim_for_one_node_only(api: ApiServer) -> None:
    put(api, "PersistentVolumeClaim", "runs", spec={"accessModes": ["ReadWriteOnce"]}, status={"phase": "Bound"})
    found = examine(**ALL_WORDS)["storage"]
    assert (found.state, "can be written from one node only (ReadWriteOnce)" in found.text) == ("problem", True)
    put(api, "PersistentVolumeClaim", "runs", spec={"accessModes": ["ReadWriteMany"]}, status={"phase": "Pending"})
    assert examine(**ALL_WORDS)["storage"].state == "warning"


def test_rights_that_are_missing(api: ApiServer, tmp_path: Path) -> None:
    rules = [(verb, "ray.io", "*") for verb in ("get", "list", "watch")] + [("*", "", "pods"), ("get", "", "pods/log")]
    path = api.kubeconfig(tmp_path / "viewer", token=api.user("viewer", rules))
    found = examine(**ALL_WORDS, kubeconfig=str(path))
    assert found["permissions"].state == "problem"
    assert found["permissions"].text == (
        "in namespace dtrain you may not create/delete rayjobs (for submit, stop, status, ps),"
        " create networkpolicies (for submit (network.isolate))"
    )
    assert "{apiGroups: [ray.io], resources: [rayjobs], verbs: [create, delete]}" in found["permissions"].remedy
    blind = {area for area, finding in found.items() if finding.state == "warning"}
    assert {"quota", "nodes", "service account", "priority class", "secret", "queue", "storage"} <= blind
    assert all(finding.remedy for finding in found.values() if finding.state != "ok")


def test_what_is_not_installed(tmp_path: Path) -> None:
    with ApiServer(ray=False) as bare:
        found = examine(queue={"name": "team"}, kubeconfig=str(bare.kubeconfig(tmp_path / "k")))
    assert (found["KubeRay"].state, "helm install kuberay-operator" in found["KubeRay"].remedy) == ("problem", True)
    assert (found["queue"].state, "install Kueue" in found["queue"].remedy) == ("problem", True)


def test_an_operator_that_is_older_than_what_is_sent(api: ApiServer) -> None:
    text = 'RayCluster in version "v1" cannot be handled: strict decoding error: unknown field "spec.authOptions"'
    api.fail(r"/rayclusters$", method="POST", status=400, message=text, reason="BadRequest")
    found = examine()["KubeRay"]
    assert found.state == "problem"
    assert "does not know spec.authOptions of RayCluster" in found.text
    assert found.remedy.startswith("upgrade KubeRay")


def test_a_cluster_that_cannot_be_reached(tmp_path: Path) -> None:
    [found] = kuberay.cluster_doctor(some_options(kubeconfig=str(tmp_path / "nothing")))
    assert (found.area, found.state) == ("cluster", "problem")
    assert found.remedy.startswith("get one from whoever runs the cluster")


@pytest.mark.parametrize(
    ("text", "number"), [("500m", 0.5), ("8", 8), ("1900Gi", 1900 * 2**30), ("1e3", 1000), ("2k", 2000)]
)
def test_quantities(text: str, number: float) -> None:
    assert amount(text) == number


def test_what_is_no_quantity() -> None:
    with pytest.raises(ValueError, match="'lots' is no quantity"):
        amount("lots")
