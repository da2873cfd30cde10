"""`dtrain ps -c FILE`: runs with what their cluster says of them, in a few requests however many there are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from api_server import ApiServer
from submitting import ROOT, submitted

from dtrain import runs
from dtrain.kubernetes import names
from dtrain.view import cluster


def dtrain(verb: str, folder: Path, kubeconfig: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dtrain", verb, "-c", str(folder / "cluster.yaml"), *words]
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    return done


def ps(folder: Path, kubeconfig: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return dtrain("ps", folder, kubeconfig, *words)


def test_what_the_cluster_says_is_there(api: ApiServer, kubeconfig: Path, tmp_path: Path) -> None:
    submitted(api, tmp_path, 3)
    done = ps(tmp_path, kubeconfig)
    [row] = [line for line in done.stdout.splitlines() if line.startswith("gpt_small-1 ")]
    assert row.split()[1] == "pulling"
    assert "worker pod p cannot pull dtrain:test" in row
    told = {run["id"]: run["cluster"]["phase"] for run in json.loads(ps(tmp_path, kubeconfig, "--json").stdout)}
    assert told == {"gpt_small-0": "starting", "gpt_small-1": "pulling", "gpt_small-2": "starting"}


def test_without_the_cluster_the_folders_speak(api: ApiServer, tmp_path: Path) -> None:
    submitted(api, tmp_path, 2)
    done = ps(tmp_path, tmp_path / "nothing")
    assert "the cluster cannot be asked: $KUBECONFIG names" in done.stderr
    assert done.stdout.count("queued") == 2


def test_many_runs_are_a_few_requests(api: ApiServer, kubeconfig: Path, tmp_path: Path) -> None:
    submitted(api, tmp_path, 600)
    before = len(api.requests)
    done = ps(tmp_path, kubeconfig)
    assert len(api.requests) - before == 3, "two pages of runs, and their pods"
    assert done.stdout.count("gpt_small-") >= 600


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({"jobDeploymentStatus": "Initializing", "rayClusterName": "x"}, "recovering"),
        ({"jobDeploymentStatus": "Retrying"}, "recovering"),
        ({"jobDeploymentStatus": "Suspended"}, "recovering"),
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "rayClusterName": "x"}, "lost"),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "its head is gone"}, "lost"),
        (None, "lost"),
    ],
    ids=["starts again", "retries", "waits in a queue", "does not know", "has ended", "has nothing of it"],
)
def test_a_run_whose_head_starts_again_is_not_called_lost(
    api: ApiServer, kubeconfig: Path, tmp_path: Path, status: dict | None, state: str
) -> None:
    """Its driver went with the head, and the cluster is about to start another: that is more than its lease tells."""
    submitted(api, tmp_path, 1)
    [run] = runs.list_runs(str(tmp_path / "runs"))
    run.update(state="running", driver_pid=2**22 + 1)
    name = names.object_name(run.id)
    if status is None:
        api.remove("RayJob", name)
    else:
        api.set_status("RayJob", name, status)
    assert run.record.state == "lost"
    [row] = [line for line in ps(tmp_path, kubeconfig).stdout.splitlines() if line.startswith(run.id)]
    assert row.split()[1] == state
    told = dtrain("status", tmp_path, kubeconfig, run.id).stdout
    assert told.splitlines()[0].split() == [run.id, state]
    assert (f"dtrain resume {run.id}" in told) == ("exit code" in told) == (state == "lost")


@pytest.mark.parametrize("words", [(), ("--agent",), ("--rank", "0")])
def test_logs_that_only_the_folder_has_are_not_looked_for_in_pods(
    api: ApiServer, kubeconfig: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """What pods could print instead is nothing that can be asked for here."""
    submitted(api, tmp_path, 1)
    text = dtrain("logs", tmp_path, kubeconfig, "gpt_small-0", *words, code=2).stderr
    assert text.startswith("error: run gpt_small-0 has no log ")
    assert text.rstrip().endswith("; there is: none yet")


def test_a_waiting_run_that_somebody_deletes_on_the_cluster(api: ApiServer, kubeconfig: Path, tmp_path: Path) -> None:
    """Whoever follows it is told: nothing will come of it any more."""
    submitted(api, tmp_path, 1)
    [run] = runs.list_runs(str(tmp_path / "runs"))
    assert cluster.waits_for(run, run.plan) == "starting: its pods are being made"
    api.remove("RayJob", names.object_name(run.id))
    assert cluster.waits_for(run, run.plan) == (
        f"its cluster has nothing of it; if that stays so, `dtrain stop {run.where}` and then"
        f" `dtrain resume {run.where}` start it anew"
    )
    dtrain("stop", tmp_path, kubeconfig, run.id)
    assert run.record.state == "stopped"
