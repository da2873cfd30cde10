"""A Ray cluster that stays: made, scaled, looked at and taken down, with what is told while one waits."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from api_server import ApiServer
from submitting import some_options, submission

from dtrain.backends import kuberay
from dtrain.errors import ClusterError, InputError
from dtrain.kubernetes import standing

STANDING = {"standing": {"name": "shared", "nodes": 2}}


@pytest.fixture
def options(kubeconfig: str) -> kuberay.Options:
    return some_options(**STANDING)


@contextmanager
def operator(api: ApiServer, *, holds_back: bool = False) -> Iterator[None]:
    """Gives every Ray cluster the pods that it wants, or none that a node would take."""

    def act(event: str, made: dict[str, Any]) -> None:
        if event == "DELETED":
            return
        metadata, name = made["metadata"], made["metadata"]["name"]
        wanted = made["spec"]["workerGroupSpecs"][0]["replicas"]
        if (made.get("status") or {}).get("observedGeneration") == metadata["generation"]:
            return
        time.sleep(0.1)  # nothing is at once
        owner = {"kind": "RayCluster", "name": name, "uid": metadata["uid"]}
        labels = {**metadata["labels"], "ray.io/cluster": name, "ray.io/node-type": "head"}
        pod = {"name": f"{name}-head", "namespace": "dtrain", "labels": labels, "ownerReferences": [owner]}
        message = "0/3 nodes are available: 3 Insufficient cpu."
        scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        api.put({"kind": "Pod", "metadata": pod, "status": {"conditions": [scheduled] if holds_back else []}})
        ready = "False" if holds_back else "True"
        status = {
            "state": "ready",
            "observedGeneration": metadata["generation"],
            "readyWorkerReplicas": 0 if holds_back else wanted,
            "conditions": [{"type": "HeadPodReady", "status": ready}],
            "head": {"podName": f"{name}-head"},
        }
        api.set_status("RayCluster", name, status)

    with api.listen("RayCluster", act):
        yield


def test_up_scale_and_down(api: ApiServer, options: kuberay.Options) -> None:
    told: list[str] = []
    with operator(api):
        up = kuberay.cluster_up(options, told.append)
        assert (up["state"], up["nodes_ready"], up["nodes"], up["head"]) == ("up", 2, 2, "shared-head")
        assert told == ["making Ray cluster shared in namespace dtrain"]
        uid = api.get("RayCluster", "shared")["metadata"]["uid"]
        assert api.get("NetworkPolicy", "shared")["metadata"]["ownerReferences"][0]["uid"] == uid
        assert kuberay.cluster_up(options, told.append) == kuberay.cluster_status(options)  # once more makes no other
        assert api.get("RayCluster", "shared")["metadata"]["uid"] == uid
        for number in (5, 0, 1):
            scaled = kuberay.cluster_scale(options, number, told.append)
            assert (scaled["nodes"], scaled["nodes_ready"]) == (number, number)
            group = api.get("RayCluster", "shared")["spec"]["workerGroupSpecs"][0]
            assert group["minReplicas"] <= number <= group["maxReplicas"]
        assert kuberay.cluster_down(options) == ["deleted Ray cluster shared in namespace dtrain"]
    assert kuberay.cluster_status(options)["state"] == "down"
    assert kuberay.cluster_down(options) == []
    assert [api.list(kind) for kind in ("RayCluster", "NetworkPolicy", "Pod")] == [[], [], []]


def test_runs_on_it_go_before_it(api: ApiServer, options: kuberay.Options) -> None:
    with operator(api):
        kuberay.cluster_up(options, print)
        sent = submission("gpt_small-aaaa", standing=options.standing)
        assert sent.objects[0]["spec"]["clusterSelector"] == {"ray.io/cluster": "shared"}
        api.put({**sent.objects[0], "status": {"jobDeploymentStatus": "Initializing"}})
        other = submission("gpt_small-bbbb").objects[0]  # brings its own
        api.put({**other, "status": {"jobDeploymentStatus": "Initializing"}})
        assert kuberay.cluster_status(options)["runs"] == ["gpt_small-aaaa"]
        ended = kuberay.cluster_down(options)
    assert ended == ["stopped run gpt_small-aaaa", "deleted Ray cluster shared in namespace dtrain"]
    assert kuberay.look("gpt_small-bbbb", options) is not None


def test_what_it_waits_for_is_told_and_not_for_ever(
    api: ApiServer, kubeconfig: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "LOOK_AGAIN_S", 0.5)
    options = some_options(**STANDING, pending_deadline_s=2)
    told: list[str] = []
    with operator(api, holds_back=True), pytest.raises(ClusterError) as error:
        kuberay.cluster_up(options, told.append)
    assert len(told) == 2
    assert told[1].startswith("no node fits the head's pod shared-head: of 3 nodes 3 have too little cpu free")
    assert error.value.message.startswith("Ray cluster shared in namespace dtrain is not ready after 2 s: no node fits")
    state = kuberay.cluster_status(options)
    assert (state["state"], state["why"]) == ("starting", told[1])


def test_somebody_elses_cluster_is_left_alone(api: ApiServer, options: kuberay.Options) -> None:
    api.put({"kind": "RayCluster", "metadata": {"name": "shared", "namespace": "dtrain"}, "spec": {}})
    for verb in (
        lambda: kuberay.cluster_up(options, print),
        lambda: kuberay.cluster_scale(options, 3, print),
        lambda: kuberay.cluster_down(options),
    ):
        with pytest.raises(ClusterError, match="has a Ray cluster shared that dtrain did not make"):
            verb()
    assert "workerGroupSpecs" not in api.get("RayCluster", "shared")["spec"]


def test_up_right_after_down(api: ApiServer, options: kuberay.Options) -> None:
    """What belonged to the cluster before is collected a little later; the new one has its own."""
    left = {"name": "shared", "namespace": "dtrain", "ownerReferences": [{"kind": "RayCluster", "uid": "before"}]}
    api.put({"kind": "NetworkPolicy", "metadata": left})
    collector = threading.Timer(1.0, lambda: api.remove("NetworkPolicy", "shared"))
    collector.start()
    with operator(api):
        kuberay.cluster_up(options, print)
    collector.join()
    uid = api.get("RayCluster", "shared")["metadata"]["uid"]
    assert api.get("NetworkPolicy", "shared")["metadata"]["ownerReferences"][0]["uid"] == uid


def test_what_cannot_be_asked_for(api: ApiServer, options: kuberay.Options, kubeconfig: str) -> None:
    each_its_own = some_options()
    with pytest.raises(InputError, match=r"each run brings its own Ray cluster here.*backend.standing"):
        kuberay.cluster_up(each_its_own, print)
    assert kuberay.cluster_down(each_its_own) == []
    assert kuberay.cluster_status(each_its_own)["version"] == "v1.36.2"
    with pytest.raises(ClusterError, match="there is no Ray cluster shared in namespace dtrain; `dtrain cluster up`"):
        kuberay.cluster_scale(options, 3, print)
    with pytest.raises(InputError, match="-1 nodes cannot be had"):
        kuberay.cluster_scale(options, -1, print)
    scaling = some_options(**STANDING, autoscaling={"max_nodes": 4})
    with pytest.raises(InputError, match="scales by itself"):
        kuberay.cluster_scale(scaling, 3, print)
