"""What pods print: read, and followed through cuts and to a head's successor; and Ray's own log of the driver."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from api_server import ApiServer
from submitting import some_options

from dtrain.backends import kuberay
from dtrain.errors import ClusterError, InputError
from dtrain.kubernetes import logs, names

RUN, NAME = "gpt_small-k3f9", "gpt-small-k3f9"
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "rayClusterName": "x-1", "jobId": NAME}
DASHBOARD = {"dashboardURL": "x-1-head-svc.dtrain.svc.cluster.local:8265"}


@pytest.fixture
def run(api: ApiServer, kubeconfig: str) -> ApiServer:
    """A run with a head and two workers."""
    metadata = {
        "name": NAME,
        "namespace": "dtrain",
        "labels": names.run_labels(RUN),
        "annotations": {names.RUN_ID: RUN},
    }
    api.put({"kind": "RayJob", "metadata": metadata, "spec": {}, "status": RUNNING})
    put_pod(api, "x-1-head-a", "head")
    put_pod(api, "x-1-gpu-worker-b", "worker")
    put_pod(api, "x-1-gpu-worker-a", "worker")
    return api


def put_pod(api: ApiServer, name: str, kind: str) -> None:
    labels = {"ray.io/cluster": "x-1", "ray.io/node-type": kind}
    spec = {"containers": [{"name": f"ray-{kind}"}, {"name": "autoscaler"}]}
    api.put({"kind": "Pod", "metadata": {"name": name, "namespace": "dtrain", "labels": labels}, "spec": spec})


def read(which: str, **words: str) -> bytes:
    return b"".join(kuberay.logs(RUN, some_options(**words), which, False))


class Reader(threading.Thread):
    """Somebody who follows a log."""

    def __init__(self, which: str, **words: Any) -> None:
        super().__init__()
        self.lines: list[bytes] = []
        self._which, self._words = which, words
        self.start()

    def run(self) -> None:
        self.lines += kuberay.logs(RUN, some_options(**self._words), self._which, True)

    def await_lines(self, number: int) -> None:
        await_(lambda: len(self.lines) >= number)


def await_(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_who_prints_what(run: ApiServer) -> None:
    run.log("x-1-head-a", b"I am the head\n")
    run.log("x-1-gpu-worker-a", b"I am a\nand more")
    run.log("x-1-gpu-worker-b", "ich bin b: ä\n".encode())
    assert read("head") == read("driver") == b"I am the head\n"
    assert read("node-0") == b"I am a\nand more"
    assert read("node-1") == "ich bin b: ä\n".encode()
    with pytest.raises(ClusterError, match=f"run {RUN} has no node-2 on the cluster .*its folder in storage has"):
        read("node-2")
    with pytest.raises(InputError, match="pods print no log 'rank-0'; there is: driver, head, node-0"):
        read("rank-0")


def test_nothing_is_there_any_more(run: ApiServer) -> None:
    run.remove("RayJob", NAME)
    with pytest.raises(ClusterError, match="it is not there any more"):
        read("head")


def test_a_pod_that_has_not_begun_prints_nothing(run: ApiServer) -> None:
    waiting = [{"name": "ray-head", "state": {"waiting": {"reason": "ContainerCreating"}}}]
    run.set_status("Pod", "x-1-head-a", {"containerStatuses": waiting})
    assert read("head") == b""


@pytest.mark.parametrize("follows", [False, True])
def test_what_a_container_printed_before_it_was_started_again(run: ApiServer, follows: bool) -> None:
    run.log("x-1-head-a", b"the error\n", container="ray-head before")
    run.log("x-1-head-a", b"hello again\n")
    run.log("x-1-gpu-worker-a", b"its log of before is not kept\n")
    run.set_status("Pod", "x-1-head-a", {"containerStatuses": [{"name": "ray-head", "restartCount": 1}]})
    run.set_status("Pod", "x-1-gpu-worker-a", {"containerStatuses": [{"name": "ray-worker", "restartCount": 2}]})
    run.set_status("RayJob", NAME, {**RUNNING, "jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"})
    for pod in ("x-1-head-a", "x-1-gpu-worker-a"):
        run.end_log(pod)
    told = {which: b"".join(kuberay.logs(RUN, some_options(), which, follows)) for which in ("head", "node-0")}
    assert told == {"head": b"the error\nhello again\n", "node-0": b"its log of before is not kept\n"}


def test_following_through_cuts_repeats_nothing_and_misses_nothing(run: ApiServer) -> None:
    run.log("x-1-head-a", b"0\n1\n")
    reader = Reader("head")
    for number in range(2, 12):
        reader.await_lines(number)
        if number % 3 == 0:
            run.drop_watches()
        if number == 6:
            run.fail(r"/log$", status=503)
        run.log("x-1-head-a", f"{number}\n".encode())
    reader.await_lines(12)
    run.set_status("RayJob", NAME, {**RUNNING, "jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"})
    run.end_log("x-1-head-a")
    reader.join()
    assert reader.lines == [f"{number}\n".encode() for number in range(12)]
    followed = [request for request in run.requests if request.path.endswith("/log")]
    assert "sinceTime" not in followed[0].query
    assert all("sinceTime" in request.query for request in followed[1:])  # not all of it, again and again


def test_what_was_cut_at_the_end_is_still_told(run: ApiServer) -> None:
    """The run is over while the connection is cut: the rest is read before the reader leaves."""
    run.log("x-1-head-a", b"0\n")
    reader = Reader("head")
    reader.await_lines(1)
    run.fail(r"/log$", status=502, times=1)
    run.log("x-1-head-a", b"1\n")
    reader.await_lines(2)
    run.set_status("RayJob", NAME, {**RUNNING, "jobDeploymentStatus": "Failed", "jobStatus": "FAILED"})
    run.drop_watches()
    run.log("x-1-head-a", b"the error\n")
    run.end_log("x-1-head-a")
    reader.join()
    assert reader.lines == [b"0\n", b"1\n", b"the error\n"]


@pytest.mark.parametrize("follows", [False, True])
def test_a_log_that_cannot_be_had_is_not_asked_for_ever(
    run: ApiServer, monkeypatch: pytest.MonkeyPatch, follows: bool
) -> None:
    """A node that died: its pod is there, and the API server cannot ask its kubelet."""
    monkeypatch.setattr(logs, "LOOK_AGAIN_S", 0.01)
    run.fail(r"/log$", status=500, message="dial tcp 10.0.0.7:10250: connect: no route to host", times=10**6)
    with pytest.raises(ClusterError, match="no route to host"):
        list(kuberay.logs(RUN, some_options(), "head", follows))
    assert len([r for r in run.requests if r.path.endswith("/log")]) == logs.MOST_CUTS + 1


def test_a_pod_may_be_silent_for_long(run: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LOOK_AGAIN_S", 0.01)
    monkeypatch.setattr(logs, "SILENCE_S", 0.05)
    run.log("x-1-head-a", b"first\n")
    reader = Reader("head")
    reader.await_lines(1)
    await_(lambda: len([r for r in run.requests if r.path.endswith("/log")]) > logs.MOST_CUTS + 2)
    monkeypatch.setattr(logs, "SILENCE_S", 10.0)
    run.log("x-1-head-a", b"second\n")
    reader.await_lines(2)
    run.set_status("RayJob", NAME, {**RUNNING, "jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"})
    run.end_log("x-1-head-a")
    reader.join()
    assert reader.lines == [b"first\n", b"second\n"]


def test_a_log_that_hangs_is_waited_for_once(run: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "SILENCE_S", 0.5)
    run.fail(r"/log$", delay_s=30, times=10**6)
    started = time.monotonic()
    with pytest.raises(ClusterError, match="no answer in time"):
        read("head")
    assert time.monotonic() - started < 3


def test_nobody_answers_any_more(run: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LOOK_AGAIN_S", 0.01)
    run.fail(r"/log$", cut="before", times=10**6)
    with pytest.raises(ClusterError, match="cannot be reached: the connection is cut"):
        list(kuberay.logs(RUN, some_options(), "head", False))


@pytest.mark.parametrize(
    "stamps",
    [
        ["2026-11-20T17:13:17.1Z", "2026-11-20T17:13:17.12Z", "2026-11-20T17:13:18Z"],
        ["2026-11-20T19:13:17.000000001+02:00", "2026-11-20T17:13:17.000000002Z", "2026-11-20T17:13:17.9+00:00"],
    ],
)
def test_times_are_in_an_order_however_they_are_written(stamps: list[str]) -> None:
    assert [logs.moment(stamp) for stamp in stamps] == sorted(logs.moment(stamp) for stamp in reversed(stamps))


def test_following_goes_on_with_a_heads_successor(run: ApiServer) -> None:
    run.log("x-1-head-a", b"first\n")
    reader = Reader("head")
    reader.await_lines(1)
    run.remove("Pod", "x-1-head-a")
    time.sleep(1.0)  # creation times are whole seconds
    put_pod(run, "x-1-head-b", "head")
    run.log("x-1-head-b", b"second\n")
    reader.await_lines(2)
    run.remove("RayJob", NAME)
    run.remove("Pod", "x-1-head-b")
    reader.join()
    assert reader.lines == [b"first\n", b"second\n"]


def test_a_reader_who_leaves_is_forgotten(run: ApiServer) -> None:
    run.log("x-1-head-a", b"first\n")
    with closing(kuberay.logs(RUN, some_options(), "head", True)) as lines:  # type: ignore[type-var]
        assert next(lines) == b"first\n"

    def is_forgotten() -> bool:
        run.log("x-1-head-a", b"more\n")  # a server notices when it writes
        return not run.under_way

    await_(is_forgotten)


# -- Ray's dashboard, through the API server ---------------------------------------------------------------------


class Dashboard(BaseHTTPRequestHandler):
    text, token, asked = "", "", 0

    def do_GET(self) -> None:
        cls = type(self)
        cls.asked += 1
        is_in = not self.token or self.headers["X-Ray-Authorization"] == f"Bearer {self.token}"
        is_known = self.path == f"/api/jobs/{NAME}/logs"
        body = json.dumps({"logs": cls.text}).encode() if is_in else b"Unauthorized"
        self.send_response(200 if is_in and is_known else 401 if is_known else 404)
        self.send_header("Content-Type", "application/json; charset=utf-8" if is_in else "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Nothing."""


@pytest.fixture
def dashboard(run: ApiServer) -> Iterator[type[Dashboard]]:
    handler = type("OneDashboard", (Dashboard,), {"text": "from Ray\n"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    run.proxy("x-1-head-svc", 8265, f"http://127.0.0.1:{server.server_address[1]}")
    run.set_status("RayJob", NAME, {**RUNNING, **DASHBOARD})
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_rays_own_log_of_the_driver(run: ApiServer, dashboard: type[Dashboard]) -> None:
    assert read("driver", auth={"mode": "disabled"}) == b"from Ray\n"


def test_with_the_clusters_token_where_it_can_be_read(run: ApiServer, dashboard: type[Dashboard]) -> None:
    dashboard.token = "secret"
    run.log("x-1-head-a", b"from the head\n")
    assert read("driver") == b"from the head\n"  # there is no such Secret
    data = {"auth_token": "c2VjcmV0"}
    run.put({"kind": "Secret", "metadata": {"name": "x-1", "namespace": "dtrain"}, "data": data})
    assert read("driver") == b"from Ray\n"


def test_following_rays_log(run: ApiServer, dashboard: type[Dashboard], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LOOK_AGAIN_S", 0.05)
    run.put({"kind": "Secret", "metadata": {"name": "x-1", "namespace": "dtrain"}, "data": {}})
    reader = Reader("driver")
    reader.await_lines(1)
    dashboard.text += "more: ä\n"
    reader.await_lines(2)
    dashboard.text = "anew\n"  # another head, another log
    reader.await_lines(3)
    run.remove("RayJob", NAME)
    reader.join()
    assert reader.lines == [b"from Ray\n", "more: ä\n".encode(), b"anew\n"]


def test_rays_log_is_followed_through_a_head_that_is_lost(
    run: ApiServer, dashboard: type[Dashboard], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its dashboard is gone for a while, and the operator tells no address meanwhile."""
    monkeypatch.setattr(logs, "LOOK_AGAIN_S", 0.05)
    reader = Reader("driver", auth={"mode": "disabled"})
    reader.await_lines(1)
    asked = dashboard.asked
    run.fail(r"/proxy/", status=404, reason="NotFound", times=3)
    await_(lambda: dashboard.asked > asked)
    run.set_status("RayJob", NAME, {"jobDeploymentStatus": "Initializing", "rayClusterName": "x-1", "jobId": NAME})
    time.sleep(0.3)
    dashboard.text = "from another driver, which has said more by now\n"
    run.set_status("RayJob", NAME, {**RUNNING, **DASHBOARD})
    reader.await_lines(2)
    run.set_status("RayJob", NAME, {**RUNNING, **DASHBOARD, "jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"})
    reader.join()
    assert reader.lines == [b"from Ray\n", dashboard.text.encode()]
