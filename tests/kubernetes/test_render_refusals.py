"""What cannot work on a cluster is refused by the files alone: where it stands, and with the next move."""

from pathlib import Path

import pytest
from rendering import GPUS, ROOT, a_cluster, a_plan

from dtrain.backends import kuberay
from dtrain.errors import InputError
from dtrain.machine import Machine
from dtrain.planning import make_plan
from dtrain.spec.job import JobSpec
from dtrain.spec.load import load_cluster, load_job


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ({"queue": {"name": "q"}, "gang": {"scheduler": "volcano"}}, "keep one of the two"),
        ({"queue": {"name": "q"}, "autoscaling": {"max_nodes": 4}}, "remove queue or autoscaling"),
        ({"queue": {"name": "q"}, "standing": {"name": "s"}}, "remove queue or standing"),
        ({"gang": {"scheduler": "volcano"}, "standing": {"name": "s"}}, "remove gang or standing"),
        ({"worker": {"shm_gib": 800}}, "worker.shm_gib 800 is part of the pod's memory"),
        ({"worker": {"shm_gib": 2}}, "give at most 0.5"),
        ({"autoscaling": {"min_nodes": 5, "max_nodes": 4}}, "min_nodes 5 is more than max_nodes 4"),
        ({"volumes": [{"mount": "/x"}]}, "give one of claim, host_path and secret"),
        ({"volumes": [{"mount": "/x", "claim": "a", "secret": "b"}]}, "give one of claim, host_path and secret"),
        ({"head": {"tolerations": [{"key": "a", "value": "b"}]}}, "a value goes with operator: Equal"),
        ({"machine": {"cores": 8, "memory_gib": 8, "gpus": 1}}, "gpu_memory_gib does not say how much"),
        ({"machine": {"memory_gib": 8}}, "backend.machine.cores is missing"),
        ({"security": {"user": 0}}, "backend.security.user: expected a whole number greater than 0"),
        ({"standing": {"name": "Shared"}}, "beginning with a letter"),
        ({"network": {"resources": {"rdma/ib": "one"}}}, "text such as 5120Mi"),
        ({"ray_version": "latest"}, "backend.ray_version"),
        ({"standing": {"name": "s"}}, "nodes: 2 is more than the 1 of backend.standing.nodes"),
        ({"standing": {"name": "s"}, "autoscaling": {"max_nodes": 1}}, "the 1 of backend.autoscaling.max_nodes"),
        ({"worker": {"node_selector": {"spot": True}}}, "put it in quotes"),
        ({"pending_deadline": 60}, "did you mean 'pending_deadline_s'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_options_that_cannot_work_are_refused_where_they_stand(backend, said):
    with pytest.raises(InputError) as caught:
        a_cluster(backend=backend)
    assert said in caught.value.message
    assert caught.value.message.startswith("there.yaml:")


@pytest.mark.parametrize(
    ("storage", "volumes", "said"),
    [
        ("runs", [], "'runs' is a folder that no pod sees; give a bucket"),
        ("/mnt/runs", [], "'/mnt/runs' is a folder that no pod sees"),
        ("/mnt/dtrain2", [{"mount": "/mnt/dtrain", "claim": "c"}], "no pod sees"),
        ("/data/runs", [{"mount": "/data", "host_path": "/data", "read_only": True}], "cannot be written to"),
        ("/etc/x/runs", [{"mount": "/etc/x", "secret": "s"}], "cannot be written to"),
    ],
)
def test_storage_that_pods_cannot_use_is_refused_at_its_line(storage, volumes, said):
    with pytest.raises(InputError) as caught:
        a_cluster(storage=storage, backend={"volumes": volumes})
    assert said in caught.value.message
    assert a_cluster(storage="/mnt/dtrain/runs", backend={"volumes": [{"mount": "/mnt/dtrain", "claim": "c"}]})


@pytest.mark.parametrize(
    ("job", "cluster", "said"),
    [
        ({}, {"device": "gpu", "backend": {"machine": {"cores": 8, "memory_gib": 32}}}, "its machines have none"),
        ({}, {"workers_per_node": 9}, "more than the 8 GPUs of a machine of cluster 'there'"),
        ({"precision": "bf16"}, {"backend": {"machine": {**GPUS, "gpu": "T4", "bf16": False}}}, "write fp16, or auto"),
    ],
)
def test_a_job_for_hardware_that_the_cluster_has_not_is_refused(job, cluster, said):
    asked = load_job(ROOT / "jobs" / "gpt_small.yaml", [f"train.{key}={value}" for key, value in job.items()])
    with pytest.raises(InputError, match=said):
        make_plan(asked, a_cluster(**cluster), Machine(4, 64.0))


def test_a_snapshot_that_does_not_fit_the_shared_memory_of_a_node_is_refused_before_anything_is_sent():
    def sent(nodes):
        worker = {"shm_gib": 60, "object_store_gib": 2}
        return kuberay.render(a_plan("gpt_7b_zero3", nodes=nodes, backend={"worker": worker}), "gpt_7b_zero3-k3f9")

    assert sent(2).num_nodes == 2  # 37.7 GiB on each
    with pytest.raises(InputError, match=r"takes 75\.4 GiB of each node's /dev/shm, which has 58\.0 for it"):
        sent(1)


def test_planning_for_a_cluster_does_not_look_at_the_machine_that_plans():
    asked = load_job(ROOT / "jobs" / "gpt_small.yaml")
    plans = [make_plan(asked, a_cluster(), machine) for machine in (None, Machine(1, 1.0), Machine(64, 64.0))]
    assert plans[0] == plans[1] == plans[2]
    assert plans[0].train.precision == "bf16"
    assert (plans[0].workers.total, plans[0].workers.device, plans[0].storage) == (16, "cuda", "s3://bucket/runs")
    cores = a_cluster(backend={"machine": {"cores": 4, "memory_gib": 16, "bf16": True}})
    assert make_plan(asked, cores, Machine(64, 64.0)).train.precision == "bf16"


def test_workers_are_so_many_that_they_divide_the_batch_by_the_micro_batch():
    job = load_job(ROOT / "jobs" / "finetune_lora.yaml")
    assert isinstance(job, JobSpec)
    plan = make_plan(job, a_cluster(), folder=Path("/jobs"))
    assert (plan.workers.per_node, plan.batch.micro, plan.batch.accumulation) == (4, 4, 1)


def test_ray_in_the_image_is_the_one_in_the_constraints():
    assert (
        f"ray=={load_cluster(ROOT / 'clusters' / 'kind.yaml').backend.ray_version}\n"
        in (ROOT / "constraints.txt").read_text()
    )
