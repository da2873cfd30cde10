"""Helm itself installs, upgrades, tests and uninstalls the chart, against the API server on loopback.

Releases are remembered by Helm's memory driver. The pod of `helm test` is run here as a process: the same command, the
same cluster file, the rights of the pod's own account.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import helm_python as helm
import pytest
from api_resources import Resource
from api_server import ApiServer
from chart import RUNS, Object, Values, objects, with_operator

RBAC = "rbac.authorization.k8s.io"
ALSO = (
    Resource(RBAC, "v1", "clusterroles", "ClusterRole", namespaced=False),
    Resource(RBAC, "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False),
    Resource("apps", "v1", "statefulsets", "StatefulSet"),
    Resource("", "v1", "limitranges", "LimitRange"),
)
NODE: Object = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "one", "labels": {}},
    "spec": {},
    "status": {
        "allocatable": {"cpu": "16", "memory": "64Gi", "pods": "110", "ephemeral-storage": "100Gi"},
        "conditions": [{"type": "Ready", "status": "True"}],
    },
}


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer(namespaces=("dtrain",)) as api:
        api.catalogue.resources += ALSO
        yield api


@pytest.fixture
def cluster(server: ApiServer, tmp_path: Path) -> Iterator[helm.Config]:
    path = server.kubeconfig(tmp_path / "admin")
    with helm.Config(kubeconfig_path=path, namespace="dtrain", storage_driver="memory") as config:
        yield config


def _there(api: ApiServer) -> set[tuple[str, str | None, str]]:
    return {
        (one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"])
        for resource in api.catalogue.resources
        for one in api.list(resource.kind, None)
    }


def _wanted(values: Values) -> set[tuple[str, str | None, str]]:
    return {
        (one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"])
        for one in objects(values)
        if "helm.sh/hook" not in one["metadata"].get("annotations", {})
    }


def _rules(api: ApiServer, account: str) -> list[tuple[str, str, str]]:
    """What an account may do by the roles it is bound to on this server."""
    rules = []
    for kind in ("RoleBinding", "ClusterRoleBinding"):
        for binding in api.list(kind, None):
            if account in [one["name"] for one in binding["subjects"]]:
                role = api.get(binding["roleRef"]["kind"], binding["roleRef"]["name"])
                assert role is not None
                rules += [
                    (verb, group, resource)
                    for rule in role["rules"]
                    for verb in rule["verbs"]
                    for group in rule["apiGroups"]
                    for resource in rule["resources"]
                ]
    return rules


@contextmanager
def _kubelet(api: ApiServer, folder: Path) -> Iterator[list[str]]:
    """Runs the pods that appear; what they print is kept."""
    printed: list[str] = []

    def run(event: str, pod: Object) -> None:
        if event != "ADDED":
            return
        namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        files = api.get("ConfigMap", pod["spec"]["volumes"][0]["configMap"]["name"], namespace)
        assert files is not None
        (folder / "cluster.yaml").write_text(files["data"]["cluster.yaml"])
        token = api.user("doctor", _rules(api, pod["spec"]["serviceAccountName"]), namespaces=None)
        kubeconfig = api.kubeconfig(folder / "pod", token=token, namespace=namespace)
        command = [one.replace("/etc/dtrain", str(folder)) for one in pod["spec"]["containers"][0]["command"]]
        done = subprocess.run(
            [sys.executable, "-m", *command],
            env={**os.environ, "KUBECONFIG": str(kubeconfig)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        printed.append(done.stdout + done.stderr)
        phase = "Failed" if done.returncode else "Succeeded"
        api.set_status("Pod", name, {"phase": phase}, namespace)

    with api.listen("Pod", run):
        yield printed


def test_installed_tested_upgraded_and_taken_away(server: ApiServer, cluster: helm.Config, tmp_path: Path) -> None:
    chart, before = str(with_operator(tmp_path)), _there(server)
    assert cluster.install(chart, "dtrain", {})["status"] == "deployed"
    assert _there(server) - before == _wanted({})

    server.put(NODE)
    claim = server.get("PersistentVolumeClaim", "dtrain-runs", RUNS)
    assert claim is not None
    server.set_status("PersistentVolumeClaim", "dtrain-runs", {"phase": "Bound"}, RUNS)
    with _kubelet(server, tmp_path) as printed:
        cluster.test("dtrain", timeout=60)
    assert len(printed) == 1 and "all that runs need in namespace dtrain-runs" in printed[0]
    server.remove("Pod", "dtrain-doctor", RUNS)
    server.remove("Node", "one")
    assert _there(server) - before == _wanted({}), "what a test made is gone again"

    values: Values = {
        "redis": {"enabled": True},
        "supervisor": {"enabled": False},
        "runs": {"limits": {"max": {"cpu": 9}}},
    }
    assert cluster.upgrade(chart, "dtrain", values)["revision"] == 2
    assert _there(server) - before == _wanted(values)

    cluster.uninstall("dtrain")
    assert _there(server) - before == {("Namespace", None, RUNS), ("PersistentVolumeClaim", RUNS, "dtrain-runs")}


def test_what_an_uninstallation_kept_is_taken_up_by_the_same_release_only(
    server: ApiServer, cluster: helm.Config, tmp_path: Path
) -> None:
    chart, before = str(with_operator(tmp_path)), _there(server)
    cluster.install(chart, "dtrain", {})
    claim = server.get("PersistentVolumeClaim", "dtrain-runs", RUNS)
    cluster.uninstall("dtrain")
    with pytest.raises(helm.HelmError, match="invalid ownership metadata"):
        cluster.install(chart, "other", {})
    cluster.install(chart, "dtrain", {})
    assert _there(server) - before == _wanted({})
    again = server.get("PersistentVolumeClaim", "dtrain-runs", RUNS)
    assert claim and again and again["metadata"]["uid"] == claim["metadata"]["uid"]


def test_helm_test_fails_where_runs_cannot_be(server: ApiServer, cluster: helm.Config, tmp_path: Path) -> None:
    cluster.install(str(with_operator(tmp_path)), "dtrain", {"storage": {"pvc": {"accessMode": "ReadWriteOnce"}}})
    with _kubelet(server, tmp_path) as printed, pytest.raises(helm.HelmError):
        cluster.test("dtrain", timeout=60)
    assert "can be written from one node only" in printed[0]


def test_an_operator_of_the_charts_own_is_installed_beside(
    server: ApiServer, cluster: helm.Config, tmp_path: Path
) -> None:
    values = {"kuberay-operator": {"enabled": True, "watchNamespace": RUNS}}
    cluster.install(str(with_operator(tmp_path)), "dtrain", values)
    assert ("ServiceAccount", "dtrain", "kuberay-operator") in _there(server)
    policy = server.get("NetworkPolicy", "dtrain-operator-in", RUNS)
    assert policy is not None and json.dumps({"kubernetes.io/metadata.name": "dtrain"}) in json.dumps(policy)


def test_helm_wants_the_operators_chart_at_hand(cluster: helm.Config, tmp_path: Path) -> None:
    """Even where it is not enabled; so the README begins with `helm dependency update`."""
    chart = with_operator(tmp_path)
    (chart / "charts" / "kuberay-operator" / "Chart.yaml").unlink()
    (chart / "charts" / "kuberay-operator" / "templates" / "operator.yaml").unlink()
    with pytest.raises(helm.HelmError, match="kuberay-operator"):
        cluster.install(str(chart), "dtrain", {})
