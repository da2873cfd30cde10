"""What is seen of a run: against 34 jobs that were recorded from a real operator, and the words of real schedulers."""

import pytest
import replay
from replay import Step

from dtrain.kubernetes import sight, why
from dtrain.sight import Sight

INVALID = ("ended", True, False)
GOOD, BAD = ("ended", True, True), ("ended", True, False)
GOING = ("ended", False, None)
ENDS = {
    "and1": GOOD, "http1": GOOD, "inter1": GOOD, "ok1": GOOD, "quote-httpmode": GOOD, "quote-k8sjobmode": GOOD,
    "side1": GOOD, "train1": GOOD,
    "retry1": BAD, "sel-http": BAD, "stuck-noimage": BAD, "stuck-unsched": BAD,
    "bad-backoff": INVALID, "bad-interactive-backoff": INVALID, "bad-minmax": INVALID, "bad-nocluster": INVALID,
    "bad-nocontainers": INVALID, "bad-runtimeenv": INVALID, "bad-sidecar-selector": INVALID,
    "bad-suspend-noshutdown": INVALID, "bad-ttl": INVALID, "valfix": INVALID,
    "bad-name-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx": INVALID,
    "bad-mode": ("starting", False, None), "bad-noentrypoint": ("starting", False, None),
    "bad-dupgroup": ("starting", False, None), "fail1": ("starting", False, None),
    "stuck-imagepull": ("pulling", False, None),
    "rec1": ("queued", False, None), "stuck-gpu-suspended": ("queued", False, None),
    "sus1": ("starting", False, None), "sus2": ("running", False, None),
    "sel-del": ("running", False, None), "headkill": ("running", False, None),
}  # fmt: skip
"""Phase, is it over, did it succeed: as each job was last seen before it was deleted."""


def story(job: str) -> list[Sight]:
    """What is seen after each change, until the job's object is deleted."""
    objects: dict[tuple[str, str], dict] = {}
    told = []
    for step in replay.steps(job):
        if (step.kind, step.type) == ("RayJob", "DELETED"):
            break
        if step.kind == "RayJob" and step.object["metadata"].get("deletionTimestamp"):
            break
        if step.type == "DELETED":
            objects.pop((step.kind, step.name), None)
        else:
            objects[step.kind, step.name] = step.object
        if ("RayJob", job) in objects:
            told.append(_seen(objects, job))
    return told


def _seen(objects: dict, job: str) -> Sight:
    made = objects["RayJob", job]
    name = (made.get("status") or {}).get("rayClusterName")
    pods = [o for (kind, _), o in objects.items() if kind == "Pod" and _cluster(o) == name]
    events = [o for (kind, _), o in objects.items() if kind == "Event"]
    return sight.see(made, objects.get(("RayCluster", name)), pods, events, now=0.0)


def _cluster(pod: dict) -> str | None:
    return (pod["metadata"].get("labels") or {}).get("ray.io/cluster")


def _phases(told: list[Sight]) -> list[str]:
    return [seen.phase for number, seen in enumerate(told) if number == 0 or told[number - 1].phase != seen.phase]


@pytest.mark.parametrize("job", sorted(ENDS))
def test_every_recorded_job_ends_as_it_did(recordings, job):
    last = story(job)[-1]
    assert (last.phase, last.is_over, last.succeeded) == ENDS[job], last
    assert (last.why != "") == (last.phase != "running" and last.succeeded is not True), last


def test_all_that_was_recorded_is_looked_at(recordings):
    assert set(replay.recorded()) == set(ENDS)


def test_nothing_is_over_before_the_operator_says_so(recordings):
    """A job's own SUCCEEDED comes up to 26 seconds before its end."""
    early = 0
    for job in ENDS:
        steps = [s for s in replay.steps(job) if s.kind == "RayJob" and s.type != "DELETED"]
        for step in steps:
            seen = sight.see(step.object, now=0.0)
            assert seen.is_over == (step.stage[1] in sight.DONE), (job, step.stage)
            early += step.stage == ("SUCCEEDED", "Running")
    assert early >= 5


def test_a_good_run(recordings):
    assert _phases(story("http1")) == ["queued", "starting", "running", "ended"]


def test_a_lost_head_is_seen_although_ray_calls_itself_ready(recordings):
    told = story("headkill")
    phases = _phases(told)
    lost = phases.index("recovering")
    assert phases[:lost] == ["queued", "starting", "running", "checkpointing"]
    assert "running" in phases[lost:]
    assert any("Ray's head is lost (Head Pod not found)" in seen.why for seen in told)


def test_a_job_that_is_retried_is_not_over_in_between(recordings):
    told = story("retry1")
    assert "recovering" in _phases(told)
    assert [seen.is_over for seen in told].index(True) == len(told) - 1 or told[-1].is_over
    assert told[-1].why.startswith("its driver failed: Job entrypoint command failed with exit code 3")


def test_no_node_fits(recordings):
    [text] = {seen.why for seen in story("stuck-unsched") if seen.phase == "queued" and "no node" in seen.why}
    assert text.startswith(
        "no node fits the head's pod stuck-unsched-4bhbg-head-pqpdw: of 1 node 1 have too little cpu"
    )
    assert text.endswith("`dtrain cluster doctor` lays what is asked for beside the nodes there are")


def test_an_image_that_cannot_be_pulled(recordings):
    text = story("stuck-imagepull")[-1].why
    assert "cannot pull localhost/no-such:1: Head" in text
    assert "(and 1 more like it); check backend.image and backend.image_pull_secrets" in text


PREEMPTION = "0/3 nodes are available: 3 Preemption is not helpful for scheduling."
WORDS = {
    "3 Insufficient nvidia.com/gpu, 8 node(s) didn't match Pod's node affinity/selector. preemption: " + PREEMPTION: (
        "3 have too little nvidia.com/gpu free, 8 lack the labels of node_selector"
    ),
    "3 node(s) had untolerated taint {nvidia.com/gpu: present}. no new claims to deallocate, preemption: "
    + PREEMPTION: ("3 have the taint nvidia.com/gpu that is not tolerated"),
    "1 Too many pods, 1 node(s) were unschedulable.": "1 have as many pods as they may, 1 take no new pods",
}


@pytest.mark.parametrize("theirs", sorted(WORDS))
def test_words_of_schedulers(theirs):
    assert why.scheduler(f"0/12 nodes are available: {theirs}") == f"of 12 nodes {WORDS[theirs]}"


def test_words_of_schedulers_that_nobody_foresaw():
    assert why.scheduler("no nodes available to schedule pods") == "no nodes available to schedule pods"


FORBIDDEN = {
    "exceeded quota: team, requested: requests.nvidia.com/gpu=8, used: requests.nvidia.com/gpu=8, limited:"
    " requests.nvidia.com/gpu=8": "quota team of the namespace is used up: asked for requests.nvidia.com/gpu=8, in use",
    'violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false': (
        'the namespace does not admit its pods: violates PodSecurity "restricted:latest"'
    ),
    'error looking up service account dtrain/trainer: serviceaccount "trainer" not found': (
        "service account trainer is not in the namespace"
    ),
    "no PriorityClass with name dtrain-high was found": "there is no PriorityClass dtrain-high",
    "something new": "its pods cannot be made: Failed to create head Pod dtrain/x-1-head",
}


@pytest.mark.parametrize("where", ["condition", "event"])
@pytest.mark.parametrize("theirs", sorted(FORBIDDEN))
def test_pods_that_cannot_be_made(theirs, where):
    """The operator makes none, and says so in a condition of the Ray cluster and in an event about it."""
    job = {"metadata": {"name": "x"}, "status": {"jobDeploymentStatus": "Initializing", "rayClusterName": "x-1"}}
    message = f'Failed to create head Pod dtrain/x-1-head, pods "x" is forbidden: {theirs}'
    failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreateHeadPod", "message": message}
    status = {"desiredWorkerReplicas": 1, "conditions": [failure] if where == "condition" else []}
    cluster = {"kind": "RayCluster", "metadata": {"name": "x-1", "uid": "u"}, "status": status}
    event = {
        "metadata": {"creationTimestamp": "2026-11-21T10:00:00Z"},
        "involvedObject": {"kind": "RayCluster", "name": "x-1", "uid": "u"},
        "reason": "FailedToCreateHeadPod",
        "message": message,
    }
    seen = sight.see(job, cluster, [], [event] if where == "event" else [])
    assert (seen.phase, seen.is_over) == ("queued", False)
    assert seen.why.startswith(FORBIDDEN[theirs])
    assert "; " in seen.why  # the next move


def test_what_was_said_of_another_cluster_of_the_same_run():
    job = {"metadata": {"name": "x"}, "status": {"jobDeploymentStatus": "Initializing", "rayClusterName": "x-2"}}
    cluster = {"kind": "RayCluster", "metadata": {"name": "x-2", "uid": "new"}, "status": {}}
    event = {"metadata": {}, "involvedObject": {"kind": "RayCluster", "uid": "old"}, "reason": "FailedToCreateHeadPod"}
    assert sight.see(job, cluster, [], [event]).why == "its pods are being made"


def _pod(status: dict, kind: str = "worker") -> dict:
    labels = {"ray.io/node-type": kind}
    return {"kind": "Pod", "metadata": {"name": "p", "uid": "u", "labels": labels}, "status": status}


@pytest.mark.parametrize(
    ("container", "phase", "text"),
    [
        ({"state": {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "keys" not found'}}},
         "starting", 'worker pod p does not start: secret "keys" not found'),
        ({"state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}},
          "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}},
         "starting", "worker pod p does not start: it was killed for using more memory than it may"),
        ({"state": {"terminated": {"exitCode": 3}}}, "recovering", "worker pod p has ended: exit code 3"),
        ({"state": {"waiting": {"reason": "ErrImageNeverPull", "message": "Container image is not present with pull"
                                " policy of Never"}}, "image": "dtrain:x"},
         "pulling", "worker pod p cannot pull dtrain:x: Container image is not present"),
    ],
)  # fmt: skip
def test_containers(container, phase, text):
    reason = why.of_pod(_pod({"phase": "Running", "containerStatuses": [{"name": "c", **container}]}))
    assert reason is not None
    assert (reason.phase, reason.text[: len(text)]) == (phase, text)


def test_a_volume_that_is_not_there_and_an_image_on_its_way():
    waiting = {"containerStatuses": [{"name": "c", "state": {"waiting": {"reason": "ContainerCreating"}}}]}
    event = {"metadata": {}, "involvedObject": {"uid": "u"}, "lastTimestamp": "2026-11-21T10:00:00Z"}
    mount = {**event, "reason": "FailedMount", "message": 'MountVolume.SetUp failed for volume "data": not found'}
    assert why.of_pod(_pod(waiting), [mount]).text.startswith("worker pod p cannot be set up: MountVolume.SetUp failed")
    pulling = {**event, "reason": "Pulling", "message": 'Pulling image "dtrain:x"'}
    assert why.of_pod(_pod(waiting), [pulling]).phase == "pulling"
    assert why.of_pod(_pod(waiting), []).phase == "starting"
    other = {**mount, "involvedObject": {"uid": "another"}}
    assert why.of_pod(_pod(waiting), [other]).text == "worker pod p is being set up on its node"


def test_a_node_that_is_being_added():
    gone = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."}  # fmt: skip
    about = {"metadata": {}, "involvedObject": {"uid": "u"}, "lastTimestamp": "2026-11-21T10:00:00Z"}
    grows = {**about, "reason": "TriggeredScaleUp", "message": "pod triggered scale-up: [{h100-pool 0->1 (max: 4)}]"}
    stays = {
        **about,
        "reason": "NotTriggerScaleUp",
        "message": "pod didn't trigger scale-up: 1 max node group size reached",
    }
    assert (
        "a node is being added (pod triggered scale-up: [{h100-pool"
        in why.of_pod(_pod({"conditions": [gone]}), [grows]).text
    )
    refused = why.of_pod(_pod({"conditions": [gone]}), [stays])
    assert "none will be added (pod didn't trigger scale-up: 1 max node group size reached)" in refused.text
    assert refused.weight > why.of_pod(_pod({"conditions": [gone]}), [grows]).weight


@pytest.mark.parametrize(("minute", "phrase"), [("05", "none will be added"), ("15", "a node is being added")])
def test_a_node_that_was_to_be_added_and_never_came(minute, phrase):
    """Machines of the kind had run out: what the autoscaler said last counts, however often it said it before."""
    message = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
    pod = _pod({"conditions": [{"type": "PodScheduled", "status": "False", "message": message}]})
    said = (
        ("TriggeredScaleUp", "00", "pod triggered scale-up: [{h100-pool 0->1 (max: 4)}]"),
        ("NotTriggerScaleUp", "10", "pod didn't trigger scale-up: 1 in backoff after failed scale-up"),
        ("TriggeredScaleUp", minute, "pod triggered scale-up: [{h100-pool 0->1 (max: 4)}]"),
    )
    events = [
        {
            "metadata": {},
            "involvedObject": {"uid": "u"},
            "lastTimestamp": f"2026-11-21T10:{at}:00Z",
            "reason": reason,
            "message": text,
        }
        for reason, at, text in said
    ]
    assert phrase in why.of_pod(pod, events).text


def test_a_queue_that_holds_a_run_back():
    job = {
        "metadata": {"name": "x", "labels": {sight.QUEUE: "team"}},
        "spec": {"suspend": True},
        "status": {"jobDeploymentStatus": "Suspended"},
    }
    assert sight.see(job).why == "it waits for queue team to admit it"
    message = (
        "couldn't assign flavors to pod set gpu: insufficient unused quota for nvidia.com/gpu in flavor h100, 8 more"
    )
    workload = {"status": {"conditions": [{"type": "QuotaReserved", "status": "False", "message": message}]}}
    assert sight.see(job, workload=workload).why == f"queue team has not admitted it: {message}"


def test_an_operator_that_is_not_there():
    job = {"metadata": {"name": "x", "creationTimestamp": "2026-11-21T10:00:00Z"}, "spec": {}}
    early, late = (sight.see(job, now=1795255200.0 + seconds) for seconds in (1, 60))
    assert "has not taken it up" not in early.why
    assert "the KubeRay operator has not taken it up" in late.why


def test_steps_are_those_of_one_job(recordings):
    assert {step.name for step in replay.steps("sus2") if step.kind == "RayJob"} == {"sus2"}
    assert isinstance(replay.steps("http1")[0], Step)
