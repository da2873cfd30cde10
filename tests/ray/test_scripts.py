"""Code that is not dtrain's: unmodified scripts written for `torchrun` and `accelerate launch`, and one's own tasks."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from desk import JOB, Desk, kill, pid_of

import dtrain
from dtrain import runs
from dtrain.errors import TrainingError
from dtrain.runs import Run

SCRIPTS = Path(__file__).parent / "scripts"
TRAINER = "--output_dir {checkpoint_dir} --max_steps 60 --save_steps 10 --logging_steps 10 --report_to none --use_cpu"
FOREIGN = {
    "plain_ddp": (
        "14 --save-every 2 --snapshot {checkpoint_dir}/snapshot.pt",
        lambda folder: (folder / "snapshot.pt").exists(),
        "resuming from epoch",
        "epoch 13 loss",
    ),
    "hugging_face_trainer": (
        f"{TRAINER} --per_device_train_batch_size 4 --disable_tqdm True --save_total_limit 2",
        lambda folder: any((p / "trainer_state.json").exists() for p in folder.glob("checkpoint-*")),
        "resuming from",
        "done at step 60",
    ),
    "accelerate_complete": (
        "--output_dir {checkpoint_dir} --checkpointing_steps 40 --num_epochs 4",
        lambda folder: any(folder.glob("step_*/done")),
        "resuming from step",
        "done after 452 steps",
    ),
    "lightning_digits": (
        "--folder {checkpoint_dir} --steps 600 --save-every 50",
        lambda folder: (folder / "last.ckpt").exists(),
        r"starting at step [1-9]",
        "done at step 600",
    ),
}
SLOW = ("hugging_face_trainer", "lightning_digits")


def submit(desk: Desk, script: Path, args: str = "", detach: bool = False, **changes: Any) -> Run:
    """A run of a script on both cores."""
    job = desk.root / f"{script.stem}.yaml"
    name = script.stem.replace("_", "-")[:30]
    job.write_text(
        yaml.safe_dump({"name": name, "entrypoint": {"script": str(script), "args": args.split()}, **changes})
    )
    desk.dtrain("submit", str(job), "-c", str(desk.cluster), *(["--detach"] if detach else []), check=False)
    return runs.list_runs(desk.storage)[-1]


def own(desk: Desk, name: str, text: str) -> Path:
    path = desk.root / name
    path.write_text(text)
    return path


def until(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def log(run: Run) -> str:
    return "".join(path.read_text() for path in sorted(run.logs.glob("rank-*.log")))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in sorted(FOREIGN)]
)
def test_a_foreign_script_survives_a_killed_rank_by_its_own_means(desk: Desk, name: str) -> None:
    args, has_saved, resumed, ended = FOREIGN[name]
    run = submit(desk, SCRIPTS / f"{name}.py", args, detach=True)
    desk.until(run, lambda record: record.ended or has_saved(run.checkpoints), timeout=100)
    assert not run.record.ended, (run.record, log(run))
    kill(pid_of(run, "rank-1"))
    record = desk.ended(run, timeout=100)
    assert record.state == "succeeded", (record, log(run))
    first, second = record.attempts
    assert first.failure == "killed"
    assert "rank 1 was killed by SIGKILL" in (first.cause or "")
    assert second.failure is None
    whole = log(run)
    _before, _, after = whole.partition("--- attempt 2 ---")
    assert re.search(resumed, after), whole
    assert ended in after


REPORTS = """
import os, sys, time
import dtrain

run = dtrain.current_run()
assert os.environ["RANK"] in "01" and os.environ["WORLD_SIZE"] == "2", os.environ
assert run.checkpoint_dir == __import__("pathlib").Path(os.environ["DTRAIN_CHECKPOINT_DIR"])
assert os.environ["TORCHELASTIC_RESTART_COUNT"] == str(run.attempt - 1)
import helper                                     # beside the script
what = sys.argv[1]
for step in range(1, 21):
    run.report(step=step, loss=1 / step, lr=0.1)
    time.sleep(0.02)
    if step == 10 and run.attempt == 1 and what == "hang":
        time.sleep(1000)
    if step == 10 and what == "leave" and os.environ["RANK"] == "1" and run.attempt == 1:
        sys.exit(7)
    if step == 10 and what == "raise" and os.environ["RANK"] == "1":
        raise ValueError("this will never do")
    if step == 10 and what == "stay":
        time.sleep(1000)
run.report(step=20, held_out={"loss": 0.25})
print("in", os.getcwd(), "threads", os.environ["OMP_NUM_THREADS"], sys.argv)
"""


@pytest.fixture
def reporting(desk: Desk) -> Path:
    own(desk, "helper.py", "")
    return own(desk, "reporting.py", REPORTS)


def test_what_a_script_reports_is_kept_and_shown(desk: Desk, reporting: Path) -> None:
    run = submit(desk, reporting, "end 1e-3 7")
    record = run.record
    assert record.state == "succeeded", (record, log(run))
    assert (record.num_steps, record.outcome["steps"]) == (0, 20)
    assert record.outcome["metrics"] == {"loss": 0.25}
    lines = [line for line in run.metrics() if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 21)), "of worker 0 alone"
    assert lines[9]["loss"] == pytest.approx(0.1)
    assert lines[9]["learning_rate"] == 0.1
    assert lines[9]["steps_per_s"] > 0
    assert list(run.tensorboard.glob("events.out.tfevents.*"))
    assert f"in {desk.root} threads 1 ['{reporting}', 'end', '1e-3', '7']" in log(run)
    status = desk.dtrain("status", run.id, "--storage", str(desk.storage)).stdout
    assert "step 20" in status
    assert "%" not in status
    assert run.id in desk.dtrain("ps", "--storage", str(desk.storage)).stdout


def test_a_script_that_falls_silent_is_started_again(desk: Desk, reporting: Path) -> None:
    run = submit(desk, reporting, "hang", retry={"hang_timeout_s": 1.5})
    record = run.record
    assert record.state == "succeeded", record
    assert [a.failure for a in record.attempts] == ["hung", None]
    assert "after step 10 was reported" in (record.attempts[0].cause or "")
    assert "reporting.py" in log(run).partition("--- attempt 2 ---")[0], "its stacks"


def test_a_script_that_leaves_with_a_code_is_started_again(desk: Desk, reporting: Path) -> None:
    run = submit(desk, reporting, "leave")
    assert [a.failure for a in run.record.attempts] == ["exited", None], run.record
    assert "rank 1 left with exit code 7 after step" in (run.record.attempts[0].cause or "")


def test_an_exception_in_a_script_ends_the_run_with_its_traceback(desk: Desk, reporting: Path) -> None:
    run = submit(desk, reporting, "raise")
    record = run.record
    assert (record.state, record.exit_code, len(record.attempts)) == ("failed", 3, 1)
    assert record.cause == "rank 1: ValueError: this will never do"
    assert (record.error or "").splitlines()[1].startswith(f'  File "{reporting}", line')
    assert "runpy" not in (record.error or "")


def test_a_script_is_stopped(desk: Desk, reporting: Path) -> None:
    run = submit(desk, reporting, "stay", detach=True)
    desk.until_step(run, 10)
    ranks = [pid_of(run, name) for name in ("rank-0", "rank-1")]
    desk.dtrain("stop", run.id, "--storage", str(desk.storage))
    assert (run.record.state, run.record.exit_code) == ("stopped", 130)
    assert run.record.cause.startswith("stopped by dtrain stop after step 10")
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), 5)
    desk.dtrain("resume", run.id, "--storage", str(desk.storage), "--detach")
    desk.until(run, lambda record: record.state == "running" and len(record.attempts) == 2)
    desk.dtrain("stop", run.id, "--storage", str(desk.storage))


def test_what_a_script_started_ends_with_it(desk: Desk) -> None:
    script = own(
        desk,
        "parent.py",
        "import os, subprocess, time\n"
        "from dtrain import current_run\n"
        "child = subprocess.Popen(['sleep', '1000'])\n"
        "folder = current_run().checkpoint_dir\n"
        "(folder / f'child-{os.environ[\"RANK\"]}-{current_run().attempt}').write_text(str(child.pid))\n"
        "time.sleep(1000 if current_run().attempt == 1 else 0)\n",
    )
    run = submit(desk, script, detach=True)
    files = [run.checkpoints / f"child-{rank}-1" for rank in (0, 1)]
    until(lambda: all(f.exists() and f.read_text() for f in files))
    os.kill(pid_of(run, "rank-0"), signal.SIGKILL)
    assert desk.ended(run).state == "succeeded"
    children = [int(f.read_text()) for f in run.checkpoints.glob("child-*")]
    assert len(children) == 4
    until(lambda: not any(_is_alive(pid) for pid in children), 5)


ENDS_AFTER_A_COLLECTIVE = """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def train():
    group = dist.new_group()
    model = DistributedDataParallel(torch.nn.Linear(4, 4), process_group=group)
    model(torch.ones(2, 4)).sum().backward()
    parts = [torch.zeros(()) for _ in range(2)]
    dist.all_gather(parts, torch.ones(()), group=group)
    dist.destroy_process_group(group)


dist.init_process_group("gloo")
for _ in range(150):
    train()
"""


def test_a_script_may_end_right_after_a_collective(desk: Desk) -> None:
    """Freeing a process group would now and then wait for ever; so often in a row, always."""
    run = submit(desk, own(desk, "short.py", ENDS_AFTER_A_COLLECTIVE), detach=True)
    assert desk.ended(run, timeout=60).state == "succeeded", log(run)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# -- from Python -------------------------------------------------------------------------------------------------


def test_a_run_from_python(desk: Desk) -> None:
    run = dtrain.submit(JOB, desk.cluster, {"train.steps": 20, "checkpoint.every_steps": 10})
    record = run.wait(60)
    assert record.state == "succeeded"
    assert run.metrics()[-1]["held_out"]["loss"] == record.outcome["metrics"]["loss"]
    assert run.best_checkpoint == run.path / "checkpoints" / "step-00000020"
    assert "rank 1 | --- attempt 1" in run.logs()
    job = {
        "name": "bad",
        "entrypoint": {"script": str(own(desk, "bad.py", "raise ValueError('this will never do')\n"))},
    }
    failed = dtrain.submit(job, desk.cluster)
    with pytest.raises(TrainingError, match="ValueError: this will never do"):
        failed.wait(60)


# -- a task of one's own -----------------------------------------------------------------------------------------


def test_what_init_writes_runs_as_it_is(desk: Desk) -> None:
    desk.dtrain("init", "mine")
    done = desk.dtrain("submit", "mine/job.yaml", "-c", str(desk.cluster), "--set", "train.steps=60")
    run = runs.list_runs(desk.storage)[-1]
    assert run.record.state == "succeeded", done.stdout
    assert run.record.outcome["metrics"]["accuracy"] > 0.7
    assert "the model has 58,314 parameters" in done.stdout
    (path,) = [Path(p) for p in run.plan.code if p.endswith("task.py")]
    path.write_text(path.read_text() + "\n# changed\n")
    run.update(state="failed")
    again = desk.dtrain("resume", run.id, "--storage", str(desk.storage), check=False)
    assert "task.py is not what it was when the run was submitted" in again.stderr


def test_a_task_that_cannot_be_imported_names_file_line_and_rank(desk: Desk) -> None:
    desk.dtrain("init", "broken", "--model", "mlp")
    task = desk.root / "broken" / "task.py"
    task.write_text("import no_such_module\n" + task.read_text())
    done = desk.dtrain("submit", "broken/job.yaml", "-c", str(desk.cluster), check=False)
    record = runs.list_runs(desk.storage)[-1].record
    assert (done.returncode, record.state, len(record.attempts)) == (3, "failed", 1)
    assert record.cause.startswith("rank ")
    assert f": {task}:1: {task} cannot be imported: ModuleNotFoundError" in record.cause
    assert f'File "{task}", line 1, in <module>' in (record.error or "")
    assert "importlib" not in (record.error or "")
