"""What would be sent for a job of the repository on a cluster described here, held to the published schemas."""

from pathlib import Path

import crd_schema
import yaml

from dtrain.backends import kuberay
from dtrain.planning import make_plan
from dtrain.spec.document import parse
from dtrain.spec.load import cluster_of, load_job

ROOT = Path(__file__).resolve().parents[2]
GPUS = {"cores": 96, "memory_gib": 800, "gpus": 8, "gpu": "H100", "gpu_memory_gib": 80}


def a_cluster(*, nodes=2, storage="s3://bucket/runs", backend=None, **more):
    given = {"name": "kuberay", "image": "dtrain:1", "machine": GPUS, **(backend or {})}
    text = yaml.safe_dump({"name": "there", "backend": given, "nodes": nodes, "storage": storage, **more})
    root = parse(text, "there.yaml")
    assert root is not None
    return cluster_of(root)


def a_plan(run="gpt_small", **cluster):
    return make_plan(load_job(ROOT / "jobs" / f"{run}.yaml"), a_cluster(**cluster), folder=Path("/jobs"))


def sent(run_id="gpt_small-k3f9", *, cluster=None, **backend):
    """The objects of a run; where the CRDs are at hand they are held to them."""
    objects = kuberay.render(a_plan(backend=backend, **(cluster or {})), Path(run_id)).objects
    if crd_schema.CRDS.is_dir():
        assert [mistake for thing in objects for mistake in crd_schema.refused(thing)] == []
    return objects


def parts(objects):
    """RayJob spec, RayCluster spec, and the pods of head and workers."""
    spec = objects[0]["spec"]
    cluster = spec["rayClusterSpec"]
    return spec, cluster, cluster["headGroupSpec"]["template"]["spec"], group_of(cluster)["template"]["spec"]


def group_of(cluster):
    """The one worker group of a RayCluster."""
    (group,) = cluster["workerGroupSpecs"]
    return group
