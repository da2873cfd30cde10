"""The Jobs API of a Ray cluster, as far as no cluster is needed: what is sent, and what is made of refusals."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from making import TWO_CORES, a_cluster, a_job

from dtrain import api, runs
from dtrain.backends import ray_jobs
from dtrain.cli import cli
from dtrain.errors import ClusterError, InputError
from dtrain.planning import make_plan
from dtrain.view import cluster

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
        if name.endswith("/stop"):
            self.jobs[name.removesuffix("/stop")]["status"] = "STOPPED"
            return 200, {"stopped": True}
        if name.endswith("/logs"):
            return 200, {"logs": "how the driver began\n"}
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
    for name, seconds in {"SETTLE_S": 0.05, "BEGIN_LOOK_S": 0.05, "PATIENCE_S": 1.0}.items():
        monkeypatch.setattr(ray_jobs, name, seconds)  # this dashboard has nothing behind it that takes its time
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


def test_a_job_that_ray_gives_up_unstarted_is_made_again(dashboard: Dashboard) -> None:
    """As Ray does where what watched over the ended job of this name has not left yet."""
    dashboard.jobs["tiny-abcd"] = {"status": "FAILED", "driver_exit_code": 137}

    def give_up_twice(what: str) -> Answer:
        if what.startswith("POST") and sum(w.startswith("POST") for w in dashboard.asked) <= 2:
            dashboard.jobs["tiny-abcd"]["status"] = "FAILED"
        elif what.startswith("POST"):
            dashboard.jobs["tiny-abcd"]["status"] = "RUNNING"
        return 200, dashboard.jobs.get("tiny-abcd", {})

    dashboard.before = give_up_twice
    ray_jobs.send(rendered(), dashboard.options, print)
    assert sum(what.startswith("POST") for what in dashboard.asked) == 3
    assert dashboard.jobs["tiny-abcd"]["status"] == "RUNNING"


def test_a_cluster_that_has_just_come_up_is_waited_for(dashboard: Dashboard) -> None:
    def not_yet(what: str) -> Answer:
        if what.startswith("POST") and sum(w.startswith("POST") for w in dashboard.asked) <= 2:
            dashboard.jobs.clear()
            return 500, "RuntimeError: No available agent to submit job, please try again later."
        return (200, dashboard.jobs["tiny-abcd"]) if dashboard.jobs else (404, "no such job")

    dashboard.before = not_yet
    ray_jobs.send(rendered(), dashboard.options, print)
    assert sum(what.startswith("POST") for what in dashboard.asked) == 3
    assert list(dashboard.jobs) == ["tiny-abcd"]


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


def a_run(dashboard: Dashboard, storage: Path) -> runs.Run:
    """In a folder, which is the same to everybody."""
    backend = {"name": "ray_jobs", "address": dashboard.options.address}
    plan = make_plan(a_job(), a_cluster(backend=backend, storage=str(storage)), TWO_CORES)
    run = runs.create(plan, "", "tiny-abcd")
    api.hand_over(run, plan, print)
    return run


def test_a_run_that_no_driver_took_is_ended_on_its_cluster_too(dashboard: Dashboard, tmp_path: Path) -> None:
    run = a_run(dashboard, tmp_path)
    assert api.stop(run, "me", 5.0).state == "stopped"
    assert dashboard.jobs[run.id]["status"] == "STOPPED"
    asked = len(dashboard.asked)
    assert api.stop(run, "me", 5.0).state == "stopped", "twice is fine"
    assert not any("/stop" in what for what in dashboard.asked[asked:])


def test_a_lost_run_that_is_stopped_stays_so(dashboard: Dashboard, tmp_path: Path) -> None:
    run = a_run(dashboard, tmp_path)
    run.update(state="running", driver_pid=1)
    assert run.record.state == "lost"
    assert api.stop(run, "me", 5.0).state == "stopped"
    assert dashboard.jobs[run.id]["status"] == "STOPPED"


def test_what_is_left_of_an_ended_run_is_over_before_it_resumes(dashboard: Dashboard, tmp_path: Path) -> None:
    run = a_run(dashboard, tmp_path)
    run.update(state="failed", exit_code=3)
    dashboard.jobs[run.id]["status"] = "RUNNING"  # its driver is about to leave
    threading.Timer(1.0, lambda: dashboard.jobs[run.id].update(status="FAILED")).start()
    run.requeue("resumed")
    api.hand_over(run, run.plan, print, resumes=True)
    assert dashboard.jobs[run.id]["status"] == "PENDING", "a new job, not the one that was leaving"


def test_status_and_logs_ask_the_cluster_while_the_run_says_nothing(dashboard: Dashboard, tmp_path: Path) -> None:
    run = a_run(dashboard, tmp_path)
    dashboard.jobs[run.id]["message"] = "The runtime environment is being set up."
    assert cluster.waits_for(run, run.plan) == "queued: The runtime environment is being set up."
    shown = CliRunner().invoke(cli, ["status", "--storage", str(tmp_path)])
    assert "The runtime environment is being set up." in shown.output
    written = io.BytesIO()
    assert cluster.logs(run, "driver.log", written, follows=False)
    assert written.getvalue() == b"how the driver began\n"
    dashboard.before = lambda what: (401, "no")
    shown = CliRunner().invoke(cli, ["status", "--storage", str(tmp_path)])
    assert "its cluster cannot be asked" in shown.output


def test_it_is_not_ended_by_who_did_not_start_it(dashboard: Dashboard) -> None:
    with pytest.raises(InputError, match="was not started by dtrain"):
        ray_jobs.cluster_down(dashboard.options)
