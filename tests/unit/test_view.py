"""What a person sees of a run, on a terminal and without one."""

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import FOUR_GPUS, a_plan, a_run
from rich.console import Console

from dtrain import runs
from dtrain.view import follow, outcome, tables, words
from dtrain.view import plan as plan_view

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[()][A-Z0-9]")


def shown(renderable: Any, width: int = 100, **options: Any) -> str:
    """What a renderable looks like without colours."""
    out = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    out.print(renderable, **options)
    return out.file.getvalue()


def an_attempt(number: int, **changes: Any) -> runs.Attempt:
    return runs.Attempt(**{"number": number, "started_at": 1000.0, "from_step": 0, "source": "scratch", **changes})


def a_finished_run(storage: Path, **changes: Any) -> runs.Run:
    run = a_run(storage)
    (run.path / "events.jsonl").unlink()
    run.event("state", time=1000.0, state="queued", cause="submitted")
    run.metric(
        time=1001.0,
        step=50,
        attempt=1,
        loss=2.5,
        learning_rate=6e-4,
        grad_norm=0.5,
        steps_per_s=4.0,
        tokens_per_s=17_600,
    )
    run.metric(time=1002.0, step=50, attempt=1, held_out={"loss": 2.6, "bits_per_byte": 3.75})
    killed_at = "rank 1 was killed by SIGKILL at step 52"
    run.event("failure", time=1003.0, message=killed_at)
    run.event("state", time=1004.0, state="recovering", cause=killed_at)
    run.event("state", time=1005.0, state="running", cause="2 workers go on from the snapshot of step 50")
    run.event("checkpoint", time=1006.0, message="checkpoint step-00000100 is written")
    run.event("snapshot", time=1007.0, step=60)
    run.metric(
        time=1008.0,
        step=100,
        attempt=2,
        loss=1.5,
        learning_rate=1e-5,
        grad_norm=0.4,
        steps_per_s=4.0,
        tokens_per_s=17_600,
    )
    killed = an_attempt(1, ended_at=1010.0, last_step=52, cause="rank 1 was killed", failure="killed")
    done = an_attempt(2, started_at=1011.0, from_step=50, source="snapshot", ended_at=1020.0, last_step=100)
    run.update(
        **{
            "state": "succeeded",
            "cause": "all steps are done",
            "exit_code": 0,
            "created_at": 990.0,
            "started_at": 1000.0,
            "ended_at": 1020.0,
            "attempts": (killed, done),
            "outcome": {
                "metrics": {"loss": 1.32, "bits_per_byte": 1.92},
                "yardsticks": {"bits_per_byte": {"gzip -9": 2.4, "xz -9e": 1.6}},
                "sample": "def main():\n\treturn \x1b[31m1\n",
                "steps": 100,
                "train_seconds": 20.0,
            },
            **changes,
        }
    )
    return run


# -- words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.count(1234), "1,234"),
        (words.count(17_600), "17.6k"),
        (words.count(999_999), "1M"),
        (words.count(124_439_808), "124M"),
        (words.flops(6.46e11), "646 GFLOP"),
        (words.flops(0), "0 FLOP"),
        (words.size(3 * 2**20), "3 MiB"),
        (words.duration(0.42), "0.4s"),
        (words.duration(59.7), "1m 00s"),
        (words.duration(192), "3m 12s"),
        (words.duration(7500), "2h 05m"),
        (words.duration(90_000), "1d 01h"),
        (words.duration(None), "-"),
        (words.duration(float("inf")), "-"),
        (words.age(3), "just now"),
        (words.age(200), "3m ago"),
        (words.measure(1.32524), "1.3252"),
        (words.measure(float("nan")), "nan"),
        (words.measure(1e-7), "1.000e-07"),
        (words.rate(6e-4), "6.0e-4"),
        (words.rate(0.0), "0"),
        (words.plural(1, "worker"), "1 worker"),
        (words.plural(2000, "step"), "2,000 steps"),
    ],
)
def test_numbers_and_times_in_words(said, expected):
    assert said == expected


@given(st.text(st.characters()))
def test_no_text_moves_the_cursor_or_changes_the_terminal(text):
    assert all(c.isprintable() or c in "\n\t" for c in words.visible(text))


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_every_number_can_be_said(number):
    for say in (words.count, words.measure, words.rate, words.duration):
        assert say(number)


# -- the plan --------------------------------------------------------------------------------------------------


def test_a_plan_says_its_batch_arithmetic_and_what_was_resolved():
    text = shown(plan_view.show(a_plan("/data/runs", batch={"global": 64, "micro": 8})))
    assert "64 = 2 workers x 8 micro x 4 accumulation" in text
    assert "2 CPU workers (gloo)" in text
    for word in ("parameters", "tokens a step", "FLOP a step", "/data/runs", "resolved", "device: CPUs (found no GPU"):
        assert word in text
    assert "warnings" not in text


def test_a_plan_on_gpus_says_so():
    assert "4 GPU workers (nccl)" in shown(plan_view.show(a_plan(machine=FOUR_GPUS)))


# -- following -------------------------------------------------------------------------------------------------


def following(run: runs.Run, **options: Any) -> tuple[runs.Record | None, str]:
    """What following a run without a terminal prints."""
    out = Console(file=io.StringIO(), width=10_000, markup=False, highlight=False)
    record = follow.follow(run, out, ask=lambda: "detach", stop=lambda: None, **options)
    return record, out.file.getvalue()


def test_without_a_terminal_each_event_and_evaluation_is_a_line(tmp_path):
    record, text = following(a_finished_run(tmp_path))
    assert record is not None
    assert record.state == "succeeded"
    lines = [line[10:] for line in text.splitlines()]
    assert lines == [
        "queued: submitted",
        "step 50   held out: loss 2.6000   bits per byte 3.7500",
        "rank 1 was killed by SIGKILL at step 52",
        "running: 2 workers go on from the snapshot of step 50",
        "checkpoint step-00000100 is written",
        "step 100/100   loss 1.5000   lr 1.0e-5   gradient 0.4000   steps/s 4   tokens/s 17.6k",
    ]


def test_what_happened_before_is_not_told_again_when_asked_so(tmp_path):
    _, text = following(a_finished_run(tmp_path), from_now=True)
    assert text == ""


def test_training_lines_come_at_most_every_two_seconds(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(follow.time, "monotonic", lambda: now[0])
    out = Console(file=io.StringIO(), width=200)
    view, progress = follow._Plain(out), follow.Progress()
    run = a_run(tmp_path)
    for step in range(1, 101):  # ten lines a second for ten seconds
        line = {"step": step, "loss": 1.0, "time": 0.0}
        progress.take(line)
        view.metric(line)
        view.draw(progress, run.stored_record())
        now[0] += 0.1
    assert 4 <= len(out.file.getvalue().splitlines()) <= 6


def test_a_run_is_followed_to_an_end_that_comes_later(tmp_path):
    run = a_run(tmp_path, state="running", cause="x")

    run.metric(step=98, attempt=1, loss=1.0)

    def end() -> None:
        run.metric(step=99, attempt=1, loss=1.0)
        run.metric(step=100, attempt=1, loss=1.0)
        run.event("checkpoint", message="the last checkpoint")
        run.update(state="succeeded", cause="done", exit_code=0)

    threading.Timer(0.3, end).start()
    record, text = following(run)
    assert record is not None
    assert record.state == "succeeded"
    assert "the last checkpoint" in text
    assert "step 100/100" in text


def test_a_run_whose_driver_dies_is_not_followed_for_ever(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    run = a_run(tmp_path, state="running", driver_pid=gone.pid)
    (run.path / "lease").touch()
    record, _ = following(run)
    assert record is not None
    assert (record.state, record.exit_code) == ("lost", 5)


def test_a_run_that_no_driver_takes_up_is_remarked_on(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "UNTAKEN_S", 0.0)
    run = a_run(tmp_path)
    threading.Timer(0.5, lambda: run.ask_to_stop("me")).start()
    _, text = following(run)
    assert "no driver has taken this run up" in text
    assert f"dtrain logs {run.path} --driver" in text


def test_a_torn_last_line_is_read_once_it_is_whole(tmp_path):
    run = a_run(tmp_path)
    reader = follow.Reader(run)
    path = run.path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": ')
    assert [line["step"] for kind, line in reader.poll() if kind == "metric"] == [1]
    with path.open("a") as file:
        file.write("2}\n")
    assert [line["step"] for kind, line in reader.poll() if kind == "metric"] == [2]
    assert reader.poll() == []


def test_the_time_left_is_counted_at_the_recent_pace_of_this_attempt():
    progress = follow.Progress()
    assert progress.eta_s(100, now=0.0) is None
    progress.take({"step": 10, "attempt": 1, "steps_per_s": 1.0, "time": 0.0})
    progress.take({"step": 20, "attempt": 2, "steps_per_s": 4.0, "time": 10.0})
    assert progress.eta_s(100, now=10.0) == pytest.approx(20.0)
    assert progress.eta_s(100, now=15.0) == pytest.approx(15.0)
    assert progress.eta_s(100, now=1000.0) == 0.0


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_panel_fits_the_terminal(tmp_path, width):
    record = a_finished_run(tmp_path, state="recovering", cause="rank 1 was killed by SIGKILL at step 334 " * 3).record
    progress = follow.Progress()
    progress.take({"step": 50, "attempt": 2, "loss": 1.0, "learning_rate": 1e-3, "grad_norm": 1.0, "time": 0.0})
    progress.take({"step": 50, "held_out": {"loss": 1.0, "bits_per_byte": 2.0}})
    text = shown(follow.panel(progress, record, 1010.0, width), width)
    assert all(len(line) <= width for line in text.splitlines())
    for figure in ("loss 1.0000", "held out 2.0000 bits/byte", "lr 1.0e-3", "gradient 1.0000", "elapsed 10s"):
        assert figure in text
    if width >= 80:
        for word in (
            record.id,
            "recovering",
            "attempt 2",
            "step 50/100",
            "50%",
        ):
            assert word in text


# -- a real terminal -------------------------------------------------------------------------------------------


class Terminal:
    """A command on a pseudo-terminal, and all it wrote."""

    def __init__(self, *command: str, columns: int = 100) -> None:
        self._end, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color"}
        environment.pop("COLUMNS", None)
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=environment,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        self.raw = ""

    def until(self, word: str | None, timeout_s: float = 20.0) -> str:
        """Read until `word` was written, or the command has ended."""
        deadline = time.monotonic() + timeout_s
        while word is None or word not in self.text:
            if time.monotonic() > deadline:
                raise AssertionError(f"{word!r} was not shown; all that was: {self.text!r}")
            if select.select([self._end], [], [], 0.1)[0]:
                try:
                    self.raw += os.read(self._end, 65536).decode(errors="replace")
                except OSError:  # its other end is closed
                    break
        assert word is None or word in self.text, self.text
        return self.text

    @property
    def text(self) -> str:
        return ESCAPES.sub("", self.raw)

    def type(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def end(self) -> int:
        self.until(None)
        return self.process.wait(10)


@pytest.fixture
def terminal():
    started = []

    def start(*command: str, **options: Any) -> Terminal:
        started.append(Terminal(*command, **options))
        return started[-1]

    yield start
    for opened in started:
        opened.process.kill()
        opened.process.wait()
        os.close(opened._end)


def dtrain(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dtrain", *arguments]


@pytest.fixture
def driven(tmp_path):
    """A run under way, whose lease this process holds."""
    run = a_run(tmp_path)
    run.acquire()
    run.update(state="running", cause="2 workers", driver_pid=os.getpid(), started_at=time.time())
    run.metric(step=42, attempt=1, loss=1.5, learning_rate=1e-3, grad_norm=0.5, steps_per_s=4.0, tokens_per_s=1000)
    yield run
    run.release()


def follow_command(run: runs.Run) -> list[str]:
    return dtrain("status", run.id, "-f", "--storage", str(run.path.parent))


def test_on_a_terminal_there_is_a_bar_and_events_are_lines_above_it(driven, terminal):
    tty = terminal(*follow_command(driven))
    tty.until("step 42/100  42%")
    tty.until("loss 1.5000")
    driven.event("checkpoint", message="checkpoint step-00000050 is written")
    tty.until("checkpoint step-00000050 is written")
    driven.update(state="failed", cause="rank 1 raised ValueError at step 43", exit_code=3, error_kind="training")
    assert tty.end() == 3
    assert "rank 1 raised ValueError at step 43" in tty.text
    assert tty.raw.rfind("\x1b[?25h") > tty.raw.rfind("\x1b[?25l")  # the cursor is back
    assert "\x1b[2K" in tty.raw[tty.raw.rfind("42%") :]  # and the bar is gone


def test_ctrl_c_asks_and_goes_on(driven, terminal):
    tty = terminal(*follow_command(driven))
    tty.until("step 42/100")
    tty.type("\x03")
    tty.until("[d]etach and let it run, [s]top after a checkpoint, or [c]ontinue?")
    tty.type("c")
    tty.until("continue\r\n")
    driven.metric(step=43, attempt=1, loss=1.4)
    tty.until("step 43/100")
    driven.update(state="succeeded", exit_code=0)
    assert tty.end() == 0


def test_ctrl_c_can_stop_the_run(driven, terminal):
    tty = terminal(*follow_command(driven))
    tty.until("step 42/100")
    tty.type("\x03")
    tty.until("[s]top")
    tty.type("s")
    deadline = time.monotonic() + 10
    while driven.stop_requested is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert driven.stop_requested == "Ctrl-C"
    driven.update(state="stopped", cause="asked by Ctrl-C", exit_code=130)
    assert tty.end() == 130


def test_ctrl_c_twice_detaches_and_the_run_goes_on(driven, terminal):
    tty = terminal(*follow_command(driven))
    tty.until("step 42/100")
    tty.type("\x03")
    tty.until("[d]etach")
    tty.type("\x03")
    assert tty.end() == 0
    assert f"{driven.id} goes on without you" in tty.text
    assert driven.stop_requested is None
    assert driven.record.state == "running"


def test_ctrl_c_without_a_terminal_detaches_and_says_how_to_come_back(driven):
    command = subprocess.Popen(
        follow_command(driven), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert command.stdout is not None
    following = threading.Event()

    def train() -> None:
        while not following.wait(0.1):
            driven.metric(step=43, attempt=1, loss=1.5)

    training = threading.Thread(target=train)
    training.start()
    while "step 43/100" not in command.stdout.readline():
        pass
    following.set()
    training.join()
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=20)
    assert command.returncode == 0
    assert f"`dtrain status {driven.path} -f` shows it" in said


# -- the end -----------------------------------------------------------------------------------------------------


def test_the_outcome_is_compared_honestly(tmp_path):
    run = a_finished_run(tmp_path)
    text = shown(outcome.show(run, run.record), soft_wrap=True)
    lines = [line.split() for line in text.splitlines()]
    ranking = [line for line in lines if line[:1] in (["xz"], ["this"], ["gzip"])]
    assert [" ".join(line) for line in ranking] == [
        "xz -9e 1.6000 this run is 20.0% worse",
        "this run 1.9200",
        "gzip -9 2.4000 this run is 20.0% better",
    ]
    assert "loss 1.3200" in text
    assert f"✓ {run.id} succeeded after 30s (20s of training): 100 steps, 2 attempts" in text
    assert "def main():" in text
    assert "\x1b" not in text
    assert f'dtrain sample {run.path} --prompt "def "' in text


def test_a_sample_is_offered_of_what_makes_one(tmp_path):
    metrics = {"accuracy": 0.99}
    drawn = a_finished_run(tmp_path, outcome={"metrics": metrics, "sample": None, "pictures": "step-00000100.png"})
    told = a_finished_run(tmp_path, outcome={"metrics": metrics, "sample": None})
    assert f"dtrain sample {drawn.path}  " in shown(outcome.show(drawn, drawn.record), soft_wrap=True)
    assert "dtrain sample" not in shown(outcome.show(told, told.record), soft_wrap=True)


def test_pictures_have_no_tokens():
    line = {"step": 1, "loss": 0.5, "tokens_per_s": 0.0}
    assert follow.training_figures(line) == [("loss", "0.5000")]
    assert ("tokens/s", "12") in follow.training_figures({**line, "tokens_per_s": 12})


def test_higher_is_better_for_accuracy():
    text = shown(
        outcome.comparison({"metrics": {"accuracy": 0.9}, "yardsticks": {"accuracy": {"majority": 0.6}}})[1], 100
    )
    assert text.index("this run") < text.index("majority")
    assert "50.0% better" in text


def test_figures_that_are_not_numbers_do_not_break_the_end(tmp_path):
    run = a_finished_run(
        tmp_path,
        outcome={"metrics": {"loss": "nan", "bits_per_byte": None}, "yardsticks": {"bits_per_byte": {"gzip": 2.0}}},
    )
    assert "loss nan" in shown(outcome.show(run, run.record), soft_wrap=True)


def test_a_failure_shows_the_users_own_traceback_and_the_next_move(tmp_path):
    traceback = 'Traceback (most recent call last):\n  File "mine.py", line 4, in loss\nValueError: no\n'
    run = a_finished_run(
        tmp_path,
        state="failed",
        cause="rank 1 raised ValueError at step 12: no",
        error=traceback,
        error_kind="training",
        exit_code=3,
        outcome={},
    )
    text = shown(outcome.show(run, run.record), soft_wrap=True)
    assert "rank 1 raised ValueError at step 12: no" in text
    assert '      File "mine.py", line 4, in loss\n' in text
    assert "Mend the code or the data it names" in text
    assert f"dtrain resume {run.path}" in text
    assert "sample" not in text


def test_a_run_that_ended_before_it_began_has_done_no_step(tmp_path):
    run = a_finished_run(tmp_path, state="failed", cause="no text file", error_kind="input", outcome={}, attempts=())
    assert ": 0 of 100 steps" in shown(outcome.show(run, run.record), soft_wrap=True)


def test_the_next_commands_work_where_they_are_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here, there = a_finished_run(tmp_path / "runs"), a_finished_run(tmp_path / "other")
    assert f"dtrain status {here.id} " in shown(outcome.show(here, here.record), soft_wrap=True)
    assert f"dtrain status other/{there.id} " in shown(outcome.show(there, there.record), soft_wrap=True)
    assert runs.find(Path("runs"), f"other/{there.id}").id == there.id


# -- tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120, 10_000])
def test_ps_has_a_line_a_run_and_shows_whole_names(tmp_path, width):
    a_finished_run(tmp_path)
    a_run(tmp_path, state="failed", cause="a long story\nof two lines " + "x" * 200)
    broken = a_run(tmp_path)
    (broken.path / "run.json").write_text("{")
    listed = runs.list_runs(tmp_path)
    text = shown(tables.ps(listed, width), width)
    assert len(text.splitlines()) == 4
    assert all(run.id in text for run in listed)
    assert "unreadable" in text
    assert "100/100" in text


def test_status_tells_attempts_and_checkpoints(tmp_path):
    run = a_finished_run(tmp_path)
    whole, torn = run.checkpoints / "step-00000100", run.checkpoints / "step-00000120"
    for folder in (whole, torn):
        folder.mkdir()
        (folder / "manifest.json").write_text(
            '{"step": 100, "files": {"a": {"bytes": 2048}}, "metrics": {"loss": 1.5}}'
        )
    (whole / tables.COMMITTED).write_text("")
    text = shown(tables.status(run))
    for word in ("succeeded", "step 100 of 100 (100%)", str(run.path), "killed  rank 1 was killed", "snapshot", "0-52"):
        assert word in text
    assert "step-00000100" in text
    assert "2 KiB" in text
    assert "step-00000120" not in text  # it was never finished


def test_the_marker_of_a_checkpoint_is_the_one_that_is_written():
    source = (Path(tables.__file__).parents[1] / "checkpoint" / "store.py").read_text()
    assert f'"{tables.COMMITTED}"' in source


def test_metrics_show_every_evaluation_in_a_screenful(tmp_path):
    run = a_run(tmp_path)
    for step in range(10, 1010, 10):
        run.metric(step=step, loss=1000 / step, learning_rate=1e-3, grad_norm=1.0, steps_per_s=3.0)
        if step % 250 == 0:
            run.metric(step=step, held_out={"loss": 1.0, "bits_per_byte": step / 1000})
    text = shown(tables.metrics(run.metrics(), everything=False))
    assert len(text.splitlines()) == 1 + tables.MAX_METRIC_LINES
    for figure in ("0.2500", "0.5000", "0.7500", "1.0000", "bits/byte"):
        assert figure in text
    assert len(shown(tables.metrics(run.metrics(), everything=True)).splitlines()) == 101
