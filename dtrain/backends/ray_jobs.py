"""A Ray cluster that runs already: VMs, `ray up`, somebody's service. The driver is a Ray job called like the run.

Speaks the Jobs API of the dashboard over plain HTTP, so that a submit imports no Ray. The cluster needs dtrain
installed on every node, and a storage that all nodes see: a shared folder or a bucket.
"""

import json
import os
import shlex
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from dtrain.backends import REMOTE_DRIVER, Sight, Submission
from dtrain.errors import ClusterError, InputError
from dtrain.machine import MachineSpec
from dtrain.settings import Settings

if TYPE_CHECKING:
    from dtrain.plan import AnyPlan

TIMEOUT_S = 20.0
PATIENCE_S = 5.0
AGENT_PATIENCE_S = 60.0
"""For so long a cluster that has just come up may have nothing yet that starts jobs."""
"""How long a dashboard may refuse connections or be overloaded before that is an error."""
POLL_S = 1.0
BEGIN_LOOKS, BEGIN_LOOK_S = 4, 0.5
SETTLE_S = 4.0
REPLACED_S = 30.0
"""How long what watched over a job that has ended may take to leave."""
ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
MAX_WHY = 300

Say = Callable[[str], None]


class Options(Settings):
    """A Ray cluster that runs already, by the address of its dashboard; runs are Ray jobs there."""

    address: Annotated[str, Meta(pattern=r"^https?://[^/\s]+(/.*)?\Z", max_length=1024)] = "http://127.0.0.1:8265"
    """Address of its dashboard. A token is taken from where Ray's own tools look: `RAY_AUTH_TOKEN`,
    `RAY_AUTH_TOKEN_PATH`, or `~/.ray/auth_token` with `RAY_AUTH_MODE=token`."""
    python: Annotated[str, Meta(min_length=1, max_length=1024)] = "python"
    """The Python on the cluster's machines that has dtrain installed."""
    environment: dict[str, str] = {}
    """Environment variables of the run's processes there. Everybody who sees the dashboard sees them: no secrets."""
    machine: MachineSpec | None = None
    """What each node has; like this machine when left out."""


def render(plan: "AnyPlan", run_path: Path) -> Submission:
    """The driver's command, as the cluster's head will run it."""
    command = (plan.backend.python, "-m", REMOTE_DRIVER)  # type: ignore[attr-defined]
    return Submission(
        backend="ray_jobs",
        entrypoint=(*command, "--storage", plan.storage, "--run", run_path.name),
        run_path=f"{plan.storage.rstrip('/')}/{run_path.name}",
        resources=plan.workers.resources,
        num_nodes=plan.workers.num_nodes,
    )


def send(submission: Submission, options: Options, say: Say) -> None:
    """Make it a Ray job of the run's name; one that is under way is left alone, one that has ended is replaced.

    Raises `ClusterError` when the cluster cannot be reached or refuses.
    """
    run_id = submission.run_path.rpartition("/")[2]
    job = {
        "entrypoint": shlex.join(submission.entrypoint),
        "submission_id": run_id,
        "metadata": {"dtrain": run_id},
        "runtime_env": {"env_vars": options.environment} if options.environment else {},
    }
    found = _job(options, run_id)
    if found is not None and found["status"] not in ENDED:
        say(f"the cluster has {run_id} already ({found['status'].lower()})")
        return
    _post(options, run_id, job, found)
    deadline = time.monotonic() + REPLACED_S
    while found is not None and (made := _not_begun(options, run_id)) is not None:
        if time.monotonic() > deadline:
            raise ClusterError(f"the Ray cluster at {options.address} does not start {run_id}: {_why(made)}")
        _post(options, run_id, job, made)
    say(f"handed to the Ray cluster at {options.address}")


def _post(options: Options, run_id: str, job: dict[str, Any], ended: dict[str, Any] | None) -> None:
    """Make the job, in the place of one that has ended.

    Ray ends what watches over a job a moment after the job, and never when the job was deleted before that: no other
    of its name could begin.
    """
    if ended is not None:
        time.sleep(SETTLE_S)
        _ask(options, "DELETE", f"/api/jobs/{_quoted(run_id)}")
    try:
        _ask(options, "POST", "/api/jobs/", job)
    except ClusterError:
        # The answer to a first try may have been lost: what counts is whether the job is there.
        if _job(options, run_id) is None:
            raise


def _not_begun(options: Options, run_id: str) -> dict[str, Any] | None:
    """The job, where Ray gave it up without starting its command: what watched over the one before had not left yet."""
    for _ in range(BEGIN_LOOKS):
        job = _job(options, run_id)
        if job is not None and job["status"] != "PENDING":
            return job if job["status"] == "FAILED" and job.get("driver_exit_code") is None else None
        time.sleep(BEGIN_LOOK_S)
    return None


def look(run_id: str, options: Options) -> Sight | None:
    """What the cluster says of the run's job; None when it has none."""
    job = _job(options, run_id)
    if job is None:
        return None
    status, why = job["status"], _why(job)
    if status in ENDED:
        code = job.get("driver_exit_code")
        ended = f"its driver {'was stopped' if status == 'STOPPED' else 'ended'}"
        ended += f" with exit code {code}" if code is not None else ""
        why = f"{ended}: {why}" if why else ended
        return Sight(phase="ended", why=why, is_over=True, succeeded=status == "SUCCEEDED")
    if status == "PENDING":
        return Sight(phase="queued", why=why or "the cluster has not started its driver yet")
    return Sight(phase="running", why="")


def end(run_id: str, options: Options) -> bool:
    """Stop the run's job, whatever it is doing; False when nothing was running."""
    job = _job(options, run_id)
    if job is None or job["status"] in ENDED:
        return False
    _ask(options, "POST", f"/api/jobs/{_quoted(run_id)}/stop")
    return True


def logs(run_id: str, options: Options, which: str, follows: bool) -> Iterator[bytes]:
    """What the driver printed before it had the run's folder; workers' logs are in that folder only."""
    if which != "driver":
        return
    sent = 0
    while True:
        job = _job(options, run_id)
        if job is None:
            return
        text = _ask(options, "GET", f"/api/jobs/{_quoted(run_id)}/logs").get("logs") or ""
        data = str(text).encode()
        if len(data) > sent:
            yield data[sent:]
            sent = len(data)
        if not follows or job["status"] in ENDED:
            return
        time.sleep(POLL_S)


def cluster_up(options: Options, say: Say) -> dict[str, Any]:
    """It runs already, or somebody else starts it: this only looks."""
    del say
    return cluster_status(options)


def cluster_status(options: Options) -> dict[str, Any]:
    """Its address, version and the runs on it."""
    version = _ask(options, "GET", "/api/version")
    jobs = _ask(options, "GET", "/api/jobs/")
    ours = [j for j in jobs if (j.get("metadata") or {}).get("dtrain") and j.get("submission_id")]
    return {
        "state": "up",
        "address": options.address,
        "ray": version.get("ray_version", "unknown"),
        "runs": sorted(j["submission_id"] for j in ours if j["status"] not in ENDED),
    }


def cluster_down(options: Options) -> list[str]:
    """Not dtrain's to end."""
    raise InputError(
        f"the Ray cluster at {options.address} was not started by dtrain: end it as it was started;"
        " `dtrain stop RUN` ends a run on it"
    )


# -- HTTP ----------------------------------------------------------------------------------------------------------


def _job(options: Options, run_id: str) -> dict[str, Any] | None:
    try:
        return dict(_ask(options, "GET", f"/api/jobs/{_quoted(run_id)}"))
    except _NotThere:
        return None


class _NotThere(ClusterError):
    pass


def _ask(options: Options, method: str, path: str, body: Any = None) -> Any:
    """One request; tried again while the dashboard refuses connections or says that it is overloaded.

    Raises `ClusterError` with the next move, `_NotThere` for what is not there.
    """
    request = urllib.request.Request(options.address.rstrip("/") + path, method=method)  # noqa: S310
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    if token := _token():
        request.add_header("Authorization", f"Bearer {token}")
    began, wait_s = time.monotonic(), 0.25
    deadline = began + PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
                text = answer.read()
            return json.loads(text) if text else {}
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            if error.code == 404:
                raise _NotThere(f"{options.address}{path} is not there: {_sentence(said)}") from None
            if has_no_agent := "No available agent" in said:
                deadline = began + AGENT_PATIENCE_S
            if not (has_no_agent or error.code in (429, 502, 503, 504)) or time.monotonic() > deadline:
                raise _refused(options, error.code, said) from None
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"no Ray dashboard answers at {options.address} ({getattr(error, 'reason', error)});"
                    " see that the cluster runs and backend.address is its dashboard's, port-forwarded if need be"
                ) from None
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, 4.0)


def _refused(options: Options, code: int, said: str) -> ClusterError:
    if code in (401, 403):
        return ClusterError(
            f"the Ray cluster at {options.address} wants {'another' if _token() else 'a'} token ({code}):"
            " set RAY_AUTH_TOKEN_PATH to the file with its token"
        )
    return ClusterError(f"the Ray cluster at {options.address} refused ({code}): {_sentence(said)}")


def _token() -> str:
    """Where Ray's own tools look for one."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named is None and os.environ.get("RAY_AUTH_MODE") != "token":
        return ""
    try:
        return Path(named or "~/.ray/auth_token").expanduser().read_text().strip()
    except OSError:
        return ""


def _why(job: dict[str, Any]) -> str:
    return _sentence(job.get("message"))


def _quoted(run_id: str) -> str:
    return urllib.parse.quote(run_id, safe="")


def _sentence(text: object) -> str:
    """What a message says, without the traceback it comes in, of which the last line counts, or the log it quotes."""
    text = str(text or "").partition(", last available logs")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if len(lines) > 1 and lines[0].startswith("Traceback") else " ".join(lines))[:MAX_WHY]
