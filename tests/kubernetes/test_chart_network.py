"""What the chart's network policies, together with those that runs bring, let through, as Kubernetes reads them."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from chart import (
    AKS,
    EKS,
    EVERYTHING,
    GKE,
    MINIMAL,
    ON_PREMISES,
    RUNS,
    Object,
    Values,
    cluster_file,
    objects,
    of_kind,
    pod_specs,
    pods_of_run,
    run_objects,
)
from reach import Peer, outside, reaches

DASHBOARD, GCS, CLIENT, METRICS, ANY_WORKER_PORT, REDIS, HTTPS = 8265, 6379, 10001, 8080, 10234, 6379, 443
OPERATOR = Peer("ray-system", {"app.kubernetes.io/name": "kuberay-operator"})
PROMETHEUS = Peer("monitoring", {"app.kubernetes.io/name": "prometheus"})
DNS = Peer("kube-system", {"k8s-app": "kube-dns"})
API_SERVER = outside("10.96.0.1")
BUCKET = outside("52.216.8.1")
MACHINE_IDENTITY = outside("169.254.169.254")
GUEST = Peer("default", {"app": "curl"})


class World:
    """An installation in which two runs, a and b, are under way."""

    def __init__(self, values: Values, namespace: str = RUNS, backend: Values | None = None) -> None:
        installed = objects(values)
        self.policies: list[Object] = of_kind(installed, "NetworkPolicy")
        self.pods: dict[str, Peer] = {}
        for number, run in enumerate("ab"):
            with tempfile.TemporaryDirectory() as folder:
                sent = run_objects(cluster_file(values, Path(folder), namespace), f"gpt_small-{run}", backend)
            self.policies += of_kind(sent, "NetworkPolicy")
            for kind, pod in pods_of_run(sent).items():
                address = f"10.1.{number}.{len(self.pods) + 1}"
                self.pods[f"{kind} {run}"] = Peer(pod["namespace"], pod["labels"], address)
        for where, metadata, _ in pod_specs(installed):
            if metadata["namespace"] == namespace:
                self.pods[where.rpartition("-")[2]] = Peer(namespace, metadata["labels"], f"10.1.9.{len(self.pods)}")

    def __getitem__(self, name: str) -> Peer:
        return self.pods[name]

    def reaches(self, source: str | Peer, target: str | Peer, port: int, protocol: str = "TCP") -> bool:
        ends = [self.pods[one] if isinstance(one, str) else one for one in (source, target)]
        return reaches(self.policies, ends[0], ends[1], port, protocol)


@pytest.fixture(scope="module")
def world() -> World:
    return World({})


def test_the_pods_of_one_run_talk_to_each_other_on_every_port(world: World) -> None:
    for port in (GCS, DASHBOARD, CLIENT, ANY_WORKER_PORT, 29500):
        assert world.reaches("worker a", "head a", port)
        assert world.reaches("head a", "worker a", port)
        assert world.reaches("worker a", "worker a", port, "UDP")


@pytest.mark.parametrize("port", [GCS, DASHBOARD, CLIENT, METRICS, ANY_WORKER_PORT, HTTPS])
def test_runs_are_closed_to_each_other(world: World, port: int) -> None:
    for source in ("head a", "worker a"):
        for target in ("head b", "worker b"):
            assert not world.reaches(source, target, port)
            assert not world.reaches(target, source, port)


def test_of_ones_own_namespace_all_talk_when_told_so() -> None:
    together = World({"networkPolicy": {"isolation": "namespace"}})
    assert together.reaches("worker a", "head b", GCS)
    assert not together.reaches(GUEST, "head b", GCS)


@pytest.mark.parametrize("port", [GCS, DASHBOARD, CLIENT, METRICS, ANY_WORKER_PORT])
def test_nobody_else_comes_in(world: World, port: int) -> None:
    neighbour = Peer(RUNS, {"app": "curl"}, "10.1.8.1")
    impostor = Peer("default", OPERATOR.labels)
    for target in ("head a", "worker a"):
        for source in (GUEST, neighbour, impostor, PROMETHEUS, outside("203.0.113.7"), "supervisor", "doctor"):
            assert not world.reaches(source, target, port)


def test_the_operator_reaches_dashboards_and_nothing_more(world: World) -> None:
    assert world.reaches(OPERATOR, "head a", DASHBOARD)
    assert not world.reaches(OPERATOR, "worker a", DASHBOARD)
    assert not world.reaches(OPERATOR, "head a", GCS)
    assert not world.reaches(OPERATOR, "head a", CLIENT)


def test_an_operator_that_came_with_the_chart_is_let_in_from_there() -> None:
    ours = World({"kuberay-operator": {"enabled": True}})
    assert ours.reaches(Peer("dtrain", OPERATOR.labels), "head a", DASHBOARD)
    assert not ours.reaches(OPERATOR, "head a", DASHBOARD)


def test_dashboards_are_opened_by_name_only() -> None:
    opened = World(EVERYTHING, "team-a")
    assert opened.reaches(Peer("tools", {"app": "portal"}), "head a", DASHBOARD)
    assert opened.reaches(outside("10.0.0.2"), "head a", DASHBOARD)
    assert not opened.reaches(Peer("tools", {"app": "other"}), "head a", DASHBOARD)
    assert not opened.reaches(Peer("tools", {"app": "portal"}), "head a", CLIENT)
    assert not opened.reaches(outside("10.0.0.3"), "head a", DASHBOARD)


def test_prometheus_reads_metrics_where_it_is_asked_to() -> None:
    watched = World(EVERYTHING, "team-a")
    for target in ("head a", "worker b"):
        assert watched.reaches(PROMETHEUS, target, METRICS)
        assert not watched.reaches(PROMETHEUS, target, DASHBOARD)
        assert not watched.reaches(Peer("default", PROMETHEUS.labels), target, METRICS)


def test_runs_find_names_and_buckets(world: World) -> None:
    for source in ("head a", "worker a", "supervisor"):
        assert world.reaches(source, DNS, 53, "UDP") and world.reaches(source, DNS, 53)
        assert world.reaches(source, outside("169.254.20.10"), 53, "UDP")
        assert world.reaches(source, BUCKET, HTTPS)
        assert not world.reaches(source, DNS, 22)
        assert not world.reaches(source, BUCKET, 22)


def test_runs_find_names_where_nodes_have_a_cache_of_them() -> None:
    on_each_node = Peer("kube-system", {"k8s-app": "node-local-dns"})
    for values in ({}, GKE):
        world = World(values)
        for source in ("head a", "worker a", "supervisor"):
            for protocol in ("UDP", "TCP"):
                assert world.reaches(source, on_each_node, 53, protocol)
                assert world.reaches(source, MACHINE_IDENTITY, 53, protocol) == (values is GKE), "Cloud DNS"
            assert not world.reaches(source, on_each_node, 22)


@pytest.mark.parametrize("values", [{}, GKE, EKS, AKS, ON_PREMISES], ids=["none", "gke", "eks", "aks", "on_premises"])
def test_runs_do_not_reach_the_api_server_and_the_supervisor_does(values: Values) -> None:
    world = World(values)
    for port in (443, 6443):
        assert not world.reaches("head a", API_SERVER, port)
        assert not world.reaches("worker a", API_SERVER, port)
        assert world.reaches("supervisor", API_SERVER, port)
        assert world.reaches("doctor", API_SERVER, port)


def test_only_a_head_with_an_autoscaler_reaches_the_api_server() -> None:
    scaling = World({}, backend={"autoscaling": {"max_nodes": 4, "service_account": "dtrain-autoscaling"}})
    assert scaling.reaches("head a", API_SERVER, 443)
    assert not scaling.reaches("worker a", API_SERVER, 443)


IDENTITY: dict[str, Any] = {
    "none": ({}, None, 80),
    "gke": (GKE, "169.254.169.252", 988),
    "eks": (EKS, "169.254.170.23", 80),
    "aks": (AKS, None, 443),
}


@pytest.mark.parametrize(("values", "address", "port"), IDENTITY.values(), ids=IDENTITY)
def test_pods_get_their_own_identity_and_not_the_machines(values: Values, address: str | None, port: int) -> None:
    world = World(values)
    for source in ("head a", "worker a", "supervisor"):
        if address:
            assert world.reaches(source, outside(address), port)
        if values is not GKE:  # there the pod's own is served at the machine's address
            assert not world.reaches(source, MACHINE_IDENTITY, 80)


def test_a_store_of_ones_own_is_let_through_and_the_internet_is_not() -> None:
    own = World(ON_PREMISES)
    assert own.reaches("worker a", outside("10.2.3.4"), 9000)
    assert not own.reaches("worker a", outside("10.2.3.4"), 443)
    assert not own.reaches("worker a", outside("10.3.3.4"), 9000)
    assert not own.reaches("worker a", BUCKET, HTTPS)


def test_redis_hears_heads_of_its_namespace_only() -> None:
    kept = World(EVERYTHING, "team-a")
    assert kept.reaches("head a", "redis", REDIS)
    for source in ("worker a", "supervisor", GUEST, Peer("team-b", kept["head a"].labels)):
        assert not kept.reaches(source, "redis", REDIS)
    assert not kept.reaches("redis", BUCKET, HTTPS) and not kept.reaches("redis", DNS, 53, "UDP")


def test_the_pod_that_clears_redis_reaches_it() -> None:
    kept = World(EVERYTHING, "team-a")
    clearing = Peer("team-a", kept["head a"].labels | {"ray.io/node-type": "redis-cleanup"})
    assert kept.reaches(clearing, "redis", REDIS)


def test_nobody_calls_the_supervisor(world: World) -> None:
    for source in ("head a", "worker a", GUEST, OPERATOR, PROMETHEUS):
        for target in ("supervisor", "doctor"):
            assert not world.reaches(source, target, 8080)


def test_a_ray_cluster_that_nobody_labelled_is_closed_not_open(world: World) -> None:
    stray = Peer(RUNS, {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head"})
    for source in (GUEST, "worker a", OPERATOR):
        assert not world.reaches(source, stray, DASHBOARD)
    assert not world.reaches(stray, BUCKET, HTTPS)


def test_what_dtrain_sends_beside_ray_is_closed_too(world: World) -> None:
    helper = Peer(RUNS, {"app.kubernetes.io/managed-by": "dtrain"})
    for source in (GUEST, "worker a", OPERATOR):
        assert not world.reaches(source, helper, DASHBOARD)
    assert not world.reaches(helper, API_SERVER, 443)


def test_without_the_runs_own_policy_it_is_closed_not_open() -> None:
    world = World({}, backend={"network": {"isolate": False}})
    assert not world.reaches("worker a", "head a", GCS)


def test_other_workloads_of_a_shared_namespace_are_left_alone(world: World) -> None:
    other = Peer(RUNS, {"app": "notebook"})
    assert world.reaches(GUEST, other, 8888) and world.reaches(other, BUCKET, 22)


def test_the_evaluator_sees_an_open_cluster_as_open() -> None:
    """Or all of the above would pass with no policy at all."""
    world = World(MINIMAL)
    world.policies = []
    assert world.reaches(GUEST, "head a", DASHBOARD) and world.reaches("worker a", API_SERVER, 443)
