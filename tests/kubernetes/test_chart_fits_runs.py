"""What the chart installs and what dtrain sends fit together: its cluster file, planned and rendered by dtrain."""

import re
from pathlib import Path

import pytest
import yaml
from chart import (
    CHART,
    EKS,
    EVERYTHING,
    GKE,
    JOBS,
    RUNS,
    VALUE_SETS,
    Object,
    Values,
    cluster_file,
    named,
    objects,
    of_kind,
    pods_of_run,
    run_objects,
)

from dtrain.spec import load

every_values = pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)


@every_values
def test_the_cluster_file_is_one(values: Values, tmp_path: Path) -> None:
    cluster = load.load_cluster(cluster_file(values, tmp_path))
    assert cluster.backend.name == "kuberay"
    assert not cluster.storage.startswith("runs")


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", (CHART / "README.md").read_text(), re.DOTALL))
def test_the_values_that_the_readme_shows_lead_to_runs(text: str, tmp_path: Path) -> None:
    path = cluster_file(yaml.safe_load(text), tmp_path)
    (group,) = run_objects(path)[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    place = load.load_cluster(path)
    assert place.machine is not None and group["replicas"] == place.nodes
    asked = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert asked.get("nvidia.com/gpu", 0) == len(place.machine.gpus)


@every_values
def test_a_run_finds_what_it_names(values: Values, tmp_path: Path) -> None:
    all_objects = objects(values)
    there = {(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in all_objects}
    run = run_objects(cluster_file(values, tmp_path))
    namespace = run[0]["metadata"]["namespace"]
    assert namespace in values.get("runs", {}).get("namespaces", [RUNS])
    for pod in pods_of_run(run).values():
        spec = pod["spec"]
        assert ("ServiceAccount", namespace, spec["serviceAccountName"]) in there
        if "priorityClassName" in spec:
            assert ("PriorityClass", None, spec["priorityClassName"]) in there
        for volume in spec["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", namespace, volume["persistentVolumeClaim"]["claimName"]) in there


def test_a_run_waits_in_the_queue_that_is_there(tmp_path: Path) -> None:
    labels = run_objects(cluster_file(EVERYTHING, tmp_path, "team-b"))[0]["metadata"]["labels"]
    assert named(objects(EVERYTHING), "LocalQueue", labels["kueue.x-k8s.io/queue-name"], "team-b")
    assert named(objects(EVERYTHING), "WorkloadPriorityClass", labels["kueue.x-k8s.io/priority-class"])


def test_a_head_keeps_its_state_in_the_redis_that_is_there(tmp_path: Path) -> None:
    run = run_objects(cluster_file(EVERYTHING, tmp_path, "team-b"))
    kept = run[0]["spec"]["rayClusterSpec"]["gcsFaultToleranceOptions"]
    host, port = kept["redisAddress"].split(":")
    (served,) = named(objects(EVERYTHING), "Service", host, "team-b")["spec"]["ports"]
    assert served["port"] == int(port)
    asked = named(objects(EVERYTHING), "StatefulSet", host, "team-b")["spec"]["template"]["spec"]["containers"][0][
        "env"
    ]
    assert kept["redisPassword"]["valueFrom"] == asked[0]["valueFrom"]


def test_pods_of_runs_are_admitted_where_the_standard_is_restricted(tmp_path: Path) -> None:
    for pod in pods_of_run(run_objects(cluster_file({}, tmp_path))).values():
        outer = pod["spec"]["securityContext"]
        assert outer["runAsNonRoot"] is True and outer["seccompProfile"] == {"type": "RuntimeDefault"}
        assert {next(iter(set(one) - {"name"})) for one in pod["spec"]["volumes"]} <= {
            "emptyDir",
            "persistentVolumeClaim",
            "configMap",
            "secret",
            "projected",
        }
        for container in pod["spec"]["containers"] + pod["spec"].get("initContainers", []):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_pods_of_runs_have_no_token_but_the_autoscaler(tmp_path: Path) -> None:
    plain = pods_of_run(run_objects(cluster_file({}, tmp_path)))
    assert [pod["spec"]["automountServiceAccountToken"] for pod in plain.values()] == [False, False]
    scaling: Values = {"clusterFile": {"backend": {"autoscaling": {"max_nodes": 4}}}}
    pods = pods_of_run(run_objects(cluster_file(scaling, tmp_path)))
    assert pods["head"]["spec"]["serviceAccountName"] == "dtrain-autoscaling"
    assert named(objects({}), "ServiceAccount", "dtrain-autoscaling", RUNS)["automountServiceAccountToken"] is True
    assert pods["worker"]["spec"]["serviceAccountName"] == "dtrain-run"
    assert pods["worker"]["spec"]["automountServiceAccountToken"] is False


def test_an_account_of_ones_own_for_the_autoscaler_is_kept(tmp_path: Path) -> None:
    scaling: Values = {"clusterFile": {"backend": {"autoscaling": {"max_nodes": 4, "service_account": "mine"}}}}
    assert pods_of_run(run_objects(cluster_file(scaling, tmp_path)))["head"]["spec"]["serviceAccountName"] == "mine"


SHIPPED = {
    path.stem: backend
    for path in sorted((JOBS.parent / "clusters").glob("*.yaml"))
    if (backend := yaml.safe_load(path.read_text())["backend"]).get("namespace") == RUNS
}


@pytest.mark.parametrize("backend", SHIPPED.values(), ids=SHIPPED)
def test_shipped_cluster_files_name_what_the_chart_makes(backend: Object) -> None:
    there = objects({"kueue": {"enabled": True}, "redis": {"enabled": True}})
    assert named(there, "ServiceAccount", backend["service_account"], RUNS)
    if "priority_class" in backend:
        assert named(there, "PriorityClass", backend["priority_class"])
    if "queue" in backend:
        assert named(there, "LocalQueue", backend["queue"]["name"], RUNS)
    if "autoscaling" in backend:
        assert backend["autoscaling"]["service_account"] == "dtrain-autoscaling"
    if "gcs_fault_tolerance" in backend:
        assert named(there, "Service", backend["gcs_fault_tolerance"]["redis_address"].split(":")[0], RUNS)
    for volume in backend.get("volumes", []):
        if "claim" in volume:
            assert named(there, "PersistentVolumeClaim", volume["claim"], RUNS)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_cluster_files_say_what_the_chart_does_not_make_by_itself(name: str) -> None:
    """Kueue admits no pod that asks for what its queue has no quota of; a Secret that is missing is waited for."""
    path, backend = JOBS.parent / "clusters" / f"{name}.yaml", SHIPPED[name]
    said = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    secrets = [*backend.get("image_pull_secrets", []), *backend.get("env_from", [])]
    secrets += [volume["secret"] for volume in backend.get("volumes", []) if "secret" in volume]
    assert [secret for secret in secrets if f"`{secret}`" not in said] == []
    if "gang" in backend:
        assert f"a queue `{backend['gang']['queue']}` of yours" in said
    if "queue" in backend:
        assert "kueue.enabled" in said and "remove `queue`" in said
        quota = said.partition("quota of all that pods ask for:")[2].partition(";")[0]
        pods = pods_of_run(run_objects(path)).values()
        asked = {what for pod in pods for what in pod["spec"]["containers"][0]["resources"]["requests"]}
        assert {"cpu", "memory", "nvidia.com/gpu"} <= asked
        assert [what for what in sorted(asked) if what not in quota] == []


def test_there_are_shipped_cluster_files_for_the_chart() -> None:
    assert len(SHIPPED) >= 5


def test_what_the_platform_team_says_of_machines_reaches_the_pods(tmp_path: Path) -> None:
    run = run_objects(cluster_file(GKE, tmp_path))
    (group,) = run[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    spec = group["template"]["spec"]
    assert group["replicas"] == 2
    assert spec["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert spec["containers"][0]["image"] == "europe-docker.pkg.dev/acme/train/dtrain:0.1.0-cu128"


def test_runs_on_azure_carry_the_label_that_gives_them_their_identity(tmp_path: Path) -> None:
    for values, is_there in ((VALUE_SETS["aks"], True), (EKS, False)):
        for pod in pods_of_run(run_objects(cluster_file(values, tmp_path))).values():
            assert (pod["labels"].get("azure.workload.identity/use") == "true") == is_there


def test_prometheus_finds_the_metrics_of_every_pod(tmp_path: Path) -> None:
    (monitor,) = of_kind(objects(EVERYTHING), "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert monitor["spec"]["namespaceSelector"]["matchNames"] == ["team-a", "team-b"]
    for pod in pods_of_run(run_objects(cluster_file(EVERYTHING, tmp_path))).values():
        assert monitor["spec"]["selector"]["matchLabels"].items() <= pod["labels"].items()
        ports = {one["name"]: one["containerPort"] for one in pod["spec"]["containers"][0]["ports"]}
        assert ports[endpoint["port"]] == 8080
        sources = [one["sourceLabels"][0] for one in endpoint["relabelings"]]
        known = {
            "__meta_kubernetes_pod_label_" + key.replace(".", "_").replace("/", "_").replace("-", "_")
            for key in pod["labels"]
        }
        assert set(sources) <= known


def test_what_runs_need_in_any_case_stays_beside_what_is_given(tmp_path: Path) -> None:
    data: Object = {"mount": "/data", "claim": "data"}
    given: Object = {"volumes": [data], "image_pull_secrets": ["mine"]}
    values: Values = {"image": {"pullSecrets": ["registry"]}, "clusterFile": {"backend": given}}
    path = cluster_file(values, tmp_path)
    backend = yaml.safe_load(path.read_text())["backend"]
    assert backend["volumes"] == [{"mount": "/mnt/dtrain", "claim": "dtrain-runs"}, data]
    assert backend["image_pull_secrets"] == ["registry", "mine"]
    assert load.load_cluster(path)


def test_another_volume_in_the_place_of_runs_wins(tmp_path: Path) -> None:
    mine: Object = {"mount": "/mnt/dtrain", "claim": "mine"}
    path = cluster_file({"clusterFile": {"backend": {"volumes": [mine]}}}, tmp_path)
    assert yaml.safe_load(path.read_text())["backend"]["volumes"] == [mine]


@pytest.mark.parametrize(
    "given", [{"autoscaling": {"max_nodes": 4}}, {"standing": {"name": "shared"}}, {"gang": {"scheduler": "volcano"}}]
)
def test_runs_that_no_queue_can_hold_back_name_none(given: Object, tmp_path: Path) -> None:
    path = cluster_file({"kueue": {"enabled": True}, "clusterFile": {"backend": given}}, tmp_path)
    assert load.load_cluster(path).backend.queue is None


@pytest.mark.parametrize("namespace", ["a" * 63, "a" * 39 + "-b", "7-up"])
def test_the_cluster_file_of_any_namespace_has_a_name(namespace: str, tmp_path: Path) -> None:
    values: Values = {"runs": {"namespaces": [namespace]}}
    assert load.load_cluster(cluster_file(values, tmp_path)).backend.namespace == namespace


def test_options_of_the_backend_are_taken_over_as_they_are(tmp_path: Path) -> None:
    given: Object = {"worker": {"spot": True}, "network": {"env": {"NCCL_DEBUG": "WARN"}}, "service_account": "other"}
    path = cluster_file({"clusterFile": {"backend": given}}, tmp_path)
    backend = yaml.safe_load(path.read_text())["backend"]
    assert {key: backend[key] for key in given} == given
    assert load.load_cluster(path)
