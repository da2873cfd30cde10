"""dtrain from Python, and what a script knows of its run."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from making import a_job, a_run

import dtrain
from dtrain import api, current, runs
from dtrain.backends import local
from dtrain.errors import ClusterError, InputError, RetriesExhausted, Stopped, TrainingError
from dtrain.plan import ScriptPlan
from dtrain.runs import Attempt

JOB = {
    "name": "tiny",
    "description": "learns to write ü and 🚀",
    "model": {"name": "transformer", "num_layers": 1, "num_heads": 2, "width": 16},
    "data": {"name": "text"},
    "batch": {"global": 8},
    "optimizer": {"name": "adamw", "lr": 1e-5},
    "train": {"steps": 100},
}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    monkeypatch.chdir(tmp_path)
    found: list[Any] = []
    monkeypatch.setattr(local, "send", lambda submission, options, say: found.append(submission))
    return found


@pytest.mark.parametrize("kind", ["mapping", "spec", "file"])
def test_a_job_is_submitted(sent: list[Any], tmp_path: Path, kind: str) -> None:
    job: Any = JOB
    if kind == "spec":
        job = a_job(optimizer={"lr": 1e-5})
    elif kind == "file":
        import yaml

        job = tmp_path / "job.yaml"
        job.write_text(yaml.safe_dump(JOB))
    run = dtrain.submit(job, {"name": "c", "backend": {"name": "local"}}, {"train.steps": 7, "cluster.storage": "out"})
    assert run.path.parent == tmp_path / "out"
    assert sent[0].run_path == str(run.path)
    plan = runs.Run(run.path).plan
    assert not isinstance(plan, ScriptPlan)
    assert (plan.train.steps, plan.optimizer.lr, plan.cluster) == (7, 1e-5, "c")
    kept = (run.path / "job.yaml").read_text()
    assert "name: tiny" in kept
    assert "# --set train.steps=7" in kept
    (tmp_path / "again.yaml").write_text(kept)
    assert api.decide(tmp_path / "again.yaml", None, ["train.steps=7"]).optimizer == plan.optimizer


def test_mistakes_are_those_of_a_file(sent: list[Any]) -> None:
    with pytest.raises(InputError) as error:
        dtrain.submit({**JOB, "bacth": {}, "train": {}}, {"name": "c"})
    lines = str(error.value).splitlines()
    assert "the job: bacth is not a key; did you mean 'batch'?" in lines
    assert "the job: train.steps is missing; add a whole number greater than 0 and at most 1000000000" in lines
    assert any(line.startswith("the cluster: backend") for line in lines)
    with pytest.raises(InputError, match="expected a path, a mapping or a spec, found a int"):
        dtrain.submit(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="overrides are a list or a mapping"):
        dtrain.submit(JOB, overrides="train.steps=3")
    assert sent == []


def test_a_run_that_the_cluster_refused_is_ended(sent: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(submission: Any, options: Any, say: Any) -> None:
        raise ClusterError("no room")

    monkeypatch.setattr(local, "send", refuse)
    with pytest.raises(ClusterError, match="no room"):
        dtrain.submit(JOB)
    (run,) = runs.list_runs(Path("runs"))
    assert run.record.state == "failed"


def ended(tmp_path: Path, **record: Any) -> dtrain.Run:
    run = a_run(tmp_path, **{"ended_at": time.time(), **record})
    return dtrain.Run(run.path)


@pytest.mark.parametrize(
    ("kind", "error"), [("training", TrainingError), ("stopped", Stopped), ("retries-exhausted", RetriesExhausted)]
)
def test_waiting_raises_what_the_run_ended_with(tmp_path: Path, kind: str, error: type[Exception]) -> None:
    state = "stopped" if kind == "stopped" else "failed"
    run = ended(tmp_path, state=state, error_kind=kind, error="it is so", cause="so")
    with pytest.raises(error, match="it is so"):
        run.wait()
    assert run.wait(check=False).state == state
    assert run.stop().state == state, "it has ended"


def test_waiting_ends_with_the_run(tmp_path: Path) -> None:
    folder = a_run(tmp_path, state="running", driver_pid=1)
    run = dtrain.Run(folder.path)
    with folder.owned():
        with pytest.raises(TimeoutError, match=r"is still running after 0\.2 s"):
            run.wait(0.2)
        threading.Timer(0.2, lambda: folder.update(state="succeeded", cause="done")).start()
        assert run.wait(10).cause == "done"
    assert run.status.state == "succeeded"


def test_what_a_run_has_to_say(tmp_path: Path) -> None:
    folder = a_run(tmp_path, attempts=(Attempt(number=1, started_at=0.0, from_step=0, source="scratch"),))
    run = dtrain.Run(folder.path)
    assert (run.metrics(), run.logs(), run.best_checkpoint) == ([], "", None)
    folder.metric(step=1, loss=2.0)
    (folder.logs / "rank-0.log").write_text("zero\n")
    (folder.logs / "rank-1.log").write_text("one\n")
    assert run.metrics()[0]["loss"] == 2.0
    assert run.logs() == "rank 0 | zero\nrank 1 | one\n"
    assert run.logs(1) == "one\n"
    with pytest.raises(InputError, match=r"no log rank-7\.log"):
        run.logs(7)


def test_the_best_checkpoint_is_the_one_with_the_lowest_loss(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    for step, metrics in ((10, '{"loss": 2.0}'), (20, '{"loss": 1.0}'), (30, "{}"), (40, '{"loss": 1.5}')):
        path = folder.checkpoints / f"step-{step:08}"
        path.mkdir()
        (path / "manifest.json").write_text(f'{{"files": {{}}, "metrics": {metrics}}}')
        if step != 40:
            (path / "COMMITTED").touch()
    assert dtrain.Run(folder.path).best_checkpoint == folder.checkpoints / "step-00000020"
    (folder.checkpoints / "step-00000020" / "COMMITTED").unlink()
    (folder.checkpoints / "step-00000010" / "COMMITTED").unlink()
    assert dtrain.Run(folder.path).best_checkpoint == folder.checkpoints / "step-00000030"


# -- the current run ---------------------------------------------------------------------------------------------


def test_outside_a_run_reports_are_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = dtrain.current_run()
    assert (run.path, run.name, run.checkpoint_dir) == (None, None, Path("checkpoints"))
    run.report(step=3, loss=torch.tensor(0.5))
    run.report(loss=0.25)
    run.report()
    assert capsys.readouterr().out == "step 3  loss 0.5\nstep 4  loss 0.25\n"
    monkeypatch.setenv("RANK", "1")
    run.report(loss=0.25)
    assert capsys.readouterr().out == ""


def test_in_a_run_reports_are_told(tmp_path: Path) -> None:
    told: list[tuple[int, dict[str, Any]]] = []
    run = current.CurrentRun(tmp_path, 2, lambda step, figures: told.append((step, figures)))
    run.report(step=10, loss=2, lr=0.1)
    run.report(step=20, loss=1)
    run.report(held_out={"loss": torch.tensor([0.5])}, step=20)
    run.report()
    assert told[0] == (10, {"loss": 2, "learning_rate": 0.1})
    assert told[1][1].pop("steps_per_s") > 0
    assert told[1:] == [(20, {"loss": 1}), (20, {"held_out": {"loss": 0.5}}), (20, {})]
    for value in ("1", None, [1], True, torch.ones(2)):
        with pytest.raises((TypeError, RuntimeError)):
            run.report(loss=value)


def test_a_process_that_a_worker_started_knows_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(current.RUN, str(tmp_path / "tiny-k3f9"))
    monkeypatch.setenv(current.CHECKPOINTS, str(tmp_path / "there"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    run = dtrain.current_run()
    assert (run.name, run.attempt, run.checkpoint_dir) == ("tiny-k3f9", 3, tmp_path / "there")
    run.report(loss=1.0)


def test_dtrain_is_light_until_it_is_used() -> None:
    code = "import sys, dtrain; dtrain.current_run().report; print(*sorted(m for m in sys.modules if m in {0}))"
    heavy = ("torch", "numpy", "ray", "msgspec", "yaml", "rich", "click")
    done = subprocess.run(
        [sys.executable, "-c", code.format(heavy)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == ""
    assert {"Task", "Phase", "Sample", "submit", "current_run"} <= set(dir(dtrain))
    for name in dtrain._HOMES:
        assert getattr(dtrain, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'dtrain' has no attribute 'sumbit'"):
        dtrain.sumbit  # noqa: B018
