"""Hand over, look, end: against a server that loses answers, refuses and forgets; nothing is left behind."""

import threading
import time
from pathlib import Path

import pytest
import replay
from api_server import ApiServer
from msgspec.structs import replace
from submitting import operator, some_options, submission

from dtrain.backends import kuberay
from dtrain.errors import ClusterError
from dtrain.kubernetes import names, verbs

RUN = "gpt_small-k3f9"
NAME = "gpt-small-k3f9"
JOBS = r"/rayjobs$"


def said() -> tuple[list[str], verbs.Say]:
    told: list[str] = []
    return told, told.append


def everything(api: ApiServer) -> list[str]:
    return [f"{kind} {made['metadata']['name']}" for kind in verbs.KINDS for made in api.list(kind)]


# -- send --------------------------------------------------------------------------------------------------------


def test_what_is_rendered_is_what_arrives(api: ApiServer, options: kuberay.Options) -> None:
    sent = submission()
    told, say = said()
    with operator(api):
        kuberay.send(sent, options, say)
        job = api.get("RayJob", NAME)
        for made in sent.objects:
            kept = api.get(made["kind"], NAME)
            assert kept["metadata"]["labels"] == made["metadata"]["labels"]
            assert kept["metadata"].get("annotations") == made["metadata"].get("annotations")
            assert kept["spec"].items() >= made["spec"].items() if made["kind"] != "RayJob" else True
        others = [api.get(made["kind"], NAME) for made in sent.objects[1:]]
        assert others
        assert {other["metadata"]["ownerReferences"][0]["uid"] for other in others} == {job["metadata"]["uid"]}
        assert {r.query["fieldValidation"] for r in api.requests if r.method == "POST"} == {"Strict"}
        assert told == []
        assert kuberay.end(RUN, options)
        assert everything(api) == []
        assert not kuberay.end(RUN, options)  # a second stop is fine


@pytest.mark.parametrize("cut", ["before", "middle", "after"])
def test_a_lost_answer_makes_no_second_run(api: ApiServer, options: kuberay.Options, cut: str) -> None:
    with operator(api):
        api.fail(method="POST", cut=cut, times=2)
        kuberay.send(submission(), options, print)
    assert everything(api) == [f"RayJob {NAME}", f"NetworkPolicy {NAME}"]
    assert api.get("RayJob", NAME)["metadata"]["generation"] == 1


def test_a_lost_answer_of_a_run_that_is_over_already(api: ApiServer, options: kuberay.Options) -> None:
    """However fast it ran: what was made a moment ago is not an earlier attempt."""
    api.fail(JOBS, method="POST", cut="after")
    with operator(api, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}):
        kuberay.send(submission(), options, print)
    assert sum(r.method == "DELETE" for r in api.requests) == 0


def test_sending_twice_is_sending_once(api: ApiServer, options: kuberay.Options) -> None:
    with operator(api):
        kuberay.send(submission(), options, print)
        uid = api.get("RayJob", NAME)["metadata"]["uid"]
        kuberay.send(submission(), options, print)
    assert api.get("RayJob", NAME)["metadata"]["uid"] == uid


@pytest.mark.parametrize("is_going", [False, True], ids=["ended", "being deleted"])
def test_a_resumed_run_replaces_what_is_left_of_it(api: ApiServer, options: kuberay.Options, is_going: bool) -> None:
    told, say = said()
    with operator(api):
        kuberay.send(submission(), options, print)
        first = api.set_status("RayJob", NAME, {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"})
    if is_going:
        api.remove("RayJob", NAME)
    with operator(api, once=lambda: bool(told)):
        kuberay.send(submission(), options, say)
    kept = api.get("RayJob", NAME)
    assert kept["metadata"]["uid"] != first["metadata"]["uid"]
    assert api.get("NetworkPolicy", NAME)["metadata"]["ownerReferences"][0]["uid"] == kept["metadata"]["uid"]
    assert told == ["taking what is left of an earlier attempt off the cluster"]


@pytest.mark.parametrize(
    ("marks", "whose"),
    [
        ({}, "somebody else"),
        ({names.RUN_ID: "gpt-small_k3f9", names.STORAGE: "s3://x"}, "run gpt-small_k3f9 in s3://x"),
    ],
)
def test_a_name_that_is_taken(api: ApiServer, options: kuberay.Options, marks: dict, whose: str) -> None:
    theirs = {"kind": "RayJob", "metadata": {"name": NAME, "namespace": "dtrain", "annotations": marks}, "spec": {}}
    api.put(theirs)
    with pytest.raises(ClusterError) as error:
        kuberay.send(submission(), options, print)
    assert f"namespace dtrain has a RayJob {NAME} of {whose} already; give the job another name" in error.value.message
    assert everything(api) == [f"RayJob {NAME}"]


def test_a_run_that_is_under_way_with_another_plan(api: ApiServer, options: kuberay.Options) -> None:
    with operator(api):
        kuberay.send(submission(), options, print)
        api.patch("RayJob", NAME, {"metadata": {"annotations": {names.PLAN: "another"}}})
        with pytest.raises(ClusterError, match=f"run {RUN} is under way with another plan; `dtrain stop {RUN}`"):
            kuberay.send(submission(), options, print)


@pytest.mark.parametrize("trouble", ["none", "lost answer", "sent again", "left over"])
def test_somebody_who_may_not_read_what_is_there(
    api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """As a role may be that only lets people submit: no more is read than has to be, and no live run is ended."""
    monkeypatch.setattr(verbs, "COLLECTED_S", 0.05)
    rules = [(verb, "ray.io", "rayjobs") for verb in ("create", "get", "list", "watch", "delete")]
    path = _forbid(api, tmp_path, *rules, ("create", "networking.k8s.io", "networkpolicies"))
    options = some_options(kubeconfig=path)
    with operator(api):
        if trouble == "lost answer":
            api.fail("networkpolicies$", cut="after")
        if trouble == "left over":
            api.put({"kind": "NetworkPolicy", "metadata": {"name": NAME, "namespace": "dtrain"}})
            collector = threading.Thread(target=lambda: (time.sleep(0.5), api.remove("NetworkPolicy", NAME)))
            collector.start()
        kuberay.send(submission(), options, print)
        if trouble == "sent again":
            kuberay.send(submission(), options, print)
        if trouble == "left over":
            collector.join()
    assert everything(api) == [f"RayJob {NAME}", f"NetworkPolicy {NAME}"]
    assert api.get("NetworkPolicy", NAME)["metadata"]["ownerReferences"]


def test_a_run_that_was_there_before_outlives_a_failed_second_try(api: ApiServer, options: kuberay.Options) -> None:
    with operator(api):
        kuberay.send(submission(), options, print)
        api.remove("NetworkPolicy", NAME)
        api.fail("networkpolicies$", status=403, message="no more of these", times=9)
        with pytest.raises(ClusterError, match="no more of these"):
            kuberay.send(submission(), options, print)
    assert everything(api) == [f"RayJob {NAME}"]


def _forbid(api: ApiServer, path: Path, *rules: tuple[str, str, str]) -> str:
    token = api.user("limited", [("get", "ray.io", "rayjobs"), ("delete", "ray.io", "rayjobs"), *rules])
    return str(api.kubeconfig(path / "limited", token=token))


def test_what_may_not_be_created_leaves_nothing_behind(api: ApiServer, tmp_path: Path) -> None:
    path = _forbid(api, tmp_path, ("create", "ray.io", "rayjobs"))
    with pytest.raises(ClusterError) as error:
        kuberay.send(submission(), some_options(kubeconfig=path), print)
    assert error.value.message.endswith(
        "limited may not create networkpolicies (networking.k8s.io) in namespace dtrain; ask for a role with the rule"
        " {apiGroups: [networking.k8s.io], resources: [networkpolicies], verbs: [create]} (helm/dtrain has one)"
    )
    assert everything(api) == []


def test_no_right_to_create_runs(api: ApiServer, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"limited may not create rayjobs \(ray.io\) in namespace dtrain; ask for"):
        kuberay.send(submission(), some_options(kubeconfig=_forbid(api, tmp_path)), print)


def test_a_quota_that_is_used_up(api: ApiServer, options: kuberay.Options) -> None:
    quota = {"kind": "ResourceQuota", "metadata": {"name": "team", "namespace": "dtrain"}}
    api.put({**quota, "spec": {"hard": {"count/rayjobs.ray.io": "0"}}})
    with pytest.raises(ClusterError) as error:
        kuberay.send(submission(), options, print)
    key = "count/rayjobs.ray.io"
    assert error.value.message.endswith(
        f"quota team of the namespace is used up: asked for {key}=1, in use {key}=0, allowed {key}=0; end a run"
        " (`dtrain ps`, `dtrain stop RUN`), or ask for more"
    )
    assert everything(api) == []


def test_a_quota_that_others_change_meanwhile(api: ApiServer, options: kuberay.Options) -> None:
    """Of several who submit at once all but one are told to try again: nobody has their name."""
    message = 'Operation cannot be fulfilled on resourcequotas "team": the object has been modified'
    api.fail(JOBS, method="POST", status=409, reason="Conflict", message=message, times=3)
    api.fail("networkpolicies$", method="POST", status=409, reason="Conflict", message=message)
    kuberay.check(submission(), options)
    started, before = time.monotonic(), len(api.requests)
    api.fail(JOBS, method="POST", status=409, reason="Conflict", message=message, times=3)
    with operator(api):
        kuberay.send(submission(), options, print)
    assert everything(api) == [f"RayJob {NAME}", f"NetworkPolicy {NAME}"]
    assert time.monotonic() - started < 5
    assert sum(r.path.endswith("rayjobs") and r.method == "POST" for r in api.requests[before:]) == 4


def test_kuberay_is_not_installed(tmp_path: Path) -> None:
    with ApiServer(ray=False) as bare:
        options = some_options(kubeconfig=str(bare.kubeconfig(tmp_path / "bare")))
        for verb in (lambda: kuberay.send(submission(), options, print), lambda: kuberay.look(RUN, options)):
            with pytest.raises(
                ClusterError, match=r"KubeRay is not installed in this cluster.*helm install kuberay-op"
            ):
                verb()
        assert everything_but_rays(bare) == []


def everything_but_rays(api: ApiServer) -> list[dict]:
    return [made for kind in ("NetworkPolicy", "Secret", "ConfigMap", "Pod") for made in api.list(kind)]


def test_a_namespace_that_is_not_there(api: ApiServer, kubeconfig: Path) -> None:
    sent = submission(namespace="nowhere")
    with pytest.raises(ClusterError, match=r"no namespace nowhere; create it \(kubectl create namespace nowhere\)"):
        kuberay.send(sent, some_options(namespace="nowhere"), print)


def test_what_the_operator_finds_invalid_is_taken_back(api: ApiServer, options: kuberay.Options) -> None:
    message = "The RayJob spec is invalid: worker group w has minReplicas 3 greater than maxReplicas 1"
    started = time.monotonic()
    with (
        operator(api, {"jobDeploymentStatus": "ValidationFailed", "message": message}),
        pytest.raises(ClusterError, match="worker group w has minReplicas 3 greater than maxReplicas 1"),
    ):
        kuberay.send(submission(), options, print)
    assert time.monotonic() - started < 5
    assert everything(api) == []


def test_an_operator_that_says_nothing_is_not_waited_for(api: ApiServer, options: kuberay.Options) -> None:
    started = time.monotonic()
    kuberay.send(submission(), options, print)
    assert verbs.FIRST_WORD_S * 0.9 < time.monotonic() - started < verbs.FIRST_WORD_S + 3
    assert kuberay.look(RUN, options).phase == "queued"


# -- check -------------------------------------------------------------------------------------------------------


def test_a_trial_keeps_nothing(api: ApiServer, options: kuberay.Options) -> None:
    assert kuberay.check(submission(), options) == []
    assert everything(api) == []
    assert {r.query["dryRun"] for r in api.requests} == {"All"}


def test_a_trial_tells_what_is_refused(api: ApiServer, options: kuberay.Options, recordings: Path) -> None:
    sent = submission()
    job = {**sent.objects[0], "spec": {**sent.objects[0]["spec"], "preRunningDeadlineSeconds": 0}}
    with pytest.raises(ClusterError, match="preRunningDeadlineSeconds in body should be greater than or equal to 1"):
        kuberay.check(replace(sent, objects=(job, *sent.objects[1:])), options)


# -- look --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", ["http1", "headkill", "stuck-unsched", "stuck-imagepull", "retry1", "sel-http"])
def test_looking_while_it_happens(api: ApiServer, options: kuberay.Options, recordings: Path, job: str) -> None:
    """The same as with everything at hand, in a handful of requests."""
    phases, most = [], 0
    for step in replay.play(api, job, run_id=job):
        before = len(api.requests)
        if step.kind != "RayJob":
            continue
        seen = kuberay.look(job, options)
        most = max(most, len(api.requests) - before)
        phase = seen.phase if seen else None
        if not phases or phases[-1] != phase:
            phases.append(phase)
    assert most <= 7
    assert phases[-1] is None
    expected = {
        "http1": ["queued", "starting", "running", "ended", None],
        "stuck-unsched": ["queued", "starting", "queued", "ended", None],
    }
    assert phases == expected.get(job, phases)
    assert {"headkill": "recovering", "stuck-imagepull": "pulling"}.get(job, "starting") in phases


def test_runs_of_others_are_not_seen(api: ApiServer, options: kuberay.Options) -> None:
    api.put({"kind": "RayJob", "metadata": {"name": NAME, "namespace": "dtrain"}, "spec": {}})
    assert kuberay.look(RUN, options) is None
    assert not kuberay.end(RUN, options)
    assert api.get("RayJob", NAME) is not None


def test_looking_without_the_right_to_read_events(api: ApiServer, tmp_path: Path, recordings: Path) -> None:
    rules = [("get", "ray.io", "*"), ("list", "", "pods")]
    path = api.kubeconfig(tmp_path / "viewer", token=api.user("viewer", rules))

    def is_told(step: replay.Step) -> bool:
        return step.kind == "Pod" and "ImagePullBackOff" in str(step.object.get("status"))

    for _ in replay.play(api, "stuck-imagepull", is_told, "stuck-imagepull"):
        pass
    assert kuberay.look("stuck-imagepull", some_options(kubeconfig=str(path))).phase == "pulling"


def test_why_a_queue_holds_a_run_back(tmp_path: Path) -> None:
    with ApiServer(kueue=True) as api:
        options = some_options(kubeconfig=str(api.kubeconfig(tmp_path / "k")))
        labels = {**names.run_labels(RUN), "kueue.x-k8s.io/queue-name": "team"}
        metadata = {"name": NAME, "namespace": "dtrain", "labels": labels, "annotations": {names.RUN_ID: RUN}}
        job = api.put({"kind": "RayJob", "metadata": metadata, "spec": {"suspend": True}, "status": {}})
        assert kuberay.look(RUN, options).why == "it waits for queue team to admit it"
        message = "insufficient unused quota for nvidia.com/gpu in flavor h100, 8 more needed"
        status = {"conditions": [{"type": "QuotaReserved", "status": "False", "message": message}]}
        chosen = {"kueue.x-k8s.io/job-uid": job["metadata"]["uid"]}
        api.put(
            {"kind": "Workload", "metadata": {"name": "w", "namespace": "dtrain", "labels": chosen}, "status": status}
        )
        assert kuberay.look(RUN, options).why == f"queue team has not admitted it: {message}"


def test_a_thousand_runs(api: ApiServer, options: kuberay.Options) -> None:
    made = submission().objects[0]
    stages = ["Complete", "Failed", "Running", "Initializing"]
    for number in range(1000):
        marks = {**made["metadata"]["annotations"], names.RUN_ID: f"run_{number}"}
        metadata = {**made["metadata"], "name": f"run-{number}", "annotations": marks}
        status = {"jobDeploymentStatus": stages[number % 4], "rayClusterName": f"run-{number}-x"}
        status |= {"jobStatus": "SUCCEEDED"} if number % 4 == 0 else {}
        api.put({**made, "metadata": metadata, "status": status})
    started = time.monotonic()
    found = verbs.sights(options)
    assert time.monotonic() - started < 2.0
    assert len(api.requests) == 3  # two pages of runs, one of pods
    assert len(found) == 1000
    assert [found[f"run_{number}"].phase for number in range(4)] == ["ended", "ended", "starting", "starting"]
    assert [found[f"run_{number}"].succeeded for number in range(4)] == [True, False, None, None]


# -- end ---------------------------------------------------------------------------------------------------------


def test_the_end_is_waited_for(api: ApiServer, options: kuberay.Options) -> None:
    with operator(api):
        kuberay.send(submission(), options, print)
        labels = names.run_labels(RUN)
        pod = {"name": "p", "namespace": "dtrain", "labels": labels, "finalizers": ["kubelet"], "ownerReferences": []}
        pod["ownerReferences"] = [{"uid": api.get("RayJob", NAME)["metadata"]["uid"], "kind": "RayJob", "name": NAME}]
        api.put({"kind": "Pod", "metadata": pod})
        gone = []

        def kubelet(event: str, made: dict) -> None:
            if event == "MODIFIED" and "deletionTimestamp" in made["metadata"]:
                time.sleep(0.3)
                gone.append(time.monotonic())
                api.patch("Pod", "p", {"metadata": {"finalizers": []}})

        with api.listen("Pod", kubelet):
            assert kuberay.end(RUN, options)
            assert gone
            assert gone[0] <= time.monotonic()
    assert everything(api) == []


def test_what_does_not_go_away_is_told(
    api: ApiServer, options: kuberay.Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "GONE_S", 0.0)  # the clock limit, not behaviour
    with operator(api):
        kuberay.send(submission(), options, print)
    with pytest.raises(ClusterError) as error:
        kuberay.end(RUN, options)
    assert error.value.message.startswith(
        f"namespace dtrain: RayJob {NAME} is deleted and does not go away; ray.io/rayjob-finalizer holds it: check that"
        " the operator runs"
    )


def test_a_server_that_goes_away_in_the_middle(api: ApiServer, options: kuberay.Options) -> None:
    """Cut, throttled and watched through all of it: the verbs do what they say."""
    with operator(api):
        for _ in range(3):
            api.fail(cut="before", skip=1)
            api.fail(status=429, headers={"Retry-After": "0"}, skip=2)
            kuberay.send(submission(), options, print)
            api.drop_watches()
            api.compact()
            assert kuberay.look(RUN, options).phase == "starting"
            api.fail(cut="after", skip=1)
            assert kuberay.end(RUN, options)
            api.heal()
            assert everything(api) == []
