"""What the chart refuses before anything is sent: the message names the value."""

from pathlib import Path
from typing import Any

import helm_python as helm
import pytest
from chart import CHART, VALUE_SETS, Values, cluster_file, objects

from dtrain.spec import load


def _at(path: str, value: Any) -> Values:
    values: Any = value
    for key in reversed(path.split(".")):
        values = {key: values}
    return values


REFUSED = {
    "an unknown section": ("supervisr", {}, "supervisr"),
    "an unknown key": ("storage.pvc.sizes", "1Gi", "sizes"),
    "an unknown key in a list": ("kueue.flavors", [{"name": "a", "quota": {"cpu": 1}, "label": {}}], "label"),
    "a number for a switch": ("redis.enabled", 1, "/redis/enabled"),
    "text for a number": ("supervisor.everySeconds", "often", "/supervisor/everySeconds"),
    "a wait too short": ("supervisor.everySeconds", 1, "/supervisor/everySeconds"),
    "an amount that is none": ("storage.pvc.size", "a lot", "/storage/pvc/size"),
    "a name in capitals": ("runs.namespaces", ["Team A"], "/runs/namespaces/0"),
    "no namespace at all": ("runs.namespaces", [], "/runs/namespaces"),
    "the same namespace twice": ("runs.namespaces", ["a", "a"], "/runs/namespaces"),
    "a kind of storage nobody has": ("storage.kind", "nfs", "/storage/kind"),
    "an address of no bucket": ("storage.bucket.uri", "https://acme/runs", "/storage/bucket/uri"),
    "a cloud nobody has": ("storage.identity.provider", "oci", "/storage/identity/provider"),
    "a role of no account": ("storage.identity.eksRoleArn", "dtrain", "/storage/identity/eksRoleArn"),
    "a key instead of an identity": ("storage.accessKey", "AKIA...", "accessKey"),
    "a moving tag": ("image.tag", "latest", "/image/tag"),
    "a tag in the name": ("image.repository", "acme/dtrain:0.1.0", "/image/repository"),
    "a digest cut short": ("image.digest", "sha256:abc", "/image/digest"),
    "a Redis of any version": ("redis.image", "redis:latest", "/redis/image"),
    "a Redis without a tag": ("redis.image", "docker.io/library/redis", "/redis/image"),
    "a password": ("redis.password", "hunter2", "password"),
    "a port that is none": ("networkPolicy.apiServer.ports", [70000], "/networkPolicy/apiServer/ports/0"),
    "a range that is none": (
        "networkPolicy.allow",
        [{"cidr": "10.0.0.1", "ports": [1]}],
        "/networkPolicy/allow/0/cidr",
    ),
    "isolation of another kind": ("networkPolicy.isolation", "none", "/networkPolicy/isolation"),
    "an operator that any pod could be": (
        "networkPolicy.operator.podLabels",
        {"app.kubernetes.io/name": None},
        "/networkPolicy/operator/podLabels",
    ),
    "a supervisor without limits": ("supervisor.resources.limits", {"memory": None}, "/supervisor/resources/limits"),
    "a priority that Kubernetes keeps": (
        "priorityClasses.classes",
        [{"name": "a", "value": 2000000000, "preempts": True, "description": ""}],
        "/priorityClasses/classes/0/value",
    ),
}


@pytest.mark.parametrize(("path", "value", "names"), REFUSED.values(), ids=REFUSED)
def test_refused(path: str, value: Any, names: str) -> None:
    with pytest.raises(helm.HelmValuesError) as caught:
        objects(_at(path, value))
    assert names in str(caught.value).replace("'", "")


def test_values_that_need_each_other_are_told_together_with_the_next_move() -> None:
    values: Values = {
        "storage": {"kind": "bucket", "identity": {"provider": "aks"}, "existingSecret": "keys"},
        "priorityClasses": {"default": "urgent"},
        "kueue": {"flavors": [{"name": "a", "quota": {"cpu": 1}}, {"name": "a", "topology": "t", "quota": {"cpu": 1}}]},
    }
    with pytest.raises(helm.HelmRenderError) as caught:
        objects(values)
    told = str(caught.value)
    assert "storage.bucket.uri is empty" in told and "s3://BUCKET/runs" in told
    assert "storage.identity.aksClientId is empty" in told and "az identity show" in told
    assert "keep one of the two" in told
    assert "'urgent'" in told.replace('"', "'") and "low, normal, high" in told
    assert "a has a topology" in told and "a name is there twice" in told


def test_names_with_dots_are_taken_where_kubernetes_takes_them(tmp_path: Path) -> None:
    values: Values = {
        "image": {"pullSecrets": ["registry.example.com"]},
        "storage": {"pvc": {"name": "runs.v2"}, "existingSecret": "storage.keys"},
        "redis": {"enabled": True, "existingSecret": "redis.password"},
    }
    backend = load.load_cluster(cluster_file(values, tmp_path)).backend
    assert (backend.image_pull_secrets, backend.env_from) == (("registry.example.com",), ("storage.keys",))
    assert backend.volumes[0].claim == "runs.v2"


@pytest.mark.parametrize("host", ["acme.iam", "acme.com.acme.iam", "developer"])
def test_any_google_service_account_is_taken(host: str) -> None:
    account = {"provider": "gke", "gkeServiceAccount": f"123456-compute@{host}.gserviceaccount.com"}
    assert objects({"storage": {"identity": account}})


def test_a_folder_of_the_nodes_is_not_shared_between_namespaces() -> None:
    values: Values = {"storage": {"pvc": {"hostPath": "/mnt/dtrain"}}, "runs": {"namespaces": ["a", "b"]}}
    with pytest.raises(helm.HelmRenderError, match=r"one folder for all of runs\.namespaces"):
        objects(values)


def test_several_mistakes_are_told_together() -> None:
    with pytest.raises(helm.HelmValuesError) as caught:
        objects({"redis": {"enabled": "yes"}, "access": {"cluster": "no"}})
    assert "/redis/enabled" in str(caught.value) and "/access/cluster" in str(caught.value)


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)
def test_what_is_right_is_taken(values: Values) -> None:
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)


def test_every_value_is_explained_or_plain() -> None:
    """A choice, a text or a number needs its sentence; a switch and what a section holds say it by name."""
    with helm.Chart.load(CHART) as chart:
        schema = chart.schema
    assert schema is not None
    silent = []

    def look(node: dict[str, Any], path: str) -> None:
        for key, about in node.get("properties", {}).items():
            reference = about.get("$ref", "").rpartition("/")[2]
            whole = {**schema["definitions"].get(reference, {}), **about} if reference else about
            if whole.get("type") in ("string", "integer", "array") and "description" not in whole:
                silent.append(f"{path}{key}")
            look(whole, f"{path}{key}.")

    look(schema, "")
    assert silent == []
