"""`dtrain ps -c FILE`: runs with what their cluster says of them, in a few requests however many there are."""

import json
import os
import subprocess
import sys
from pathlib import Path

from api_server import ApiServer
from submitting import ROOT, submitted


def ps(folder: Path, kubeconfig: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dtrain", "ps", "-c", str(folder / "cluster.yaml"), *words]
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60, check=True)


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
