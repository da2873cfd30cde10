"""kubectl, unchanged, reads the same server and takes what dtrain renders: the two tell the same story."""

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from api_server import ApiServer
from submitting import operator, submission

from dtrain.backends import kuberay

NAME = "gpt-small-k3f9"


@pytest.fixture
def kubectl(api: ApiServer, kubeconfig: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed here")

    def run(*words: str, stdin: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HOME": str(tmp_path)}
        done = subprocess.run(
            ["kubectl", *words], input=stdin, capture_output=True, text=True, env=environment, timeout=60, check=False
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


def test_what_is_rendered_is_what_kubectl_takes(api: ApiServer, kubectl: Callable) -> None:
    text = submission().text()
    created = f"rayjob.ray.io/{NAME} created ({{}})\nnetworkpolicy.networking.k8s.io/{NAME} created ({{}})\n"
    done = kubectl("apply", "--dry-run=client", "-f", "-", stdin=text)
    assert done.stdout == created.format("dry run", "dry run")
    done = kubectl("apply", "--dry-run=server", "-f", "-", stdin=text)
    assert done.stdout == created.format("server dry run", "server dry run")
    assert api.list("RayJob") == []


def test_both_see_the_same(api: ApiServer, kubectl: Callable, options: kuberay.Options) -> None:
    with operator(api):
        kuberay.send(submission(), options, print)
    [job] = json.loads(kubectl("get", "rayjobs", "-o", "json").stdout)["items"]
    assert job == api.get("RayJob", NAME)
    labelled = kubectl("get", "rayjobs,networkpolicies", "-l", "app.kubernetes.io/managed-by=dtrain", "-o", "name")
    assert labelled.stdout.split() == [f"rayjob.ray.io/{NAME}", f"networkpolicy.networking.k8s.io/{NAME}"]
    with operator(api):
        deleted = kubectl("delete", "rayjob", NAME)
    assert deleted.stdout == f'rayjob.ray.io "{NAME}" deleted\n'
    assert kuberay.look("gpt_small-k3f9", options) is None
    assert api.list("NetworkPolicy") == []


def test_applying_twice_changes_nothing(api: ApiServer, kubectl: Callable) -> None:
    """What kubectl keeps beside an object, to compare: the server gives it back as it was."""
    kubectl("apply", "-f", "-", stdin=submission().text())
    version = api.get("RayJob", NAME)["metadata"]["resourceVersion"]
    done = kubectl("apply", "-f", "-", stdin=submission().text())
    # The server's defaults are in the RayJob's lists, so that kubectl sends them again.
    assert done.stdout.split("\n")[1] == f"networkpolicy.networking.k8s.io/{NAME} unchanged"
    assert api.get("RayJob", NAME)["metadata"]["resourceVersion"] == version


def test_refusals_are_those_of_a_real_server(api: ApiServer, kubectl: Callable, tmp_path: Path) -> None:
    path = api.kubeconfig(tmp_path / "limited", token=api.user("limited", [("get", "ray.io", "rayjobs")]))
    refused = kubectl("--kubeconfig", str(path), "get", "pods", check=False)
    assert refused.stderr == (
        'Error from server (Forbidden): pods is forbidden: User "limited" cannot list resource "pods" in API group ""'
        ' in the namespace "dtrain"\n'
    )
    assert kubectl("get", "rayjob", "nope", check=False).stderr == (
        'Error from server (NotFound): rayjobs.ray.io "nope" not found\n'
    )


def test_logs(api: ApiServer, kubectl: Callable) -> None:
    spec = {"containers": [{"name": "ray-head", "image": "x"}, {"name": "autoscaler", "image": "x"}]}
    api.put({"kind": "Pod", "metadata": {"name": "p", "namespace": "dtrain"}, "spec": spec})
    api.log("p", b"one\ntwo\n")
    api.log("p", b"three\n", container="autoscaler")
    assert kubectl("logs", "p", "-c", "ray-head").stdout == "one\ntwo\n"
    assert kubectl("logs", "p", "-c", "ray-head", "--tail=1").stdout == "two\n"
    assert kubectl("logs", "p", "-c", "autoscaler").stdout == "three\n"


def test_watching(api: ApiServer, kubectl: Callable) -> None:
    """As `kubectl get -w`: what there is, then each change, until it is ended."""
    api.put({"kind": "RayJob", "metadata": {"name": "a", "namespace": "dtrain"}, "spec": {}})

    def act() -> None:
        deadline = time.monotonic() + 20
        while not any(r.query.get("watch") in ("1", "true") for r in api.requests) and time.monotonic() < deadline:
            time.sleep(0.01)
        api.put({"kind": "RayJob", "metadata": {"name": "b", "namespace": "dtrain"}, "spec": {}})
        api.set_status("RayJob", "a", {"jobDeploymentStatus": "Running"})

    actor = threading.Thread(target=act)
    actor.start()
    wanted = "jsonpath={.metadata.name}:{.status.jobDeploymentStatus} "
    done = kubectl("get", "rayjobs", "-w", "-o", wanted, "--request-timeout=3s", check=False)
    actor.join()
    assert done.stdout.split()[-2:] == ["b:", "a:Running"]
