"""The Jobs API of a Ray cluster, as far as no cluster is needed: what is sent, and what is made of refusals."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from making import TWO_CORES, a_cluster, a_job

from dtrain.backends import ray_jobs
from dtrain.errors import ClusterError, InputError
from dtrain.plan import make_plan

Answer = tuple[int, Any] | None


class Dashboard:
    """Keeps jobs as Ray's does; `before` may answer in its place (None: the connection is cut when it is done)."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.before: Callable[[str], Answer] | None = None
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.handle(self)

            do_POST = do_DELETE = do_GET  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.options = ray_jobs.Options(address=f"http://127.0.0.1:{self._server.server_address[1]}")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers.get("Content-Length") or 0)) or b"{}")
        what = f"{request.command} {request.path}"
        self.asked.append(what)
        self.tokens.add(request.headers.get("Authorization"))
        said = self._do(request, body)
        if self.before is not None:
            said = self.before(what) or None
            if said is None:
                request.close_connection = True
                request.connection.shutdown(2)
                return
        assert said is not None
        data = json.dumps(said[1]).encode()
        request.send_response(said[0])
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _do(self, request: BaseHTTPRequestHandler, body: dict[str, Any]) -> Answer:
        name = request.path.removeprefix("/api/jobs/")
        if request.command == "POST":
            if body["submission_id"] in self.jobs:
                return 500, f"ValueError: Job with submission_id {body['submission_id']} already exists."
            self.jobs[body["submission_id"]] = {**body, "status": "PENDING", "message": "Job is starting."}
            return 200, {"submission_id": body["submission_id"]}
        if name not in self.jobs:
            return 404, f"Job {name} does not exist"
        return (200, self.jobs[name]) if request.command == "GET" else (200, bool(self.jobs.pop(name)))


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    made = Dashboard()
    yield made
    made.close()


def rendered(**backend: Any) -> Any:
    place = a_cluster(backend={"name": "ray_jobs", **backend}, storage="s3://bucket/runs", nodes=2)
    return ray_jobs.render(make_plan(a_job(), place, TWO_CORES), Path("tiny-abcd"))


def test_what_is_sent_is_one_command_that_needs_nothing_but_the_storage() -> None:
    submission = rendered(python="/opt/py/bin/python")
    command = "/opt/py/bin/python -m dtrain.runtime.remote --storage s3://bucket/runs --run tiny-abcd"
    assert " ".join(submission.entrypoint) == command
    assert (submission.run_path, submission.num_nodes) == ("s3://bucket/runs/tiny-abcd", 2)
    assert submission.text() == rendered(python="/opt/py/bin/python").text()


def test_handing_over_twice_makes_one_job_and_an_ended_one_is_replaced(dashboard: Dashboard) -> None:
    said: list[str] = []
    ray_jobs.send(rendered(), dashboard.options, said.append)
    assert dashboard.jobs["tiny-abcd"]["metadata"] == {"dtrain": "tiny-abcd"}
    ray_jobs.send(rendered(), dashboard.options, said.append)
    assert sum(what.startswith("POST") for what in dashboard.asked) == 1
    assert "has tiny-abcd already" in said[-1]
    dashboard.jobs["tiny-abcd"]["status"] = "FAILED"
    ray_jobs.send(rendered(), dashboard.options, said.append)
    assert dashboard.jobs["tiny-abcd"]["status"] == "PENDING"


def test_a_submit_whose_answer_was_lost_makes_no_second_job(dashboard: Dashboard) -> None:
    def lose_once(what: str) -> Answer:
        dashboard.before = None
        return None

    dashboard.before = lambda what: lose_once(what) if what.startswith("POST") else (404, "not yet")
    ray_jobs.send(rendered(), dashboard.options, print)
    assert [what for what in dashboard.asked if what.startswith("POST")] == ["POST /api/jobs/"] * 2
    assert list(dashboard.jobs) == ["tiny-abcd"]


@pytest.mark.parametrize(
    ("status", "phase", "is_over", "succeeded"),
    [
        ("PENDING", "queued", False, None),
        ("RUNNING", "running", False, None),
        ("SUCCEEDED", "ended", True, True),
        ("FAILED", "ended", True, False),
        ("STOPPED", "ended", True, False),
    ],
)
def test_what_is_seen(dashboard: Dashboard, status: str, phase: str, is_over: bool, succeeded: bool | None) -> None:
    assert ray_jobs.look("tiny-abcd", dashboard.options) is None
    message = "Job entrypoint command failed with exit code 137, last available logs (truncated):\nlong\nlong"
    dashboard.jobs["tiny-abcd"] = {"status": status, "message": message, "driver_exit_code": 137}
    sight = ray_jobs.look("tiny-abcd", dashboard.options)
    assert sight is not None
    assert (sight.phase, sight.is_over, sight.succeeded) == (phase, is_over, succeeded)
    assert "long" not in sight.why
    assert ("137" in sight.why) == (phase != "running")


@pytest.mark.parametrize(("code", "expected"), [(401, "RAY_AUTH_TOKEN_PATH"), (403, "wants a token"), (400, "no: why")])
def test_refusals_name_the_next_move(dashboard: Dashboard, code: int, expected: str) -> None:
    dashboard.before = lambda what: (code, "no: why")
    with pytest.raises(ClusterError, match=expected):
        ray_jobs.cluster_status(dashboard.options)


def test_an_overloaded_dashboard_is_asked_again(dashboard: Dashboard) -> None:
    answers = [503, 429, 200]
    dashboard.before = lambda what: (answers.pop(0), {"status": "RUNNING"})
    assert ray_jobs.look("tiny-abcd", dashboard.options) is not None
    assert answers == []


def test_a_token_is_taken_from_where_ray_takes_it(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ray_jobs.look("tiny-abcd", dashboard.options)
    assert dashboard.tokens == {None}
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    ray_jobs.look("tiny-abcd", dashboard.options)
    assert "Bearer secret" in dashboard.tokens


def test_nobody_there_is_said_in_seconds(dashboard: Dashboard) -> None:
    dashboard.close()
    with pytest.raises(ClusterError, match="no Ray dashboard answers at http://127"):
        ray_jobs.look("tiny-abcd", dashboard.options)


def test_it_is_not_ended_by_who_did_not_start_it(dashboard: Dashboard) -> None:
    with pytest.raises(InputError, match="was not started by dtrain"):
        ray_jobs.cluster_down(dashboard.options)
