"""dtrain's own commands with the rights the chart gives, and no others, against a server that refuses the rest."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from api_refusals import Refusal
from api_server import ApiServer
from chart import EVERYTHING, Object, Values, named, objects
from submitting import some_options, submission
from test_chart_access import rights

from dtrain.backends import kuberay
from dtrain.errors import ClusterError
from dtrain.kubernetes import doctor, verbs

RUN, NAME, CLUSTER = "gpt_small-k3f9", "gpt-small-k3f9", "gpt-small-k3f9-x7k2p"
Right = tuple[str, str]
IN_NAMESPACE: Values = {"runs": {"namespaces": ["dtrain"]}}
PATH = re.compile(
    r"/apis?/(?:(?P<group>[^/]+\.[^/]+)/)?v\w+(?:/namespaces/[^/]+)?/(?P<plural>\w+)(?:/(?P<name>[^/]+)(?:/(?P<part>\w+))?)?.*"
)


def _given(values: Values, kind: str, *names: str) -> set[Right]:
    return _of([named(objects(values), kind, name) for name in names])


def _of(roles: list[Object]) -> set[Right]:
    given = {(verb, resource) for role in roles for resource, verbs in rights(role).items() for verb in verbs}
    return {right for right in given if " " not in right[1]}  # one object by its name is kubectl's to read


def _rules(given: set[Right]) -> list[tuple[str, str, str]]:
    rules = []
    for verb, name in given:
        resource, _, group = name.partition(".")
        rules.append((verb, group, resource))
    return rules


def _asked(api: ApiServer) -> set[Right]:
    """What the requests so far are the use of. Questions about one's own rights are free, as on a real server."""
    asked = set()
    for request in api.requests:
        found = PATH.fullmatch(request.path)
        if found is None or found["plural"] == "selfsubjectaccessreviews":
            continue
        resource = f"{found['plural']}/{found['part']}" if found["part"] else found["plural"]
        verb = {"POST": "create", "DELETE": "delete", "PATCH": "patch"}.get(request.method)
        if verb is None:
            verb = "watch" if request.query.get("watch") else "get" if found["name"] else "list"
        asked.add((verb, f"{resource}.{found['group']}" if found["group"] else resource))
    return asked


def user_with(api: ApiServer, folder: Path, given: set[Right], namespaces: tuple[str, ...] | None = None) -> str:
    """The kubeconfig of somebody who may do this and no more; everywhere, where no namespaces are named."""
    token = api.user("somebody", _rules(given), namespaces=namespaces)
    return str(api.kubeconfig(folder / "somebody", token=token))


def supervisor_rights(values: Values, namespace: str) -> set[Right]:
    return _of([named(objects(values), "Role", "dtrain-supervisor", namespace)])


@contextmanager
def _operator(api: ApiServer) -> Iterator[None]:
    """Makes a Ray cluster with a head for each run, whose worker finds no node."""

    def act(event: str, job: Object) -> None:
        if event == "ADDED":
            with suppress(Refusal):  # it is deleted again already
                begin(job)

    def begin(job: Object) -> None:
        status = {"jobDeploymentStatus": "Initializing", "rayClusterName": CLUSTER, "jobId": NAME}
        owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": NAME, "uid": job["metadata"]["uid"]}
        meta = {"namespace": "dtrain", "ownerReferences": [owner]}
        spec = job["spec"]["rayClusterSpec"]
        cluster = api.put(
            {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {**meta, "name": CLUSTER}, "spec": spec}
        )
        for kind, template in (("head", spec["headGroupSpec"]), ("worker", spec["workerGroupSpecs"][0])):
            labels = template["template"]["metadata"]["labels"] | {"ray.io/cluster": CLUSTER, "ray.io/node-type": kind}
            condition = {
                "type": "PodScheduled",
                "status": "False",
                "reason": "Unschedulable",
                "message": "0/3 nodes fit.",
            }
            api.put(
                {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {**meta, "name": f"{CLUSTER}-{kind}", "labels": labels},
                    "spec": template["template"]["spec"],
                    "status": {"phase": "Pending", "conditions": [condition] if kind == "worker" else []},
                }
            )
        api.event(cluster, "CreatedRayCluster", "made")
        api.set_status("RayJob", NAME, status)

    with api.listen("RayJob", act):
        yield


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _submit_look_and_log(api: ApiServer, options: kuberay.Options) -> None:
    kuberay.send(submission(), options, print)
    _until(lambda: api.get("Pod", f"{CLUSTER}-worker") is not None)
    seen = kuberay.look(RUN, options)
    assert seen is not None and "nodes fit" in seen.why
    assert set(verbs.sights(options)) == {RUN}
    api.log(f"{CLUSTER}-head", b"2026-11-21T15:00:00Z step 1\n", container="ray-head")
    assert any(b"step 1" in line for line in kuberay.logs(RUN, options, "driver", False))


def test_a_submitter_submits_looks_resumes_and_stops(api: ApiServer, tmp_path: Path) -> None:
    given = _given(IN_NAMESPACE, "ClusterRole", "dtrain-user")
    options = some_options(kubeconfig=user_with(api, tmp_path, given))
    with _operator(api):
        _submit_look_and_log(api, options)
        api.set_status("RayJob", NAME, {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"})
        kuberay.send(submission(), options, print)
        assert kuberay.end(RUN, options)
    assert api.list("RayJob") == [] and api.list("NetworkPolicy") == []
    assert _asked(api) - given <= {("get", "services/proxy"), ("get", "secrets")}, "both have another way out"


def test_a_submitter_without_any_one_right_of_these_cannot(tmp_path: Path) -> None:
    """So none of them is there for nothing."""
    given = _given(IN_NAMESPACE, "ClusterRole", "dtrain-user")
    needed = {
        ("create", "rayjobs.ray.io"),
        ("get", "rayjobs.ray.io"),
        ("delete", "rayjobs.ray.io"),
        ("list", "rayjobs.ray.io"),
        ("get", "rayclusters.ray.io"),
        ("create", "networkpolicies.networking.k8s.io"),
        ("list", "pods"),
        ("get", "pods/log"),
    }
    assert needed <= given
    for right in sorted(needed):
        with ApiServer() as api, _operator(api):
            options = some_options(kubeconfig=user_with(api, tmp_path, given - {right}))
            with pytest.raises((ClusterError, AssertionError)):
                _submit_look_and_log(api, options)
                kuberay.end(RUN, options)


def test_a_submitter_keeps_a_standing_cluster(api: ApiServer, tmp_path: Path) -> None:
    given = _given(IN_NAMESPACE, "ClusterRole", "dtrain-user")
    options = some_options(kubeconfig=user_with(api, tmp_path, given), standing={"name": "shared", "nodes": 1})

    def operator(event: str, cluster: Object) -> None:
        if event == "DELETED":
            return
        count = cluster["spec"]["workerGroupSpecs"][0]["replicas"]
        status = {
            "state": "ready",
            "readyWorkerReplicas": count,
            "observedGeneration": cluster["metadata"]["generation"],
            "conditions": [{"type": "HeadPodReady", "status": "True"}],
        }
        if cluster.get("status") != status:
            api.set_status("RayCluster", "shared", status)

    with api.listen("RayCluster", operator):
        assert kuberay.cluster_up(options, print)["state"] == "up"
        assert kuberay.cluster_scale(options, 2, print)["nodes_ready"] == 2
        assert kuberay.cluster_status(options)["state"] == "up"
        assert kuberay.cluster_down(options)
    assert _asked(api) <= given


def test_a_viewer_looks_and_cannot_touch(api: ApiServer, tmp_path: Path) -> None:
    theirs = some_options(kubeconfig=str(api.kubeconfig(tmp_path / "admin")))
    options = some_options(kubeconfig=user_with(api, tmp_path, _given(IN_NAMESPACE, "ClusterRole", "dtrain-viewer")))
    with _operator(api):
        _submit_look_and_log(api, theirs)
        assert kuberay.look(RUN, options) is not None
        assert set(verbs.sights(options)) == {RUN}
        assert any(b"step 1" in line for line in kuberay.logs(RUN, options, "driver", False))
        with pytest.raises(ClusterError, match="may not delete rayjobs"):
            kuberay.end(RUN, options)
        with pytest.raises(ClusterError, match="may not create rayjobs"):
            kuberay.send(submission("gpt_small-other"), options, print)


def test_a_supervisor_sees_a_run_end_and_submits_it_again(api: ApiServer, tmp_path: Path) -> None:
    theirs = some_options(kubeconfig=str(api.kubeconfig(tmp_path / "admin")))
    given = supervisor_rights(IN_NAMESPACE, "dtrain")
    options = some_options(kubeconfig=user_with(api, tmp_path, given))
    with _operator(api):
        kuberay.send(submission(), theirs, print)
        _until(lambda: api.get("Pod", f"{CLUSTER}-worker") is not None)
        first = api.get("RayJob", NAME)
        assert first is not None
        api.requests.clear()
        seen = kuberay.look(RUN, options)
        assert seen is not None and not seen.is_over
        api.set_status("RayJob", NAME, {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"})
        seen = kuberay.look(RUN, options)
        assert seen is not None and seen.is_over
        kuberay.send(submission(), options, print)
    again = api.get("RayJob", NAME)
    assert again is not None and again["metadata"]["uid"] != first["metadata"]["uid"]
    assert _asked(api) <= given
    for_bad_days = {("get", "networkpolicies.networking.k8s.io"), ("watch", "rayjobs.ray.io")}
    assert given - _asked(api) <= for_bad_days, "a lost answer, an operator that takes its time"


def test_the_answer_lost_to_a_supervisor_makes_no_second_run(api: ApiServer, tmp_path: Path) -> None:
    options = some_options(kubeconfig=user_with(api, tmp_path, supervisor_rights(IN_NAMESPACE, "dtrain")))
    api.fail(path=r".*/networkpolicies", method="POST", cut="after")
    begun = time.monotonic()
    with _operator(api):
        kuberay.send(submission(), options, print)
    assert time.monotonic() - begun < 10
    assert ("get", "networkpolicies.networking.k8s.io") in _asked(api)
    assert len(api.list("NetworkPolicy")) == 1


def test_the_doctor_of_a_submitter_lacks_no_right(api: ApiServer, tmp_path: Path) -> None:
    given = _given(EVERYTHING, "ClusterRole", "dtrain-user", "dtrain-user-cluster")
    words = {"priority_class": "dtrain-normal", "service_account": "dtrain-run"}
    volume = {"mount": "/mnt/dtrain", "claim": "dtrain-runs"}
    options = some_options(kubeconfig=user_with(api, tmp_path, given), volumes=[volume], **words)
    for one in objects(IN_NAMESPACE):
        if one["kind"] in ("PriorityClass", "ServiceAccount", "PersistentVolumeClaim"):
            api.put(one)
    findings = kuberay.cluster_doctor(options)
    told = {finding.area: finding for finding in findings}
    assert told["permissions"].state == "ok"
    assert not [
        finding for finding in findings if "cannot be seen" in finding.text or "cannot be looked at" in finding.text
    ]
    assert _asked(api) <= given


def test_what_the_doctor_asks_for_is_what_the_chart_gives() -> None:
    given = _given({}, "ClusterRole", "dtrain-user", "dtrain-user-cluster")
    for group, resource, wanted, _ in (
        *doctor.NEEDED,
        doctor.NEEDED_TO_ISOLATE,
        doctor.NEEDED_FOR_STANDING,
        *doctor.HELPFUL,
    ):
        for verb in wanted:
            assert (verb, f"{resource}.{group}" if group else resource) in given
