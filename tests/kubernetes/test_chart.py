"""The chart as the real Helm engine renders it: valid objects, held to what production asks of them."""

import functools
import json
import re
from pathlib import Path

import helm_python as helm
import jsonschema
import kubernetes_validate
import pytest
import yaml
from chart import (
    CHART,
    EVERYTHING,
    GKE,
    KIND,
    MINIMAL,
    ON_PREMISES,
    RUNS,
    VALUE_SETS,
    Object,
    Values,
    named,
    notes,
    objects,
    of_kind,
    pod_specs,
    texts,
    with_operator,
)

import dtrain

OLDEST, NEWEST = "1.28", "1.37"
every_values = pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)

LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
AMOUNT = {"type": "string", "pattern": r"^[0-9.]+([KMGTP]i?|m)?$"}
SPECS_OF_OTHERS: dict[str, Object] = {
    "ResourceFlavor": {
        "nodeLabels": LABELS,
        "nodeTaints": {"type": "array", "items": {"required": ["key", "effect"]}},
        "tolerations": {"type": "array", "items": {"type": "object"}},
        "topologyName": {"type": "string"},
    },
    "ClusterQueue": {
        "cohortName": {"type": "string"},
        "namespaceSelector": {"type": "object", "required": ["matchExpressions"]},
        "queueingStrategy": {"enum": ["StrictFIFO", "BestEffortFIFO"]},
        "preemption": {"type": "object"},
        "resourceGroups": {
            "type": "array",
            "items": {
                "required": ["coveredResources", "flavors"],
                "properties": {
                    "flavors": {
                        "items": {
                            "required": ["name", "resources"],
                            "properties": {"resources": {"items": {"properties": {"nominalQuota": AMOUNT}}}},
                        }
                    }
                },
            },
        },
    },
    "LocalQueue": {"clusterQueue": {"type": "string"}},
    "PodMonitor": {
        "namespaceSelector": {"required": ["matchNames"]},
        "selector": {"type": "object"},
        "podMetricsEndpoints": {
            "type": "array",
            "items": {
                "additionalProperties": False,
                "required": ["port"],
                "properties": {
                    "port": {"type": "string"},
                    "interval": {"type": "string", "pattern": "^[0-9]+[sm]$"},
                    "relabelings": {"type": "array", "items": {"required": ["sourceLabels", "targetLabel"]}},
                },
            },
        },
    },
}
"""The keys we write of kinds that Kubernetes itself does not know: Kueue's and the Prometheus operator's."""


def test_lint_finds_nothing_but_the_operator_that_is_not_fetched_here() -> None:
    found = helm.lint(CHART, strict=False, kube_version=f"v{NEWEST}.0")
    assert found["errors"] == []
    assert [one["error"] for one in found["messages"] if one["severity"] > 1] == [
        "chart directory is missing these dependencies: kuberay-operator"
    ]


@every_values
def test_lint_takes_every_value_set(values: Values) -> None:
    assert helm.lint(CHART, values)["errors"] == []


def test_versions_are_dtrains_own() -> None:
    with helm.Chart.load(CHART) as chart:
        about = chart.metadata
    assert about["appVersion"] == about["version"] == dtrain.__version__
    (operator,) = about["dependencies"]
    assert operator["condition"] == "kuberay-operator.enabled"
    assert re.fullmatch(r"\d+\.\d+\.\d+", operator["version"]), "a range would install another operator tomorrow"


@functools.cache
def _validate(one: str, version: str) -> None:
    kubernetes_validate.validate(json.loads(one), version, strict=True)


@every_values
def test_every_object_is_valid(values: Values) -> None:
    for one in objects(values):
        if one["kind"] == "WorkloadPriorityClass":
            assert isinstance(one["value"], int)
        elif one["kind"] in SPECS_OF_OTHERS:
            schema = {"type": "object", "properties": SPECS_OF_OTHERS[one["kind"]], "additionalProperties": False}
            jsonschema.validate(one["spec"], schema)
        else:
            _validate(json.dumps(one).replace("team-b", "team-a"), NEWEST)  # what is equal is looked at once


def test_the_oldest_kubernetes_that_the_chart_names_takes_it_too() -> None:
    with helm.Chart.load(CHART) as chart:
        assert chart.metadata["kubeVersion"] == f">={OLDEST}.0-0"
    for one in {one["kind"]: one for one in objects({"redis": {"enabled": True}})}.values():
        _validate(json.dumps(one), OLDEST)


@every_values
def test_rendering_gives_the_same_every_time(values: Values) -> None:
    with helm.Chart.load(CHART) as chart:
        for _ in range(8):  # the engine's mappings have another order each time
            assert chart.render(values, name="dtrain", namespace="dtrain", is_install=True) == texts(values)


@every_values
def test_names_are_unique_and_labelled(values: Values) -> None:
    all_objects = objects(values)
    names = [(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in all_objects]
    assert len(names) == len(set(names))
    for one in all_objects:
        assert one["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "Helm", one["metadata"]


@every_values
def test_pods_meet_the_restricted_standard(values: Values) -> None:
    for where, _, spec in pod_specs(objects(values)):
        assert spec["securityContext"]["runAsNonRoot"] is True, where
        assert spec["securityContext"]["runAsUser"] > 0, where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), where
        assert not [volume for volume in spec.get("volumes", []) if "hostPath" in volume], where
        for container in spec["containers"] + spec.get("initContainers", []):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
            }, where


@every_values
def test_containers_say_what_they_need(values: Values) -> None:
    for where, _, spec in pod_specs(objects(values)):
        for container in spec["containers"]:
            assert set(container["resources"]["requests"]) == {"cpu", "memory"}, where
            assert "memory" in container["resources"]["limits"], where


@every_values
def test_images_are_pinned(values: Values) -> None:
    for where, _, spec in pod_specs(objects(values)):
        for container in spec["containers"]:
            image = container["image"]
            assert re.search(r"(:[^:/]*\d+\.\d+\.\d+[^:/]*|@sha256:[0-9a-f]{64})$", image), f"{where}: {image}"


@every_values
def test_what_is_referred_to_is_there(values: Values) -> None:
    all_objects = objects(values)
    there = {(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in all_objects}
    brought = set(values.get("image", {}).get("pullSecrets", [])) | {"dtrain-redis"}
    brought |= {values.get("storage", {}).get("existingSecret", "")}
    for where, metadata, spec in pod_specs(all_objects):
        namespace = metadata["namespace"]
        if "serviceAccountName" in spec:
            assert ("ServiceAccount", namespace, spec["serviceAccountName"]) in there, where
        else:
            assert spec["automountServiceAccountToken"] is False, where
        for volume in spec.get("volumes", []):
            if "configMap" in volume:
                assert ("ConfigMap", namespace, volume["configMap"]["name"]) in there, where
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert ("PersistentVolumeClaim", namespace, claim) in there, where
        secrets = [one["name"] for one in spec.get("imagePullSecrets", [])]
        for container in spec["containers"]:
            secrets += [one["secretRef"]["name"] for one in container.get("envFrom", [])]
            for one in container.get("env", []):
                if "valueFrom" in one:
                    secrets.append(one["valueFrom"]["secretKeyRef"]["name"])
        assert set(secrets) <= brought, where
        mounts = {mount["name"] for container in spec["containers"] for mount in container.get("volumeMounts", [])}
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        assert mounts - {"data"} == volumes, f"{where}: the claim template of Redis alone is no volume of the pod"


@every_values
def test_no_secret_is_made_or_held(values: Values) -> None:
    assert of_kind(objects(values), "Secret") == []


def test_workloads_select_their_own_pods_and_no_others() -> None:
    all_objects = objects(EVERYTHING)
    pods = [(where, metadata) for where, metadata, _ in pod_specs(all_objects)]
    for one in of_kind(all_objects, "Deployment", "StatefulSet", "Service"):
        selector = one["spec"]["selector"]
        labels = selector.get("matchLabels", selector)
        where = f"{one['metadata']['namespace']}/{one['metadata']['name']}"
        chosen = [
            of
            for of, metadata in pods
            if metadata["namespace"] == one["metadata"]["namespace"] and labels.items() <= metadata["labels"].items()
        ]
        assert [of.split()[1] for of in chosen] == [where]


def test_a_second_supervisor_never_starts_beside_the_first() -> None:
    supervisors = of_kind(objects(EVERYTHING), "Deployment")
    assert [one["metadata"]["namespace"] for one in supervisors] == ["team-a", "team-b"]
    for one in supervisors:
        assert (one["spec"]["replicas"], one["spec"]["strategy"]) == (1, {"type": "Recreate"})


def test_an_uninstallation_leaves_runs_alone() -> None:
    kept = {
        one["kind"]
        for one in objects({})
        if one["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"
    }
    assert kept == {"Namespace", "PersistentVolumeClaim"}


def test_a_folder_of_the_nodes_is_the_volume_of_its_own_claim() -> None:
    all_objects = objects(KIND)
    volume = named(all_objects, "PersistentVolume", f"dtrain-runs-{RUNS}")
    claim = named(all_objects, "PersistentVolumeClaim", "dtrain-runs", RUNS)
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert volume["spec"]["claimRef"]["namespace"] == RUNS and volume["spec"]["claimRef"]["name"] == "dtrain-runs"
    assert claim["spec"]["storageClassName"] == volume["spec"]["storageClassName"] == ""
    assert claim["spec"]["accessModes"] == volume["spec"]["accessModes"] == ["ReadWriteMany"]
    assert volume["spec"]["persistentVolumeReclaimPolicy"] == "Retain"
    assert volume["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_created_namespaces_hold_pods_to_the_standard() -> None:
    labels = named(objects({}), "Namespace", RUNS)["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert of_kind(objects(MINIMAL), "Namespace") == []


@pytest.mark.parametrize(
    ("values", "annotation"),
    [
        ("gke", {"iam.gke.io/gcp-service-account": "dtrain@acme.iam.gserviceaccount.com"}),
        ("eks", {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/dtrain"}),
        ("aks", {"azure.workload.identity/client-id": "01234567-89ab-cdef-0123-456789abcdef"}),
        ("defaults", None),
    ],
)
def test_pods_of_runs_have_the_identity_that_opens_the_bucket(values: str, annotation: dict[str, str] | None) -> None:
    all_objects = objects(VALUE_SETS[values])
    for name in ("dtrain-run", "dtrain-autoscaling", "dtrain-supervisor"):
        assert named(all_objects, "ServiceAccount", name)["metadata"].get("annotations") == annotation
    pods = {where: metadata["labels"] for where, metadata, _ in pod_specs(all_objects)}
    is_marked = "azure.workload.identity/use" in pods[f"Deployment {RUNS}/dtrain-supervisor"]
    assert is_marked == (values == "aks")


def test_only_the_autoscaler_and_the_supervisor_get_a_token() -> None:
    mounted = {
        one["metadata"]["name"]: one["automountServiceAccountToken"] for one in of_kind(objects({}), "ServiceAccount")
    }
    assert mounted == {
        "dtrain-run": False,
        "dtrain-autoscaling": True,
        "dtrain-supervisor": True,
        "dtrain-doctor": True,
    }


def test_queues_cover_every_resource_of_every_flavor_in_one_order() -> None:
    (group,) = named(objects(EVERYTHING), "ClusterQueue", "dtrain")["spec"]["resourceGroups"]
    assert group["coveredResources"] == ["cpu", "memory", "nvidia.com/gpu"]
    quotas = {one["name"]: [(of["name"], of["nominalQuota"]) for of in one["resources"]] for one in group["flavors"]}
    assert quotas == {
        "h100": [("cpu", "800"), ("memory", "7Ti"), ("nvidia.com/gpu", "32")],
        "cpu": [("cpu", "64"), ("memory", "256Gi"), ("nvidia.com/gpu", "0")],
    }
    assert set(quotas) == {one["metadata"]["name"] for one in of_kind(objects(EVERYTHING), "ResourceFlavor")}


def test_a_high_priority_is_a_whole_number() -> None:
    one = {"name": "high", "value": 1_000_000_000, "preempts": True, "description": ""}
    values: Values = {"priorityClasses": {"default": "high", "classes": [one]}, "kueue": {"enabled": True}}
    for made in of_kind(objects(values), "PriorityClass", "WorkloadPriorityClass"):
        assert repr(made["value"]) == "1000000000", "1e+09 is no integer to Kubernetes"


def test_kueue_before_its_second_version_is_spoken_to_in_its_own_words() -> None:
    old = objects({"kueue": {"enabled": True, "cohort": "acme", "apiVersion": "v1beta1"}})
    queue = named(old, "ClusterQueue", "dtrain")
    assert (queue["apiVersion"], queue["spec"]["cohort"]) == ("kueue.x-k8s.io/v1beta1", "acme")


def test_a_redis_elsewhere_makes_none_here() -> None:
    all_objects = objects({"redis": {"enabled": True, "address": "redis.acme.internal:6379"}})
    assert of_kind(all_objects, "StatefulSet", "Service") == []
    assert named(objects(EVERYTHING), "Service", "dtrain-redis", "team-b")


def test_a_changed_cluster_file_restarts_the_supervisor() -> None:
    def annotation(values: Values) -> str:
        template = named(objects(values), "Deployment", "dtrain-supervisor")["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/cluster"])

    assert annotation({}) != annotation({"clusterFile": {"nodes": 3}})
    assert annotation({}) == annotation({"supervisor": {"everySeconds": 60}})


def test_helm_test_asks_with_the_rights_of_a_submitter() -> None:
    all_objects = objects({})
    doctor = named(all_objects, "Pod", "dtrain-doctor", RUNS)
    assert doctor["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert doctor["spec"]["containers"][0]["command"][:3] == ["dtrain", "cluster", "doctor"]
    for kind, role in (("RoleBinding", "dtrain-user"), ("ClusterRoleBinding", "dtrain-user-cluster")):
        (binding,) = [
            one
            for one in of_kind(all_objects, kind)
            if one["subjects"][0]["name"] == doctor["spec"]["serviceAccountName"]
        ]
        assert binding["roleRef"]["name"] == role
        assert binding["metadata"]["annotations"]["helm.sh/hook"] == "test"


def test_notes_say_the_next_command() -> None:
    text = notes({})
    assert "kubectl get configmap dtrain-cluster -n dtrain-runs" in text
    assert "dtrain submit jobs/gpt_small.yaml -c cluster.yaml" in text
    assert "ray-system" in text
    assert "kind load docker-image" in text
    assert "access.submitters.groups" in text
    assert "must see the same file system at /mnt/dtrain" in text


def test_notes_leave_out_what_is_done_already() -> None:
    text = notes(EVERYTHING | {"image": {"repository": "registry.acme.internal/dtrain"}})
    assert "kind load docker-image" not in text
    assert "access.submitters.groups" not in text
    assert "KubeRay's operator is expected" not in text
    for namespace in ("team-a", "team-b"):
        assert f"kubectl create secret generic dtrain-redis -n {namespace}" in text


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_what_the_doctor_said_is_read_where_its_pods_are(values: Values) -> None:
    """`helm test --logs` looks for every hook as a pod in the namespace of the release."""
    text = notes(values)
    for doctor in of_kind(objects(values), "Pod"):
        assert f"kubectl logs -n {doctor['metadata']['namespace']} {doctor['metadata']['name']}" in text
    assert "--logs" not in text


def test_notes_name_the_secrets_that_pods_wait_for() -> None:
    text = notes(ON_PREMISES | {"runs": {"namespaces": ["a", "b"], "createNamespaces": False}})
    assert "Secrets, of yours, in a and in b: registry, dtrain-storage" in text
    assert "Secrets, of yours" not in notes({})


def test_notes_say_what_a_queue_has_no_quota_of() -> None:
    network = {"network": {"resources": {"rdma/ib": 1}}, "worker": {"scratch_gib": 100}}
    asked = GKE["clusterFile"] | {"backend": network}
    lacking = {"kueue": {"enabled": True}, "clusterFile": asked}
    assert "ask for nvidia.com/gpu, ephemeral-storage, rdma/ib:" in notes(lacking)
    quota = {"cpu": 1, "memory": "1Gi", "nvidia.com/gpu": 8, "ephemeral-storage": "1Ti", "rdma/ib": 8}
    whole = {"enabled": True, "flavors": [{"name": "all", "quota": quota}]}
    for values in (lacking | {"kueue": whole}, {"clusterFile": asked}, EVERYTHING):
        assert "has no quota of" not in notes(values)
    alone = lacking | {"clusterFile": asked | {"nodes": 1}}
    assert "ask for nvidia.com/gpu, ephemeral-storage:" in notes(alone), "one node needs no fabric"


def test_the_jobs_that_notes_name_exist() -> None:
    for job in re.findall(r"jobs/\w+\.yaml", notes({})):
        assert (Path(__file__).parents[2] / job).is_file()


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", (CHART / "README.md").read_text(), re.DOTALL))
def test_values_that_the_readme_shows_are_taken(text: str) -> None:
    assert len(list(pod_specs(objects(yaml.safe_load(text))))) == 2


@pytest.mark.parametrize("is_enabled", [False, True])
def test_the_operator_comes_with_the_chart_when_asked(tmp_path: Path, is_enabled: bool) -> None:
    values = {"kuberay-operator": {"enabled": is_enabled, "watchNamespace": "dtrain-runs"}}
    with helm.Chart.load(with_operator(tmp_path)) as chart:
        rendered = chart.render(values, name="dtrain", namespace="dtrain", is_install=True)
        packed = chart.save(tmp_path)
    found = [yaml.safe_load(text) for template, text in rendered.items() if template.endswith("operator.yaml")]
    assert [one["metadata"]["annotations"] for one in found] == ([{"watches": "dtrain-runs"}] if is_enabled else [])
    with helm.Chart.load(packed) as chart:
        assert chart.render(values, name="dtrain", namespace="dtrain", is_install=True) == rendered


def test_two_installations_share_a_cluster() -> None:
    other = {"name": "lab", "runs": {"namespaces": ["lab-runs"]}, "kueue": {"clusterQueue": "lab"}}
    here, there = objects({}), objects(other, name="lab", namespace="lab")

    def keys(all_objects: list[Object]) -> set[tuple[str, str | None, str]]:
        return {(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in all_objects}

    assert not keys(here) & keys(there)


def test_values_yaml_is_complete() -> None:
    """Every value the schema knows has its default, and its sentence, in values.yaml."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(schema["properties"]) - {"global"} == set(values)
    for section, about in schema["properties"].items():
        if section not in ("global", "name", "kuberay-operator"):
            assert set(about["properties"]) == set(values[section]), section
