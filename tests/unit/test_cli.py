"""Every command as a person or a script meets it: what it prints, where, and what it exits with."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from making import a_run

from dtrain import cli, errors, runs, supervise
from dtrain.backends import local
from dtrain.errors import ClusterError
from dtrain.settings import to_json
from dtrain.view import help as help_view

JOB = """\
name: tiny
model: {name: transformer, num_layers: 2, num_heads: 2, width: 32}
data: {name: text}
batch: {global: 8}
optimizer: {name: adamw, lr: 1e-3}
train: {steps: 100}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty current folder with a job file in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("job.yaml").write_text(JOB)
    return tmp_path


@pytest.fixture
def dtrain(capsys, monkeypatch):
    """Runs a command in this process: (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dtrain", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def driver(monkeypatch):
    """Stands in for the cluster: what is sent to it is driven, in a thread, by the function it is given."""
    sent: list[Any] = []
    threads = []

    def install(drive: Any) -> list[Any]:
        def send(submission: Any, options: Any, say: Any) -> None:
            sent.append(submission)
            thread = threading.Thread(target=drive, args=(runs.Run(Path(submission.run_path)),))
            thread.start()
            threads.append(thread)

        monkeypatch.setattr(local, "send", send)
        return sent

    yield install
    for thread in threads:
        thread.join()


def succeed(run: runs.Run) -> None:
    run.update(state="running", cause="2 workers")
    run.metric(step=100, attempt=1, loss=1.5)
    run.update(
        state="succeeded",
        cause="all steps are done",
        exit_code=0,
        outcome={"metrics": {"bits_per_byte": 1.9}, "yardsticks": {"bits_per_byte": {"gzip -9": 2.2}}, "steps": 100},
    )


def fail(run: runs.Run) -> None:
    run.update(state="failed", cause="rank 1 raised ValueError", error_kind="training", exit_code=3)


def only_run() -> runs.Run:
    (run,) = runs.list_runs(Path("runs"))
    return run


# -- help --------------------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['dtrain', '--help']\n"
        "from dtrain.cli import main\n"
        "try:\n    main()\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    for name in cli.cli.commands:
        assert f"\n  {name} " in result.stdout
    loaded = set(result.stderr.split())
    assert "click" in loaded
    assert not loaded & {"torch", "ray", "msgspec", "rich", "yaml", "numpy"}


def test_help_names_every_exit_code():
    classes = [errors.DtrainError, *errors.DtrainError.__subclasses__()]
    for code in {0, *(c.exit_code for c in classes)}:
        assert f"\n  {code} " in help_view.EXIT_CODES
        assert code == 0 or f" {code}   " in (errors.__doc__ or "")


def test_version(dtrain):
    assert dtrain("--version") == (0, f"dtrain {cli.__version__}\n", "")


def test_a_mistyped_command_gets_a_suggestion(dtrain):
    code, out, err = dtrain("sumbit", "job.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("error: there is no command 'sumbit'; did you mean 'submit'?")


@pytest.mark.parametrize("arguments", [["submit"], ["ps", "--nonsense"], ["logs", "--rank", "-1"]])
def test_a_mistake_on_the_command_line_is_one_message(dtrain, arguments):
    code, _, err = dtrain(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert f"`dtrain {arguments[0]} --help` explains" in err


# -- asking ------------------------------------------------------------------------------------------------------


def test_validate_tells_all_mistakes_of_all_files(dtrain):
    Path("bad.yaml").write_text(JOB.replace("steps: 100", "steps: ten").replace("lr: 1e-3", "lrr: 1e-3"))
    Path("place.yaml").write_text("name: here\nbackend: {name: locl}\n")
    code, out, err = dtrain("validate", "bad.yaml", "job.yaml", "place.yaml", "none.yaml")
    assert code == 2
    assert out == "job.yaml: a valid job file (tiny)\n"
    for mistake in (
        "bad.yaml:5: optimizer.lrr is not a key; did you mean 'lr'?",
        "bad.yaml:6: train.steps",
        "none.yaml",
    ):
        assert mistake in err
    assert "place.yaml:2: backend.name: there is no backend 'locl'" in err
    assert "Traceback" not in err


def test_validate_knows_job_and_cluster_files_apart(dtrain):
    Path("place.yaml").write_text("name: here\nbackend: {name: local}\n")
    assert dtrain("validate", "job.yaml", "place.yaml") == (
        0,
        "job.yaml: a valid job file (tiny)\nplace.yaml: a valid cluster file (here)\n",
        "",
    )


def test_plan_for_a_machine_is_the_plan(dtrain):
    from dtrain.plan import Plan

    code, out, _ = dtrain("plan", "job.yaml", "--json", "--set", "train.steps=7", "--set", "cluster.storage=elsewhere")
    assert code == 0
    plan = Plan.from_json(out)
    assert (plan.train.steps, plan.storage) == (7, str(Path("elsewhere").absolute()))
    assert (plan.cluster, plan.backend.name) == ("local", "local")


def test_the_default_cluster_is_the_shipped_one(dtrain):
    shipped = Path(cli.__file__).parents[2] / "clusters" / "local.yaml"
    without = dtrain("plan", "job.yaml", "--json")
    assert dtrain("plan", "job.yaml", "--json", "--cluster", str(shipped)) == without


def test_a_cluster_file_at_hand_is_the_default(dtrain):
    Path("clusters").mkdir()
    Path("clusters/local.yaml").write_text("name: mine\nbackend: {name: local}\nworkers_per_node: 1\n")
    _, out, _ = dtrain("plan", "job.yaml", "--json")
    assert json.loads(out)["cluster"] == "mine"


def test_mistakes_in_job_and_cluster_are_told_together(dtrain):
    code, _, err = dtrain("plan", "job.yaml", "--set", "train.stepps=1", "--set", "cluster.nodez=2")
    assert code == 2
    assert "stepps is not a key; did you mean 'steps'" in err
    assert "nodez is not a key; did you mean 'nodes'" in err


def test_a_mistake_found_in_planning_has_its_file_and_line(dtrain):
    code, _, err = dtrain("plan", "job.yaml", "--set", "cluster.workers_per_node=3", "--set", "cluster.device=cpu")
    assert code == 2
    assert err == "error: job.yaml:4: batch.global 8 is not a multiple of 3 workers; nearest: 9\n"
    arguments = ["--set", "cluster.workers_per_node=2", "--set", "cluster.device=cpu", "--set", "batch.global=7"]
    _, _, err = dtrain("plan", "job.yaml", *arguments)
    assert err == "error: --set batch.global=7: batch.global 7 is not a multiple of 2 workers; nearest: 6\n"


@pytest.mark.parametrize("kind", ["job", "cluster"])
def test_schema_is_json_schema(dtrain, kind):
    code, out, _ = dtrain("schema", kind)
    assert code == 0
    assert json.loads(out)["$schema"].startswith("https://json-schema.org/")


# -- submit --------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_what_would_be_sent_and_leaves_nothing(dtrain, driver):
    sent = driver(succeed)
    code, out, _ = dtrain("submit", "job.yaml", "--dry-run")
    assert code == 0
    assert not Path("runs").exists()
    assert sent == []
    assert dtrain("submit", "job.yaml", "--dry-run")[1] == out, "two of them can be compared"
    previewed = json.loads(out)
    dtrain("submit", "job.yaml")
    (submission,) = sent
    really = json.loads(to_json(submission))

    def without_suffix(value: Any, name: str) -> Any:
        return json.loads(json.dumps(value).replace(Path(name).name, "RUN"))

    assert without_suffix(previewed, previewed["run_path"]) == without_suffix(really, really["run_path"])


def test_nobody_has_to_wait_for_a_cluster_that_brings_a_run_back(dtrain, monkeypatch):
    def waits(run, say):
        raise KeyboardInterrupt

    run = a_run(Path("runs"), state="running", driver_pid=1)
    monkeypatch.setattr(supervise, "revive", waits)
    code, _, err = dtrain("status", "-f")
    assert code == 0
    assert f"{run.id} goes on without you" in err


def test_submit_follows_to_the_end_and_exits_as_the_record_says(dtrain, driver):
    driver(succeed)
    code, out, err = dtrain("submit", "job.yaml", "--set", "train.seed=3")
    assert (code, err) == (0, "")
    assert "batch 8 = " in out
    assert "step 100/100" in out
    assert f"✓ {only_run().id} succeeded" in out
    assert "this run is 13.6% better" in out
    assert (only_run().path / "job.yaml").read_text() == JOB + "# --set train.seed=3\n"
    assert only_run().plan.train.seed == 3


def test_a_failed_run_ends_the_command_with_its_exit_code(dtrain, driver):
    driver(fail)
    code, out, _ = dtrain("submit", "job.yaml")
    assert code == 3
    assert "rank 1 raised ValueError" in out


def test_detached_the_name_of_the_run_is_all_there_is_on_standard_output(dtrain, driver):
    driver(lambda run: None)
    code, out, err = dtrain("submit", "job.yaml", "--detach")
    assert (code, out) == (0, only_run().id + "\n")
    assert "goes on without you" in err


@pytest.mark.parametrize("arguments", [["--detach"], []])
def test_submit_for_a_machine_prints_the_record(dtrain, driver, arguments):
    driver(succeed)
    code, out, _ = dtrain("submit", "job.yaml", "--json", *arguments)
    record = json.loads(out)
    assert code == 0
    assert (record["id"], record["path"]) == (only_run().id, str(only_run().path.absolute()))
    assert arguments or record["state"] == "succeeded"


def test_a_cluster_that_refuses_ends_the_run_at_once(dtrain, monkeypatch):
    def refuse(*_: Any) -> None:
        raise ClusterError("the Ray head ended while starting")

    monkeypatch.setattr(local, "send", refuse)
    code, _, err = dtrain("submit", "job.yaml")
    assert (code, err) == (5, "error: the Ray head ended while starting\n")
    record = only_run().record
    assert (record.state, record.exit_code) == ("failed", 5)
    assert "could not be handed to the cluster" in record.cause


def test_storage_that_cannot_be_written_is_exit_code_6(dtrain, driver):
    driver(succeed)
    Path("file").write_text("")
    code, _, err = dtrain("submit", "job.yaml", "--set", "cluster.storage=file")
    assert code == 6
    assert "choose another place with --set cluster.storage=FOLDER" in err


def test_a_bug_prints_its_traceback():
    code = (
        "import sys; sys.argv = ['dtrain', 'ps']\n"
        "from dtrain import cli, runs\n"
        "runs.list_runs = lambda storage: 1 / 0\n"
        "cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError" in result.stderr


# -- resume and stop -------------------------------------------------------------------------------------------------


def test_resume_hands_the_same_plan_over_again(dtrain, driver):
    run = a_run("runs", state="failed", cause="x", exit_code=4, error_kind="retries-exhausted")
    run.event("failure", message="an old story")
    sent = driver(succeed)
    code, out, _ = dtrain("resume", run.id[:6])
    assert code == 0
    assert Path(sent[0].run_path) == run.path.absolute()
    assert (run.record.state, run.record.submissions) == ("succeeded", 2)
    assert "an old story" not in out


def test_resume_refuses_what_has_succeeded_or_is_under_way(dtrain, driver):
    sent = driver(succeed)
    run = a_run("runs", state="succeeded", exit_code=0)
    code, _, err = dtrain("resume")
    assert code == 2
    assert "has succeeded" in err
    run.update(state="running", driver_pid=os.getpid())
    run.acquire()
    assert dtrain("resume")[0] == 2
    run.release()
    assert sent == []


def test_stop_waits_for_the_end(dtrain):
    run = a_run("runs", state="running", driver_pid=os.getpid())
    run.acquire()

    def drive() -> None:
        while run.stop_requested is None:
            time.sleep(0.01)
        run.update(state="stopping", cause="asked")
        time.sleep(0.2)
        run.update(state="stopped", cause="stopped by dtrain stop", exit_code=130)

    thread = threading.Thread(target=drive)
    thread.start()
    assert dtrain("stop") == (0, f"{run.id}: stopped (stopped by dtrain stop)\n", "")
    thread.join()
    assert dtrain("stop") == (0, f"{run.id} has already ended: stopped\n", "")
    run.release()


def test_a_stop_that_takes_too_long_says_what_to_do(dtrain):
    run = a_run("runs", state="running", driver_pid=os.getpid())
    run.acquire()
    code, _, err = dtrain("stop", "--timeout", "0.2")
    run.release()
    assert code == 5
    assert f"`dtrain logs {run.id} --driver`" in err
    assert run.stop_requested is not None


# -- looking -----------------------------------------------------------------------------------------------------------


def test_looking_before_there_is_anything(dtrain):
    assert dtrain("ps") == (0, "", "runs: no runs yet; `dtrain submit JOB` makes one\n")
    assert dtrain("ps", "--json") == (0, "[]\n", "")
    for command in ("status", "logs", "metrics", "stop", "resume", "sample"):
        code, _, err = dtrain(command)
        assert (code, err) == (2, "error: runs: there are no runs here yet; `dtrain submit JOB` makes one\n")


def test_ps_and_status_for_a_machine(dtrain):
    run = a_run("elsewhere", state="running", cause="2 workers")
    run.metric(step=42, attempt=1, loss=1.5)
    (listed,) = json.loads(dtrain("ps", "--json", "--storage", "elsewhere")[1])
    told = json.loads(dtrain("status", run.id, "--json", "--storage", "elsewhere")[1])
    for record in (listed, told):
        assert (record["id"], record["state"], record["step"], record["loss"]) == (run.id, "running", 42, 1.5)
    assert told["checkpoints"] == []


def test_metrics_for_a_machine_are_all_lines(dtrain):
    run = a_run("runs")
    for step in range(100):
        run.metric(step=step, loss=1.0)
    assert [line["step"] for line in json.loads(dtrain("metrics", "--json")[1])] == list(range(100))


@pytest.fixture
def logged():
    run = a_run("runs", state="succeeded", exit_code=0)
    for name in ("rank-0", "rank-1", "driver", "agent-0"):
        (run.logs / f"{name}.log").write_bytes(b"".join(f"{name} line {n}\n".encode() for n in range(5)) + b"\xff torn")
    (run.logs / "agent-0.log").write_bytes(b"first\nlast\n")
    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rank", "1", "-n", "2"], b"rank-1 line 4\n\xff torn\n"),
        (["--driver", "-n", "1"], b"\xff torn\n"),
        (["--agent", "-n", "1"], b"agent 0 | last\n"),
        (["--agent", "-n", "9"], b"agent 0 | first\nagent 0 | last\n"),
        (["-n", "2"], b"rank 0 | rank-0 line 4\nrank 0 | \xff torn\nrank 1 | rank-1 line 4\nrank 1 | \xff torn\n"),
        (["--rank", "0", "-n", "0"], b""),
    ],
)
def test_logs_are_printed_byte_for_byte(logged, arguments, expected):
    command = [sys.executable, "-m", "dtrain", "logs", logged.id, *arguments]
    result = subprocess.run(command, capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, expected, b"")


def test_a_log_that_is_not_there_names_those_that_are(dtrain, logged):
    code, _, err = dtrain("logs", "--rank", "7")
    assert code == 2
    assert "there is: agent-0.log, driver.log, rank-0.log, rank-1.log" in err


def test_following_logs_goes_on_until_the_run_has_ended():
    run = a_run("runs", state="running")
    log = run.logs / "rank-0.log"
    log.write_text("one\nhal")
    command = [sys.executable, "-m", "dtrain", "logs", "-f", "--rank", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "one\n"
        time.sleep(0.5)  # it has seen the half line by now, and waits for the rest
        with log.open("a") as file:
            file.write("f\nlast words")
        assert process.stdout.readline() == "half\n"
        run.update(state="succeeded", exit_code=0)
        assert process.stdout.read() == "last words\n"
        assert process.wait(10) == 0


def test_a_reader_that_leaves_is_no_error():
    run = a_run("runs", state="succeeded", exit_code=0)
    (run.logs / "rank-0.log").write_text("line\n" * 100_000)
    for step in range(20_000):
        run.metric(step=step, loss=1.0)
    # Unbuffered, Python drops what a broken pipe did not take and tells nobody.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for arguments in (["logs"], ["metrics", "--all"], ["metrics", "--json"]):
        command = [sys.executable, "-m", "dtrain", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.read(10)
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(10) == 141


def test_sample_prints_what_the_model_writes_and_nothing_that_moves_the_cursor(dtrain, monkeypatch):
    from dtrain.models import Request, Sample
    from dtrain.training import sample

    run = a_run("runs", state="succeeded", exit_code=0)
    asked = []

    def generate(*arguments: Any) -> str:
        asked.append(arguments)
        return Sample("def f():\n\x1b[2J\n")

    monkeypatch.setattr(sample, "generate", generate)
    code, out, _ = dtrain("sample", "--prompt", "def ", "--length", "5", "--temperature", "0", "--seed", "9")
    assert (code, out) == (0, "def f():\n\\x1b[2J\n\n")
    ((sampled, *rest),) = asked
    assert sampled.id == run.id
    assert rest == [Request(prompt="def ", length=5, temperature=0.0, seed=9)]


# -- cluster and completion -------------------------------------------------------------------------------------------


def test_cluster_commands_reach_the_backend(dtrain, monkeypatch):
    homes = []
    monkeypatch.setattr(local, "cluster_up", lambda options, say: homes.append(options.home))
    monkeypatch.setattr(local, "cluster_status", lambda options: {"state": "up", "runs": ["a", "b"]})
    monkeypatch.setattr(local, "cluster_down", lambda options: ["ended one", "ended two"])
    assert dtrain("cluster", "up", "--set", "cluster.backend.home=/x")[:2] == (0, "cluster local is up\n")
    assert homes == ["/x"]
    assert "a, b" in dtrain("cluster", "status")[1]
    assert json.loads(dtrain("cluster", "status", "--json")[1]) == {"state": "up", "runs": ["a", "b"]}
    assert dtrain("cluster", "down") == (0, "ended one\nended two\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(dtrain, shell):
    code, out, _ = dtrain("completion", shell)
    assert code == 0
    assert f"_DTRAIN_COMPLETE={shell}_complete" in out


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dtrain st", ["status", "stop"]),
        ("dtrain status ti", ["tiny-aaaa", "tiny-bbbb"]),
        ("dtrain status bb", ["tiny-bbbb"]),
        ("dtrain logs --storage other x", ["x-cccc"]),
        ("dtrain schema c", ["cluster"]),
    ],
)
def test_commands_and_names_of_runs_complete(line, expected):
    for name in ("runs/tiny-aaaa", "runs/tiny-bbbb", "other/x-cccc"):
        Path(name).mkdir(parents=True)
        Path(name, "run.json").write_text("{}")
    environment = {
        **os.environ,
        "_DTRAIN_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - 1),
    }
    command = [sys.executable, "-m", "dtrain"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert [item.partition(",")[2] for item in result.stdout.split()] == expected, result.stderr
