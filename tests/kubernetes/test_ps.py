"""`dtrain ps -c FILE`: a thousand runs with what their cluster says of them, at once and in a few requests."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from api_server import ApiServer
from submitting import CLUSTER, ROOT, submission

from dtrain import runs
from dtrain.kubernetes import names
from dtrain.plan import make_plan
from dtrain.spec.load import load_cluster, load_job


def ps(folder: Path, kubeconfig: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dtrain", "ps", "-c", str(folder / "cluster.yaml"), *words]
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60, check=True)


def make(api: ApiServer, folder: Path, number: int) -> None:
    (folder / "cluster.yaml").write_text(CLUSTER.format(folder=folder))
    plan = make_plan(load_job(ROOT / "jobs" / "gpt_small.yaml"), load_cluster(folder / "cluster.yaml"))
    made = submission().objects[0]
    for count in range(number):
        run = runs.create(plan, "", f"gpt_small-{count}")
        metadata = {**made["metadata"], "name": names.object_name(run.id)}
        metadata["annotations"] = {**metadata["annotations"], names.RUN_ID: run.id}
        cluster = f"gpt-small-{count}-x"
        status = {"jobDeploymentStatus": "Initializing", "rayClusterName": cluster}
        api.put({**made, "metadata": metadata, "status": status})
    labels = {**names.run_labels("gpt_small-1"), "ray.io/cluster": "gpt-small-1-x", "ray.io/node-type": "worker"}
    waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image: not found"}
    containers = [{"name": "ray-worker", "image": "dtrain:test", "state": {"waiting": waiting}}]
    pod = {"name": "p", "namespace": "dtrain", "labels": labels}
    api.put({"kind": "Pod", "metadata": pod, "status": {"containerStatuses": containers}})


def test_what_the_cluster_says_is_there(api: ApiServer, kubeconfig: Path, tmp_path: Path) -> None:
    make(api, tmp_path, 3)
    done = ps(tmp_path, kubeconfig)
    [row] = [line for line in done.stdout.splitlines() if line.startswith("gpt_small-1 ")]
    assert row.split()[1] == "pulling"
    assert "worker pod p cannot pull dtrain:test" in row
    told = {run["id"]: run["cluster"]["phase"] for run in json.loads(ps(tmp_path, kubeconfig, "--json").stdout)}
    assert told == {"gpt_small-0": "starting", "gpt_small-1": "pulling", "gpt_small-2": "starting"}


def test_without_the_cluster_the_folders_speak(api: ApiServer, tmp_path: Path) -> None:
    make(api, tmp_path, 2)
    done = ps(tmp_path, tmp_path / "nothing")
    assert "the cluster cannot be asked: $KUBECONFIG names" in done.stderr
    assert done.stdout.count("queued") == 2


@pytest.mark.benchmark
def test_a_thousand_runs_within_two_seconds(api: ApiServer, kubeconfig: Path, tmp_path: Path) -> None:
    make(api, tmp_path, 1000)
    ps(tmp_path, kubeconfig)
    before, started = len(api.requests), time.monotonic()
    done = ps(tmp_path, kubeconfig)
    assert time.monotonic() - started < 2.0
    assert len(api.requests) - before == 3
    assert done.stdout.count("gpt_small-") >= 1000
