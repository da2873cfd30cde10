"""The client against a real HTTP server: what it repeats and for how long, what it reads, and when it gives up."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import kubernetes.config  # noqa: F401 -- here, so that no test is measured by what this takes
import pytest
from api_server import ApiServer

from dtrain.errors import ClusterError
from dtrain.kubernetes import client, kubeconfig
from dtrain.kubernetes.client import POD, RAY_JOB, Client, Kind
from dtrain.kubernetes.errors import Refused
from dtrain.kubernetes.watch import watch

CONFIG_MAP = client.KINDS["ConfigMap"]
PODS = r"/pods$"


@pytest.fixture
def mine(api: ApiServer, kubeconfig: Path) -> Iterator[Client]:
    with client.of(SimpleNamespace(kubeconfig=None, context=None)) as made:
        yield made


def a_pod(name: str, **labels: str) -> dict:
    return {"kind": "Pod", "metadata": {"name": name, "namespace": "dtrain", "labels": labels}, "spec": {}}


def test_objects(api: ApiServer, mine: Client) -> None:
    made = {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "x"}, "data": {"a": "b"}}
    assert mine.get(CONFIG_MAP, "dtrain", "x") is None
    mine.create(CONFIG_MAP, "dtrain", made, is_trial=True)
    assert mine.get(CONFIG_MAP, "dtrain", "x") is None
    kept = mine.create(CONFIG_MAP, "dtrain", made)
    assert kept["metadata"]["uid"] == mine.get(CONFIG_MAP, "dtrain", "x")["metadata"]["uid"]
    with pytest.raises(Refused, match='configmaps "x" already exists; choose another name') as refusal:
        mine.create(CONFIG_MAP, "dtrain", made)
    assert refusal.value.code == 409
    with pytest.raises(Refused, match="does not match the UID in record"):
        mine.delete(CONFIG_MAP, "dtrain", "x", uid="another")
    assert mine.delete(CONFIG_MAP, "dtrain", "x", uid=kept["metadata"]["uid"])
    assert not mine.delete(CONFIG_MAP, "dtrain", "x")


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_server_in_trouble_is_asked_again_when_it_says(api: ApiServer, mine: Client, status: int) -> None:
    api.fail(PODS, status=status, times=2, headers={"Retry-After": "0.3"})
    started = time.monotonic()
    assert mine.list(POD, "dtrain")[0] == []
    assert 0.6 <= time.monotonic() - started < 3.0
    assert mine.num_repeated == 2


def test_trouble_that_does_not_end_is_told_in_time(api: ApiServer, kubeconfig: Path) -> None:
    api.fail(PODS, status=503, times=10**6, message="etcd is gone")
    with Client(_access(), patience_s=1.0) as mine:
        started = time.monotonic()
        with pytest.raises(ClusterError, match=r"cannot answer at the moment \(503: etcd is gone\); try again"):
            mine.list(POD, "dtrain")
        assert time.monotonic() - started < 2.0
    assert 3 <= len(api.requests) <= 12


def test_a_server_that_asks_for_more_patience_than_there_is(api: ApiServer, kubeconfig: Path) -> None:
    api.fail(PODS, status=429, times=10**6, headers={"Retry-After": "3600"})
    with Client(_access(), patience_s=1.0) as mine, pytest.raises(ClusterError, match="429"):
        mine.list(POD, "dtrain")
    assert len(api.requests) == 1


@pytest.mark.parametrize("told", ["0", "-1", "nan", "Sat, 21 Nov 2026 10:00:00 GMT"])
def test_a_server_that_asks_for_no_patience_is_not_flooded(api: ApiServer, kubeconfig: Path, told: str) -> None:
    api.fail(PODS, status=429, times=10**6, headers={"Retry-After": told})
    with Client(_access(), patience_s=1.0) as mine, pytest.raises(ClusterError, match="429"):
        mine.list(POD, "dtrain")
    assert 3 <= len(api.requests) <= 12


def test_an_error_of_the_server_itself_is_repeated_little(api: ApiServer, mine: Client) -> None:
    api.fail(PODS, status=500, times=10**6, message='failed calling webhook "queue"')
    with pytest.raises(ClusterError, match="failed calling webhook"):
        mine.list(POD, "dtrain")
    assert len(api.requests) == client.REPEATED_500 + 1


@pytest.mark.parametrize("cut", ["before", "middle", "after"])
def test_a_connection_that_is_cut(api: ApiServer, mine: Client, cut: str) -> None:
    api.put(a_pod("x"))
    mine.ask("GET", "/version")  # so that it is an old connection
    api.fail(PODS, cut=cut, times=2)
    assert [pod["metadata"]["name"] for pod in mine.list(POD, "dtrain")[0]] == ["x"]


def test_an_answer_that_was_lost_shows_as_taken(api: ApiServer, mine: Client) -> None:
    api.fail("configmaps", cut="after")
    with pytest.raises(Refused, match="already exists"):
        mine.create(CONFIG_MAP, "dtrain", {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "x"}})
    assert mine.num_repeated == 1
    assert len(api.list("ConfigMap")) == 1


def test_pages(api: ApiServer, mine: Client) -> None:
    for number in range(client.PAGE + 10):
        api.put(a_pod(f"pod-{number:04d}", part="a" if number % 2 else "b"))
    found, version = mine.list(POD, "dtrain")
    assert [pod["metadata"]["name"] for pod in found] == [f"pod-{n:04d}" for n in range(client.PAGE + 10)]
    assert (len(api.requests), int(version)) == (2, api.store.version)
    assert len(mine.list(POD, "dtrain", "part=a")[0]) == client.PAGE / 2 + 5


def test_pages_that_are_forgotten_while_they_are_read(api: ApiServer, mine: Client) -> None:
    """A list is of one moment; where the server has forgotten it the list is begun again, and nothing comes twice."""
    for number in range(client.PAGE + 10):
        api.put(a_pod(f"pod-{number:04d}"))
    api.fail(PODS, status=410, reason="Expired", skip=1)
    found, _ = mine.list(POD, "dtrain")
    names = [pod["metadata"]["name"] for pod in found]
    assert len(names) == len(set(names)) == client.PAGE + 10
    assert len(api.requests) == 4


def test_forgotten_pages_are_not_read_for_ever(api: ApiServer, mine: Client) -> None:
    for number in range(client.PAGE + 1):
        api.put(a_pod(f"pod-{number:04d}"))
    api.fail(PODS, status=410, reason="Expired", times=10**6, skip=1)
    with pytest.raises(Refused) as refusal:
        mine.list(POD, "dtrain")
    assert refusal.value.code == 410
    assert len(api.requests) == 1 + client.TRIES_OF_A_LIST


# -- watches -----------------------------------------------------------------------------------------------------


def _told(seen: Iterator[dict], until: Callable[[dict], bool]) -> dict:
    with contextlib.closing(seen):  # type: ignore[type-var]
        for found in seen:
            if until(found):
                return found
    raise AssertionError("the watch is over")


def _watches(api: ApiServer) -> int:
    return sum(request.query.get("watch") == "1" for request in api.requests)


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("trouble", ["none", "dropped", "forgotten", "503", "list 410"])
def test_a_watch_goes_on(api: ApiServer, mine: Client, trouble: str) -> None:
    api.put(a_pod("old"))

    def act() -> None:
        _await(lambda: _watches(api) >= 1)
        if trouble == "503":
            api.fail(r"/pods$", status=503, times=1)
        if trouble == "list 410":
            api.fail(r"/pods$", status=410, reason="Expired", times=1)
        if trouble in ("dropped", "503", "list 410"):
            api.drop_watches()
            _await(lambda: _watches(api) >= 2)
        api.put(a_pod("new"))
        api.remove("Pod", "old")
        if trouble == "forgotten":
            api.compact()
            api.drop_watches()

    actor = threading.Thread(target=act)
    actor.start()
    try:
        found = _told(watch(mine, POD, "dtrain", timeout_s=10), lambda pods: set(pods) == {"new"})
    finally:
        actor.join()
    assert found["new"]["metadata"]["uid"] == api.get("Pod", "new")["metadata"]["uid"]


def test_a_watch_outlives_its_token(api: ApiServer, tmp_path: Path) -> None:
    token = api.user("me", [("list", "", "pods"), ("watch", "", "pods")])
    (tmp_path / "token").write_text(token)
    api.kubeconfig(tmp_path / "k", tokenFile="token")
    with Client(kubeconfig.find(str(tmp_path / "k"), None)) as mine:
        seen = watch(mine, POD, "dtrain", timeout_s=10)
        assert next(seen) == {}
        api.expire(token)
        (tmp_path / "token").write_text(api.user("me", [("list", "", "pods"), ("watch", "", "pods")]))
        api.drop_watches()
        api.put(a_pod("new"))
        assert set(_told(seen, bool)) == {"new"}


def test_a_watch_ends_in_time_and_leaves_no_connection(api: ApiServer, mine: Client) -> None:
    started = time.monotonic()
    assert list(watch(mine, POD, "dtrain", timeout_s=1.0)) == [{}]
    assert 0.9 < time.monotonic() - started < 3.0
    _await(lambda: not api.under_way)


@pytest.mark.parametrize("trouble", [{"cut": "before"}, {"status": 503, "message": "etcd is gone"}])
def test_a_watch_of_a_server_that_is_gone_says_so(api: ApiServer, kubeconfig: Path, trouble: dict) -> None:
    """It does not wait out its time, for what nobody can tell any more."""
    with Client(_access(), patience_s=1.0) as mine:
        seen = watch(mine, POD, "dtrain", timeout_s=60)
        assert next(seen) == {}
        api.fail(PODS, times=10**6, **trouble)
        started = time.monotonic()
        with pytest.raises(ClusterError, match=r"cannot be reached|503: etcd is gone"):
            next(seen)
        assert time.monotonic() - started < 10


def test_a_watch_that_is_given_up_is_closed(api: ApiServer, mine: Client) -> None:
    _told(watch(mine, POD, "dtrain", timeout_s=60), lambda _: True)
    api.put(a_pod("x"))
    _await(lambda: not api.under_way)


def test_a_watch_of_what_may_not_be_seen(api: ApiServer, tmp_path: Path) -> None:
    token = api.user("limited", [("list", "", "pods")])
    api.kubeconfig(tmp_path / "limited", token=token)
    with Client(kubeconfig.find(str(tmp_path / "limited"), None)) as limited:
        seen = watch(limited, POD, "dtrain", timeout_s=10)
        assert next(seen) == {}
        with pytest.raises(ClusterError, match="limited may not watch pods in namespace dtrain; ask for a role with"):
            next(seen)


def test_a_silent_server_is_not_waited_for(api: ApiServer, kubeconfig: Path) -> None:
    """A watch whose connection died without a word: its reader wakes up by itself."""
    api.fail(r"/pods$", delay_s=30, times=1, skip=1)
    with Client(_access()) as mine:
        started = time.monotonic()
        assert list(watch(mine, POD, "dtrain", timeout_s=1.0)) == [{}]
        assert time.monotonic() - started < 5.0


# -- what cannot be reached --------------------------------------------------------------------------------------


def _access() -> kubeconfig.Access:
    return kubeconfig.find(None, None)


def _config(path: Path, server: str) -> str:
    text = f"""
current-context: here
contexts: [{{name: here, context: {{cluster: c, user: u}}}}]
clusters: [{{name: c, cluster: {{server: "{server}"}}}}]
users: [{{name: u, user: {{token: t}}}}]
"""
    path.write_text(text)
    return str(path)


def test_nothing_listens(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    with (
        Client(kubeconfig.find(_config(tmp_path / "k", f"https://127.0.0.1:{port}"), None)) as mine,
        pytest.raises(ClusterError, match=rf"context here .*127.0.0.1:{port} cannot be reached: nothing answers"),
    ):
        mine.list(POD, "dtrain")
    assert time.monotonic() - started < 5.0


def test_a_name_that_nobody_knows(tmp_path: Path) -> None:
    with (
        Client(kubeconfig.find(_config(tmp_path / "k", "https://no-such-host.invalid"), None)) as mine,
        pytest.raises(ClusterError, match="its name is unknown here; check the network or VPN"),
    ):
        mine.list(POD, "dtrain")


def test_a_server_that_does_not_speak_tls(tmp_path: Path) -> None:
    with ApiServer(tls=False) as plain:
        path = _config(tmp_path / "k", plain.url.replace("http://", "https://"))
        with (
            Client(kubeconfig.find(path, None)) as mine,
            pytest.raises(ClusterError, match="speaks no TLS as expected"),
        ):
            mine.list(POD, "dtrain")


def test_a_certificate_that_is_not_trusted(api: ApiServer, tmp_path: Path) -> None:
    started = time.monotonic()
    with (
        Client(kubeconfig.find(_config(tmp_path / "k", api.url), None)) as mine,
        pytest.raises(ClusterError, match=r"shows a certificate that is not trusted .*; is this the right cluster\?"),
    ):
        mine.list(POD, "dtrain")
    assert time.monotonic() - started < 3.0
    assert api.requests == []


def test_no_token_goes_over_a_connection_that_others_can_read(tmp_path: Path) -> None:
    with ApiServer(tls=False) as plain:
        path = plain.kubeconfig(tmp_path / "k")
        with (
            Client(kubeconfig.find(str(path), None)) as mine,
            pytest.raises(ClusterError, match="was told of no credentials"),
        ):
            mine.list(POD, "dtrain")


# -- refusals, each with the next move ---------------------------------------------------------------------------


def test_what_is_forbidden_names_the_rule_to_ask_for(api: ApiServer, tmp_path: Path) -> None:
    api.kubeconfig(tmp_path / "limited", token=api.user("limited", [("get", "ray.io", "rayjobs")]))
    with Client(kubeconfig.find(str(tmp_path / "limited"), None)) as mine, pytest.raises(Refused) as refusal:
        mine.list(RAY_JOB, "dtrain")
    assert refusal.value.message.endswith(
        "limited may not list rayjobs (ray.io) in namespace dtrain; ask for a role with the rule"
        " {apiGroups: [ray.io], resources: [rayjobs], verbs: [list]} (helm/dtrain has one)"
    )


def test_what_is_not_installed(mine: Client) -> None:
    with pytest.raises(Refused, match="Kueue is not installed in this cluster, or in another version; install Kueue"):
        mine.list(Kind("LocalQueue", "localqueues", "kueue.x-k8s.io", "v1beta1"), "dtrain")


def test_a_namespace_that_is_not_there(mine: Client) -> None:
    with pytest.raises(Refused, match=r"there is no namespace nowhere; create it \(kubectl create namespace nowhere\)"):
        mine.create(CONFIG_MAP, "nowhere", {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "x"}})


def test_fields_that_are_wrong_or_unknown(mine: Client, recordings: Path) -> None:
    spec = {"entrypoint": "x", "backoffLimit": "three", "rayClusterSpec": {"headGroupSpec": {"rayStartParams": {}}}}
    made = {"kind": "RayJob", "apiVersion": "ray.io/v1", "metadata": {"name": "x"}, "spec": spec}
    with pytest.raises(Refused) as refusal:
        mine.create(RAY_JOB, "dtrain", made)
    assert "finds this RayJob invalid: " in refusal.value.message
    assert 'spec.backoffLimit: Invalid value: "string"' in refusal.value.message
    assert "spec.rayClusterSpec.headGroupSpec.template: Required value" in refusal.value.message
    with pytest.raises(Refused, match=r"does not know spec\.fancy of RayJob, .* upgrade KubeRay"):
        mine.create(RAY_JOB, "dtrain", {**made, "spec": {"entrypoint": "x", "fancy": 1}})
