"""`dtrain submit` to a cluster that cannot take the run: one message with the next move, at once, nothing left."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from api_server import ApiServer
from submitting import CLUSTER, ROOT

from dtrain.kubernetes import verbs

SECONDS = 12.0
"""Within seconds, on two cores that others use as well."""


def no_kubeconfig(api: ApiServer, folder: Path) -> Path:
    return folder / "nothing"


def wrong_context(api: ApiServer, folder: Path) -> Path:
    path = api.kubeconfig(folder / "k", context="gke_h100")
    path.write_text(path.read_text().replace('"current-context": "gke_h100"', '"current-context": "gone"'))
    return path


def expired(api: ApiServer, folder: Path) -> Path:
    return api.kubeconfig(folder / "k", token="of yesterday")


def no_room(api: ApiServer, folder: Path) -> Path:
    api.put({"kind": "ResourceQuota", "metadata": {"name": "team", "namespace": "dtrain"},
             "spec": {"hard": {"count/rayjobs.ray.io": "0"}}})  # fmt: skip
    return api.kubeconfig(folder / "k")


WRONG = {
    no_kubeconfig: "which is not there; get one from whoever runs the cluster",
    wrong_context: "current-context is 'gone', which it does not have; there is: gke_h100",
    expired: "the cluster does not accept these credentials, they may have run out; get a new kubeconfig",
    no_room: "quota team of the namespace is used up: asked for count/rayjobs.ray.io=1",
}


def submit(folder: Path, kubeconfig: Path) -> subprocess.CompletedProcess[str]:
    (folder / "cluster.yaml").write_text(CLUSTER.format(folder=folder))
    command = [sys.executable, "-m", "dtrain", "submit", str(ROOT / "jobs" / "gpt_small.yaml"), "--detach"]
    return subprocess.run(
        [*command, "--cluster", str(folder / "cluster.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "KUBECONFIG": str(kubeconfig), "HOME": str(folder)},
        check=False,
    )


def check(done: subprocess.CompletedProcess[str], told: str) -> None:
    assert done.returncode == 5, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert told in lines[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("what", WRONG, ids=lambda what: what.__name__)
def test_one_message_and_nothing_left(api: ApiServer, tmp_path: Path, what: Callable) -> None:
    path = what(api, tmp_path)
    started = time.monotonic()
    check(submit(tmp_path, path), WRONG[what])
    assert time.monotonic() - started < SECONDS
    assert [made for kind in verbs.KINDS for made in api.list(kind)] == []


def test_without_kuberay(tmp_path: Path) -> None:
    with ApiServer(ray=False) as bare:
        done = submit(tmp_path, bare.kubeconfig(tmp_path / "k"))
        check(done, "KubeRay is not installed in this cluster, or in another version; install the KubeRay operator")
        assert bare.list("NetworkPolicy") == []
