"""Two run namespaces that keep their runs in one place, each with a supervisor of its own."""

import time
from pathlib import Path

from api_server import ApiServer
from chart import JOBS, Values, cluster_file
from msgspec.structs import replace
from test_chart_rights_in_use import supervisor_rights, user_with

from dtrain import runs, supervise
from dtrain.planning import make_plan
from dtrain.spec import load
from dtrain.spec.cluster import ClusterSpec

LONG_AGO_S = 1000.0


def _cluster(values: Values, folder: Path, namespace: str, kubeconfig: str) -> ClusterSpec:
    cluster = load.load_cluster(cluster_file(values, folder, namespace))
    backend = replace(cluster.backend, kubeconfig=kubeconfig)
    return replace(cluster, backend=backend)


def test_a_supervisor_leaves_the_runs_of_another_team_alone(tmp_path: Path) -> None:
    values: Values = {
        "runs": {"namespaces": ["team-a", "team-b"]},
        "storage": {"pvc": {"mountPath": str(tmp_path / "shared")}},
    }
    with ApiServer(namespaces=("team-a", "team-b")) as api:
        kubeconfig = user_with(api, tmp_path, supervisor_rights(values, "team-a"), ("team-a",))
        clusters = {team: _cluster(values, tmp_path, team, kubeconfig) for team in ("team-a", "team-b")}
        job = load.load_job(JOBS / "gpt_small.yaml")
        made = {team: runs.create(make_plan(job, cluster), "") for team, cluster in clusters.items()}
        for run in made.values():  # nothing in the cluster knows of them, though they were submitted long ago
            run.update(created_at=time.time() - LONG_AGO_S)
        said: list[str] = []
        place = str(tmp_path / "shared" / "runs")
        assert supervise.Watcher(place, clusters["team-a"], said.append).look() == 1
        assert len(api.list("RayJob", "team-a")) == 1 and api.list("RayJob", "team-b") == []
    assert made["team-b"].record.submissions == 1, "it may wait in its own queue"
    assert not [line for line in said if made["team-b"].id in line]
