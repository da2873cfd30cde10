"""Every shipped job on every shipped cluster: planned, rendered, held to what Kubernetes takes, or refused clearly."""

import sys
from functools import cache
from pathlib import Path

import crd_schema
import pytest

from dtrain.backends import kuberay
from dtrain.errors import InputError
from dtrain.machine import Machine
from dtrain.planning import make_plan
from dtrain.spec.load import load_cluster, load_job

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "golden"))
import rendered  # noqa: E402 -- the committed texts are another folder's

JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.yaml"))
CLUSTERS = sorted(path.stem for path in (ROOT / "clusters").glob("*.yaml"))
TWO_CORES = Machine(num_cores=2, memory_gib=24.0)
"""For the files that describe no machine but take the one at hand."""
REFUSED = {
    ("gpt_7b_zero3", "gke_l4_spot"): "take 28 GiB of each worker's 24 under strategy deepspeed; strategy: {name: fsdp",
    ("gpt_7b_zero3", "kind"): "of each worker's 2 under strategy deepspeed; share it among 51 workers or more",
    ("gpt_1b_fsdp", "kind"): "of each worker's 2 under strategy fsdp; share it among 10 workers or more",
    ("gpt_7b_zero3", "local"): "of each worker's 12 under strategy deepspeed; share it among 9 workers or more",
}
"""Pairs that cannot work, and what is said of them."""


@cache
def _job(name):
    return load_job(ROOT / "jobs" / f"{name}.yaml")


@cache
def _cluster(name):
    return load_cluster(ROOT / "clusters" / f"{name}.yaml")


def _plan(job, cluster):
    return make_plan(_job(job), _cluster(cluster), TWO_CORES, Path("/jobs"))


def _pairs(*, are_refused=False):
    pairs = [(job, cluster) for cluster in CLUSTERS for job in JOBS]
    return [pair for pair in pairs if (pair in REFUSED) == are_refused]


def _on_kubernetes(cluster):
    return _cluster(cluster).backend.name == "kuberay"


@pytest.mark.parametrize(("job", "cluster"), _pairs())
def test_a_job_can_be_planned_for_a_cluster(job, cluster):
    plan = _plan(job, cluster)
    machine = _cluster(cluster).machine
    assert plan.batch.num_readers == plan.workers.total
    if machine is not None:
        assert plan.workers.device == ("cuda" if machine.gpus else "cpu")
        assert plan.workers.per_node <= (len(machine.gpus) or machine.num_cores)
        assert plan.workers.cpus_per_node <= machine.num_cores


@pytest.mark.parametrize(("job", "cluster"), _pairs(are_refused=True))
def test_a_job_for_other_hardware_is_refused_with_the_next_move(job, cluster):
    with pytest.raises(InputError) as caught:
        _plan(job, cluster)
    assert REFUSED[job, cluster] in caught.value.message


@pytest.mark.skipif(not crd_schema.CRDS.is_dir(), reason=f"the published CRDs are not in {crd_schema.CRDS}")
@pytest.mark.parametrize(("job", "cluster"), [pair for pair in _pairs() if _on_kubernetes(pair[1])])
def test_what_would_be_sent_is_what_kubernetes_takes(job, cluster):
    sent = kuberay.render(_plan(job, cluster), Path(f"{job}-k3f9")).objects
    assert [thing["kind"] for thing in sent] == ["RayJob", "NetworkPolicy"]
    assert [mistake for thing in sent for mistake in crd_schema.refused(thing)] == []


@pytest.mark.parametrize("cluster", [name for name in CLUSTERS if _on_kubernetes(name)])
def test_a_cluster_file_leads_to_pods_that_fit_its_nodes(cluster):
    place = _cluster(cluster)
    job, _ = kuberay.render(_plan("gpt_small", cluster), Path("gpt_small-k3f9")).objects
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    asked = container["resources"]["requests"]
    assert int(asked["cpu"]) <= place.machine.num_cores
    assert asked.get("nvidia.com/gpu", 0) == len(place.machine.gpus)
    assert (group["replicas"], group["numOfHosts"]) == (place.nodes, 1)
    assert any("#" in line for line in (ROOT / "clusters" / f"{cluster}.yaml").read_text().splitlines()[:5])


ADMITTED_VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}


def _beyond_restricted(pod):
    """What of a pod goes beyond the pod security standard `restricted`."""
    spec = pod["spec"]
    kinds = {key for volume in spec["volumes"] for key in volume if key != "name"}
    found = kinds - ADMITTED_VOLUMES
    found |= {key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)}
    for container in spec["containers"]:
        security = {**spec["securityContext"], **container["securityContext"]}
        found |= set(security["capabilities"].get("add", ()))
        found |= {"capabilities"} - {"capabilities" if security["capabilities"]["drop"] == ["ALL"] else ""}
        is_as_asked = (
            security["allowPrivilegeEscalation"] is False
            and security["runAsNonRoot"] is True
            and security["runAsUser"] > 0
            and security["seccompProfile"]["type"] == "RuntimeDefault"
        )
        found |= set() if is_as_asked else {"security context"}
    return found


@pytest.mark.parametrize("cluster", [name for name in CLUSTERS if _on_kubernetes(name)])
def test_pods_keep_to_the_restricted_standard_or_the_cluster_file_says_what_the_namespace_must_admit(cluster):
    job = kuberay.render(_plan("gpt_small", cluster), Path("gpt_small-k3f9")).objects[0]
    beyond = set().union(*(_beyond_restricted(pod) for pod in crd_schema.pods_of(job)))
    assert beyond <= {"hostPath", "IPC_LOCK"}
    text = (ROOT / "clusters" / f"{cluster}.yaml").read_text()
    assert bool(beyond) == ("podSecurity: privileged" in text), beyond
    assert ("IPC_LOCK" in beyond) == ("IPC_LOCK" in text)


@pytest.mark.parametrize("pair", rendered.PAIRS, ids=".".join)
def test_what_would_be_sent_is_the_committed_text(pair):
    committed = rendered.golden(*pair).read_text()
    assert rendered.text(*pair) == committed, "run `make generate`, read the difference, commit it"


def test_there_is_a_committed_text_for_each_of_these_pairs_and_no_other():
    assert set(rendered.FOLDER.glob("*.yaml")) == {rendered.golden(*pair) for pair in rendered.PAIRS}
