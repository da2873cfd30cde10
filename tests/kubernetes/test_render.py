"""From a plan to objects: what each option comes to, offline and the same every time."""

import os
import subprocess
import sys

import crd_schema
import pytest
import yaml
from msgspec.structs import replace
from rendering import ROOT, a_cluster, a_plan, group_of, parts, sent

from dtrain.backends import kuberay
from dtrain.errors import InputError
from dtrain.kubernetes import names, render
from dtrain.plan import read_plan

# -- the run ---------------------------------------------------------------------------------------------------


def test_a_run_is_a_job_that_the_operator_neither_retries_nor_waits_for_without_end():
    spec, cluster, _, _ = parts(sent())
    assert spec["entrypoint"] == "python -m dtrain.runtime.remote --storage s3://bucket/runs --run gpt_small-k3f9"
    assert (spec["submissionMode"], spec["backoffLimit"], spec["preRunningDeadlineSeconds"]) == ("HTTPMode", 0, 1800)
    assert (spec["shutdownAfterJobFinishes"], spec["jobId"]) == (True, "gpt-small-k3f9")
    assert "activeDeadlineSeconds" not in spec
    assert "suspend" not in spec
    assert cluster["authOptions"] == {"mode": "token"}
    assert sent(active_deadline_s=99)[0]["spec"]["activeDeadlineSeconds"] == 99


def test_the_entry_point_reaches_the_shell_of_the_head_as_one_word_each():
    spec = sent(cluster={"storage": "s3://bucket/it's here"})[0]["spec"]
    assert spec["entrypoint"].endswith("""--storage 's3://bucket/it'"'"'s here' --run gpt_small-k3f9""")


def test_everything_of_a_run_can_be_found_by_its_label_and_its_pods_too():
    job, policy = sent(labels={"team": "vision"}, annotations={"cost": "a/b"})
    mine = {**names.run_labels("gpt_small-k3f9"), "team": "vision"}
    assert mine["dtrain.dev/run"] == "gpt-small-k3f9"
    cluster = job["spec"]["rayClusterSpec"]
    for thing in (job, policy, cluster["headGroupSpec"]["template"], group_of(cluster)["template"]):
        assert thing["metadata"]["labels"].items() >= mine.items()
        assert thing["metadata"]["annotations"]["cost"] == "a/b"
    assert job["metadata"]["annotations"].items() >= {
        "dtrain.dev/run-id": "gpt_small-k3f9",
        "dtrain.dev/storage": "s3://bucket/runs",
    }.items()  # fmt: skip


def test_a_plan_that_differs_is_told_apart_by_its_hash():
    plan = a_plan()
    other = replace(plan, name="another")
    of = [kuberay.render(p, "gpt_small-k3f9").objects[0]["metadata"]["annotations"][names.PLAN] for p in (plan, other)]
    assert of[0] != of[1]
    again = read_plan(plan.to_json().encode(), "plan.json")
    assert kuberay.render(again, "gpt_small-k3f9") == kuberay.render(plan, "gpt_small-k3f9")


@pytest.mark.parametrize("run_id", ["1b-k3f9", "a" * 48, "gpt.small-k3f9", "Gpt-k3f9"])
def test_a_run_that_kubernetes_cannot_name_is_refused_before_anything_is_sent(run_id):
    with pytest.raises(InputError, match="give the job another name"):
        kuberay.render(a_plan(), run_id)


def test_pods_of_a_run_may_talk_to_each_other():
    _, policy = sent()
    me = [{"podSelector": {"matchLabels": {"dtrain.dev/run": "gpt-small-k3f9"}}}]
    assert policy["spec"]["podSelector"] == me[0]["podSelector"]
    assert (policy["spec"]["ingress"], policy["spec"]["egress"]) == ([{"from": me}], [{"to": me}])
    assert len(sent(network={"isolate": False})) == 1


# -- head and workers ------------------------------------------------------------------------------------------


def test_the_head_computes_nothing_and_each_node_is_one_pod_with_all_its_gpus():
    _, cluster, head, worker = parts(sent())
    start = cluster["headGroupSpec"]["rayStartParams"]
    assert (start["num-cpus"], start["num-gpus"]) == ("0", "0")
    assert head["containers"][0]["resources"]["requests"] == {"cpu": "2", "memory": "8Gi"}
    group = group_of(cluster)
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas", "numOfHosts")] == [2, 2, 2, 1]
    assert (group["rayStartParams"]["num-cpus"], group["rayStartParams"]["num-gpus"]) == ("96", "8")
    amounts = {"cpu": "96", "memory": "800Gi", "nvidia.com/gpu": 8}
    assert worker["containers"][0]["resources"] == {"requests": amounts, "limits": amounts}
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "400Gi"}} in worker["volumes"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in worker["containers"][0]["volumeMounts"]


def test_what_ray_is_told_of_a_pod_is_what_the_plan_reserves():
    plan = a_plan(workers_per_node=2)
    submission = kuberay.render(plan, "gpt_small-k3f9")
    group = group_of(submission.objects[0]["spec"]["rayClusterSpec"])
    told = {key: float(group["rayStartParams"][f"num-{key.lower()}s"]) for key in ("CPU", "GPU")}
    assert told == submission.resources == plan.workers.resources == {"CPU": 24.0, "GPU": 2.0}
    asked = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert asked == {"cpu": "24", "memory": "200Gi", "nvidia.com/gpu": 2}  # the same share of each


def test_a_node_without_gpus_is_not_asked_for_any():
    _, cluster, _, worker = parts(
        sent(machine={"cores": 4, "memory_gib": 7.5}, worker={"shm_gib": 2, "object_store_gib": 0.25})
    )
    assert group_of(cluster)["groupName"] == "cpu"
    assert worker["containers"][0]["resources"]["requests"] == {"cpu": "4", "memory": "7680Mi"}
    assert group_of(cluster)["rayStartParams"]["object-store-memory"] == str(2**28)


def test_pods_are_never_root_and_can_do_and_write_nothing_but_their_own():
    for options in ({}, {"network": {"lock_memory": True}}, {"security": {"read_only_root": False, "user": 7}}):
        _, _, head, worker = parts(sent(**options))
        for pod, added in ((head, []), (worker, ["IPC_LOCK"] if "network" in options else [])):
            security = pod["containers"][0]["securityContext"]
            assert (pod["securityContext"]["runAsNonRoot"], security["allowPrivilegeEscalation"]) == (True, False)
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert (security["capabilities"]["drop"], security["capabilities"].get("add", [])) == (["ALL"], added)
            assert security["readOnlyRootFilesystem"] is ("security" not in options)
            assert pod["securityContext"]["runAsUser"] == (7 if "security" in options else 1000)
            assert pod["automountServiceAccountToken"] is False
            assert not {"hostIPC", "hostPID", "hostNetwork"} & set(pod)


def test_workers_put_their_state_aside_before_their_node_goes_and_within_the_time_there_is():
    for grace_s, patience_s in ((120, "100"), (15, "12"), (1, "1")):
        _, _, head, worker = parts(sent(termination_grace_s=grace_s))
        command = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["python", "-m", "dtrain.runtime.preempted", "--within", patience_s]
        assert worker["terminationGracePeriodSeconds"] == grace_s
        assert "lifecycle" not in head["containers"][0]


def test_where_pods_may_be():
    _, cluster, head, worker = parts(
        sent(
            head={"node_selector": {"pool": "ordinary"}, "cores": 0.5, "memory_gib": 1.5},
            worker={
                "node_selector": {"pool": "spot"},
                "tolerations": [{"key": "spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}],
                "spot": True,
                "near": "rack",
                "spread": "require",
                "runtime_class": "nvidia",
                "scratch_gib": 50,
            },
            priority_class="high",
            termination_grace_s=25,
        )
    )
    assert (head["nodeSelector"], worker["nodeSelector"]) == ({"pool": "ordinary"}, {"pool": "spot"})
    assert worker["tolerations"] == [{"key": "spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    assert "tolerations" not in head
    assert group_of(cluster)["labels"] == {"ray.io/market-type": "spot"}
    assert (worker["runtimeClassName"], "runtimeClassName" in head) == ("nvidia", False)
    for pod in (head, worker):
        assert (pod["priorityClassName"], pod["terminationGracePeriodSeconds"]) == ("high", 25)
    own = {"matchLabels": {"dtrain.dev/run": "gpt-small-k3f9", "ray.io/node-type": "worker"}}
    (near,) = worker["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert near["podAffinityTerm"] == {"topologyKey": "rack", "labelSelector": own}
    (apart,) = worker["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert apart == {"topologyKey": "kubernetes.io/hostname", "labelSelector": own}
    resources = worker["containers"][0]["resources"]
    assert resources["requests"]["ephemeral-storage"] == "50Gi"
    assert "ephemeral-storage" not in resources["limits"]


def test_workers_are_spread_over_nodes_where_that_can_be_and_a_single_one_is_not():
    _, _, _, worker = parts(sent())
    (constraint,) = worker["topologySpreadConstraints"]
    assert (constraint["topologyKey"], constraint["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    assert "topologySpreadConstraints" not in parts(sent(worker={"spread": "any"}))[3]
    alone = parts(sent(cluster={"nodes": 1}, worker={"near": "rack", "spread": "require"}))[3]
    assert not {"affinity", "topologySpreadConstraints"} & set(alone)


def test_the_fabric_is_asked_for_by_runs_that_need_it():
    network = {"resources": {"vpc.amazonaws.com/efa": 32, "hugepages-2Mi": "5120Mi"}, "env": {"FI_PROVIDER": "efa"}}
    asked = parts(sent(network=network))[3]["containers"][0]
    assert asked["resources"]["requests"]["vpc.amazonaws.com/efa"] == 32
    assert asked["resources"]["limits"]["hugepages-2Mi"] == "5120Mi"
    assert {"name": "FI_PROVIDER", "value": "efa"} in asked["env"]
    alone = parts(sent(network=network, cluster={"nodes": 1}))[3]["containers"][0]
    assert "vpc.amazonaws.com/efa" not in alone["resources"]["requests"]


def test_what_pods_see():
    _, _, head, worker = parts(
        sent(
            env={"HTTPS_PROXY": "http://proxy:3128", "HOME": "/mnt/home"},
            env_from=["storage"],
            image_pull_secrets=["registry"],
            service_account="runs",
            image_pull_policy="Always",
            volumes=[
                {"mount": "/mnt/runs", "claim": "runs"},
                {"mount": "/data", "host_path": "/data", "read_only": True},
                {"mount": "/etc/aws", "secret": "aws"},
            ],
        )
    )
    for pod in (head, worker):
        (container,) = pod["containers"]
        env = {variable["name"]: variable["value"] for variable in container["env"]}
        assert (env["HTTPS_PROXY"], env["HOME"]) == ("http://proxy:3128", "/mnt/home")
        assert container["envFrom"] == [{"secretRef": {"name": "storage"}}]
        assert (pod["imagePullSecrets"], container["imagePullPolicy"]) == ([{"name": "registry"}], "Always")
        assert pod["serviceAccountName"] == "runs"
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        sources = {volume["name"]: volume for volume in pod["volumes"]}
        assert sources[mounts["/mnt/runs"]["name"]]["persistentVolumeClaim"] == {"claimName": "runs", "readOnly": False}
        assert sources[mounts["/data"]["name"]]["hostPath"] == {"path": "/data", "type": "Directory"}
        assert sources[mounts["/etc/aws"]["name"]]["secret"] == {"secretName": "aws"}
        assert ["readOnly" in mounts[path] for path in ("/mnt/runs", "/data", "/etc/aws")] == [False, True, True]


def test_an_overlay_says_what_no_option_does():
    overlay = {
        "dnsPolicy": "Default",
        "containers": [{"name": "ray-worker", "env": [{"name": "HOME", "value": "/x"}, {"name": "NEW", "value": "1"}]},
                       {"name": "daemon", "image": "daemon:1"}],
        "tolerations": [{"key": "more", "operator": "Exists"}],
    }  # fmt: skip
    worker = {"overlay": overlay, "tolerations": [{"key": "first"}]}
    pod = parts(sent(worker=worker))[3]
    assert pod["dnsPolicy"] == "Default"
    ray, daemon = pod["containers"]
    env = {variable["name"]: variable["value"] for variable in ray["env"]}
    assert (env["HOME"], env["NEW"], ray["image"], daemon["image"]) == ("/x", "1", "dtrain:1", "daemon:1")
    assert [taint["key"] for taint in pod["tolerations"]] == ["first", "more"]


# -- queues, gangs, scaling, Redis -----------------------------------------------------------------------------


def test_with_kueue_a_run_is_created_suspended():
    job, _ = sent(queue={"name": "team-a", "priority_class": "urgent"})
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "urgent"


@pytest.mark.parametrize(
    ("gang", "labels"),
    [
        (
            {"scheduler": "volcano", "queue": "q"},
            {"ray.io/scheduler-name": "volcano", "volcano.sh/queue-name": "q", "ray.io/priority-class-name": "high"},
        ),
        (
            {"scheduler": "yunikorn", "queue": "root.q"},
            {
                "ray.io/gang-scheduling-enabled": "true",
                "yunikorn.apache.org/queue": "root.q",
                "yunikorn.apache.org/app-id": "gpt-small-k3f9",
            },
        ),
    ],
    ids=["volcano", "yunikorn"],
)
def test_a_gang_scheduler_finds_its_labels(gang, labels):
    job, _ = sent(gang=gang, priority_class="high")
    assert job["metadata"]["labels"].items() >= labels.items()
    assert "suspend" not in job["spec"]


def test_nodes_come_and_go_where_autoscaling_is_asked_for():
    scaling = {"min_nodes": 1, "max_nodes": 8, "idle_timeout_s": 60, "service_account": "scaler"}
    _, cluster, head, worker = parts(sent(autoscaling=scaling, service_account="runs"))
    assert cluster["enableInTreeAutoscaling"] is True
    assert (cluster["autoscalerOptions"]["version"], cluster["autoscalerOptions"]["idleTimeoutSeconds"]) == ("v2", 60)
    assert cluster["autoscalerOptions"]["securityContext"]["allowPrivilegeEscalation"] is False
    group = group_of(cluster)
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [2, 1, 8]
    assert (head["serviceAccountName"], head["automountServiceAccountToken"]) == ("scaler", True)
    assert (worker["serviceAccountName"], worker["automountServiceAccountToken"]) == ("runs", False)
    assert cluster["headGroupSpec"]["template"]["metadata"]["labels"]["dtrain.dev/api-access"] == "true"
    assert "dtrain.dev/api-access" not in group["template"]["metadata"]["labels"]
    small = group_of(sent(autoscaling={"max_nodes": 1})[0]["spec"]["rayClusterSpec"])
    assert [small[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [2, 0, 2]  # never fewer than it needs


def test_the_head_remembers_in_redis_and_a_token_of_ones_own_is_used():
    redis = {"redis_address": "redis://redis.there.svc:6379", "password_secret": "redis"}
    cluster = sent(gcs_fault_tolerance=redis, auth={"secret": "mine"})[0]["spec"]["rayClusterSpec"]
    assert cluster["gcsFaultToleranceOptions"] == {
        "redisAddress": "redis://redis.there.svc:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}},
    }
    assert cluster["authOptions"] == {"mode": "token", "secretName": "mine"}
    assert sent(auth={"mode": "disabled"})[0]["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "disabled"}


def test_on_a_cluster_that_stands_a_run_is_the_job_alone():
    (job,) = sent(standing={"name": "shared", "nodes": 3})
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": "shared"}
    assert not {"rayClusterSpec", "jobId", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"} & set(job["spec"])
    assert job["spec"]["preRunningDeadlineSeconds"] == 1800


def test_the_cluster_that_stands_has_whole_nodes_and_belongs_to_no_run():
    options = a_cluster(
        backend={"standing": {"name": "shared", "nodes": 3}, "network": {"resources": {"rdma/ib": 1}}}
    ).backend
    objects = render.cluster_objects(options)
    if crd_schema.CRDS.is_dir():
        assert [mistake for thing in objects for mistake in crd_schema.refused(thing)] == []
    cluster, policy = objects
    assert (cluster["kind"], cluster["metadata"]["name"]) == ("RayCluster", "shared")
    group = group_of(cluster["spec"])
    assert (group["replicas"], group["rayStartParams"]["num-gpus"]) == (3, "8")
    assert group["template"]["spec"]["containers"][0]["resources"]["requests"]["rdma/ib"] == 1
    for thing in (cluster, policy, group["template"]):
        assert thing["metadata"]["labels"]["dtrain.dev/cluster"] == "shared"
        assert "dtrain.dev/run" not in thing["metadata"]["labels"]
    assert policy["spec"]["podSelector"] == {"matchLabels": {"dtrain.dev/cluster": "shared"}}


# -- the text --------------------------------------------------------------------------------------------------


def test_what_is_shown_is_what_is_sent():
    submission = kuberay.render(a_plan(), "gpt_small-k3f9")
    assert tuple(yaml.safe_load_all(submission.text())) == submission.objects
    assert not any(mark in submission.text() for mark in ("&id", "*id"))  # every object whole, for people to read


def test_two_renders_are_the_same_bytes_and_open_nothing():
    """In processes whose hashes differ, without a connection and without what one would be made with."""
    code = (
        "import os, sys; from pathlib import Path; from dtrain.backends import kuberay\n"
        "from dtrain.planning import make_plan; from dtrain.spec.load import load_cluster, load_job\n"
        "sys.addaudithook(lambda event, _: event.startswith('socket.') and os._exit(9))\n"
        "plan = make_plan(load_job('jobs/gpt_7b_zero3.yaml'), load_cluster('clusters/eks_p5.yaml'))\n"
        "print(kuberay.render(plan, Path('gpt_7b_zero3-k3f9')).text())\n"
        "print(sorted({'kubernetes', 'ray', 'torch', 'fsspec'} & set(sys.modules)), file=sys.stderr)\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "KUBECONFIG": "/nowhere"},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout
    assert "kind: RayJob" in runs[0].stdout
    assert [run.stderr for run in runs] == ["[]\n", "[]\n"]
