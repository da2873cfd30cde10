"""dtrain from Python: submit a job, and be with its run. The commands go through the same functions.

import dtrain

run = dtrain.submit("jobs/gpt_small.yaml", overrides={"train.steps": 100})
run.wait()
print(run.metrics()[-1], run.best_checkpoint)
"""

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from dtrain import component, runs, storage
from dtrain.errors import ClusterError, DtrainError, InputError, Stopped, from_kind
from dtrain.plan import AnyPlan, Plan, ScriptPlan
from dtrain.planning import make_plan
from dtrain.settings import Settings, to_json
from dtrain.spec import document, load
from dtrain.spec.cluster import ClusterSpec
from dtrain.spec.document import Node
from dtrain.spec.job import JobSpec, ScriptSpec

if TYPE_CHECKING:
    from dtrain.backends import Sight

LOCAL_CLUSTER = Path("clusters/local.yaml")
POLL_S = 0.1
STOP_S = 150.0
RETRY_S = 0.5
LEAVING_S = 10.0
"""How long a driver that has said how its run ended takes to leave, at most."""
CLEARED_S = 60.0
AnyJob = str | Path | Mapping[str, Any] | JobSpec | ScriptSpec
AnyCluster = str | Path | Mapping[str, Any] | ClusterSpec | None
Overrides = Sequence[str] | Mapping[str, Any]
Say = Callable[[str], None]
P = TypeVar("P", bound=AnyPlan)


def submit(job: AnyJob, cluster: AnyCluster = None, overrides: Overrides = (), *, say: Say | None = None) -> "Run":
    """Hand a job to its cluster and return at once.

    `job` is a file, what would stand in one, or a spec; so is `cluster`, this machine when left out. `overrides` are
    `["train.steps=100"]` or `{"train.steps": 100, "cluster.storage": "runs"}`. Relative paths in a job start at its
    file's folder, else where Python runs. `say` is told what is being waited for.
    Raises `InputError`, `ClusterError` and `StorageError` as `dtrain submit` does.
    """
    settings = _settings(overrides)
    plan = decide(job, cluster, settings)
    run, plan = create(plan, job_text(job, settings), say or _nothing, folder_of(job))
    hand_over(run, plan, say or _nothing)
    return Run(run.where)


def _nothing(text: str) -> None:
    del text


class Run:
    """One run, by its folder or URI."""

    def __init__(self, path: str | Path) -> None:
        place, _, name = str(path).rstrip("/").rpartition("/")
        self._run = runs.opened(place, name) if storage.is_remote(str(path)) else runs.Run(Path(path).absolute())

    def __repr__(self) -> str:
        return f"Run({self._run.where!r})"

    @property
    def id(self) -> str:
        return self._run.id

    @property
    def path(self) -> Path:
        """Its folder; of a run in a bucket a folder with copies of what was looked at."""
        return self._run.path

    @property
    def status(self) -> runs.Record:
        """Where it stands: state, cause, attempts, exit code, outcome."""
        return self._run.record

    def wait(self, timeout_s: float | None = None, *, check: bool = True) -> runs.Record:
        """Wait for its end.

        Raises `TimeoutError` when it has not come in time and, unless `check` is turned off, the error that a run
        which did not succeed ended with: `TrainingError`, `Stopped` and the others of `dtrain.errors`.
        """
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while not (record := self._run.record).ended:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.id} is still {record.state} after {timeout_s:g} s")
            time.sleep(max(POLL_S, self._run.poll_s))
        if check and record.state != "succeeded":
            raise from_kind(record.error_kind or "internal", record.error or record.cause)
        return record

    def metrics(self) -> list[dict[str, Any]]:
        """What was measured so far, a line of metrics.jsonl each."""
        return self._run.metrics()

    def logs(self, rank: int | None = None) -> str:
        """What its workers printed, in all attempts; of several workers, each line says whose it is."""
        from dtrain.view import logs

        out = io.BytesIO()
        try:
            logs.show(self._run, f"rank-{'*' if rank is None else rank}.log", out, follows=False)
        except InputError:
            if rank is not None and rank >= self.status.num_workers:
                raise
        return out.getvalue().decode(errors="replace")

    def stop(self, timeout_s: float = STOP_S) -> runs.Record:
        """Stop it after a last checkpoint, and wait for its end; one that has ended is left as it is."""
        return stop(self._run, "Python", timeout_s)

    @property
    def best_checkpoint(self) -> Path | None:
        """The whole checkpoint with the lowest held-out loss, the newest where none was measured; None without one.

        What a script keeps is its own affair: it is in `path / "checkpoints"`.
        """
        from dtrain.view import tables

        stored = tables.checkpoints(self._run)
        measured = [c for c in stored if "loss" in c["metrics"]]
        if not stored:
            return None
        best = min(reversed(measured), key=lambda c: c["metrics"]["loss"]) if measured else stored[-1]
        self._run.fetch_checkpoint(str(best["name"]))
        return self._run.checkpoints / str(best["name"])


# -- what commands share ---------------------------------------------------------------------------------------


def decide(job: AnyJob, cluster: AnyCluster = None, overrides: Sequence[str] = ()) -> Plan | ScriptPlan:
    """The plan of a job on a cluster. Raises `InputError` with every mistake of both."""
    cluster = default_cluster() if cluster is None else cluster
    asked, place = load.both_of(
        lambda: _document(job, "the job"),
        lambda: _document(cluster, "the cluster") if cluster is not None else load.this_machine(),
        overrides,
    )
    if not isinstance(job, str | Path):
        return make_plan(asked, place)
    with load.located(job, overrides):
        return make_plan(asked, place, folder=Path(job).parent)


def default_cluster() -> Path | None:
    """The cluster file that is meant where none is given; None for this machine as it is."""
    return LOCAL_CLUSTER if LOCAL_CLUSTER.is_file() else None


def job_text(job: AnyJob, overrides: Sequence[str]) -> str:
    """A job as it is kept in the run folder."""
    if isinstance(job, str | Path):
        text = Path(job).read_text("utf-8")
    else:
        import yaml

        text = yaml.safe_dump(json.loads(_json(job)), sort_keys=False)
    return "".join([text, *(f"# --set {setting}\n" for setting in overrides)])


def backend_of(plan: AnyPlan) -> ModuleType:
    return component.load("backends", plan.backend.name)


def folder_of(job: AnyJob) -> Path | None:
    """The folder of a job's file, where it is one."""
    return Path(job).parent if isinstance(job, str | Path) else None


def create(plan: P, text: str, say: Say, folder: Path | None) -> tuple[runs.Run, P]:
    """A new run, and its plan as the cluster reads it: to a cluster elsewhere the user's own code goes along.

    `text` is the job's, `folder` that of its file. Code that cannot be sent is refused before there is a run.
    """
    if not hasattr(backend_of(plan), "look"):
        return runs.create(plan, text), plan
    from dtrain import bundle

    place = storage.at(plan.storage)
    sent = bundle.send(place, plan, folder, say)
    if sent is not None and place.local is not None:
        plan = bundle.settle(place, plan, sent)
    run = runs.create(plan, text)
    if sent is not None:
        bundle.record(place, run.id, sent)
    return run, plan


def hand_over(run: runs.Run, plan: AnyPlan, say: Say, *, resumes: bool = False) -> None:
    """Give a queued run to the cluster; a run that the cluster did not take is ended, never left waiting.

    One that resumes may have left something there, which must be over first.
    """
    backend = backend_of(plan)
    try:
        if hasattr(backend, "look"):
            from dtrain import handshake

            handshake.record(storage.at(plan.storage), run.id)
            if resumes:
                _clear(run, plan, say)
        backend.send(backend.render(plan, run.path), plan.backend, say)
    except DtrainError as error:
        run.end_undriven("failed", f"it could not be handed to the cluster: {error.message}", error)
        raise
    except KeyboardInterrupt:
        run.ask_to_stop("Ctrl-C")
        raise


def _clear(run: runs.Run, plan: AnyPlan, say: Say) -> None:
    """See that nothing of an ended run is left on its cluster, which would otherwise take it for the new one."""
    backend = backend_of(plan)
    began, is_told = time.monotonic(), False
    while (sight := backend.look(run.id, plan.backend)) is not None and not sight.is_over:
        waited_s = time.monotonic() - began
        if not is_told and waited_s > LEAVING_S:
            is_told = True
            say(f"the cluster still has something of {run.id}: ending it")
            backend.end(run.id, plan.backend)
        if waited_s > CLEARED_S:
            raise ClusterError(f"{run.id} is still on its cluster after {waited_s:.0f} s; resume it once that is over")
        time.sleep(RETRY_S)


def sight_of(run: runs.Run, plan: AnyPlan) -> "Sight | None":
    """What the cluster sees of a run, where it sees more than the run's folder. Raises `ClusterError`."""
    backend = backend_of(plan)
    found: Sight | None = backend.look(run.id, plan.backend) if hasattr(backend, "look") else None
    return found


def stop(run: runs.Run, who: str, timeout_s: float) -> runs.Record:
    """Ask a run to stop and wait for its end. Raises `ClusterError` when it does not come in time."""
    record = run.record
    if not record.ended:
        run.ask_to_stop(who)
        record = run.record
    if record.state in ("stopped", "lost"):
        _end_on_cluster(run)  # no driver does: the cluster must not begin, or keep, what is left of it
    if record.state == "lost" and hasattr(backend_of(run.plan), "look"):
        run.end_dead(Stopped(f"stopped by {who} after its driver was lost"))  # else somebody would hand it over again
        record = run.record
    deadline = time.monotonic() + timeout_s
    while not record.ended and time.monotonic() < deadline:
        time.sleep(max(POLL_S, run.poll_s))
        record = run.record
    if not record.ended:
        raise ClusterError(
            f"{run.id} was asked to stop and is still {record.state} after {timeout_s:g} s;"
            f" `dtrain logs {run.id} --driver` says what holds it up, asking again waits longer,"
            " `dtrain cluster down` ends it without a checkpoint"
        )
    return record


def _end_on_cluster(run: runs.Run) -> None:
    plan = run.plan
    backend = backend_of(plan)
    if hasattr(backend, "end"):
        backend.end(run.id, plan.backend)


def _settings(overrides: Overrides) -> list[str]:
    if isinstance(overrides, str):
        raise InputError(f"overrides are a list or a mapping; write [{overrides!r}]")
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    return list(overrides)


def _document(given: Any, name: str) -> Node:
    if isinstance(given, str | Path):
        return document.read(given)
    if not isinstance(given, Mapping | Settings):
        raise InputError(f"{name}: expected a path, a mapping or a spec, found a {type(given).__name__}")
    root = document.parse(_json(given), name, fixed_where=True)
    assert root is not None and isinstance(root.value, dict)
    return root


def _json(given: Mapping[str, Any] | Settings) -> str:
    if isinstance(given, Settings):
        return to_json(given)
    return json.dumps(given, default=str, ensure_ascii=False)
