"""The shipped jobs run to their end, made small with `--set`."""

from pathlib import Path

from conftest import Desk

from dtrain import runs

JOBS = Path(__file__).resolve().parents[2] / "jobs"
SMALL_TEXT = ["data.held_out_limit=16384", "data.held_out_context=0"]


def run_to_the_end(desk: Desk, job: str, *settings: str) -> tuple[runs.Run, str]:
    words = ["submit", str(JOBS / job), "-c", str(desk.cluster)]
    for setting in [*SMALL_TEXT, *settings]:
        words += ["--set", setting]
    done = desk.dtrain(*words, timeout=110)
    return runs.list_runs(desk.storage)[-1], done.stdout


def test_gpt_small(desk: Desk) -> None:
    run, shown = run_to_the_end(
        desk, "gpt_small.yaml", "train.steps=12", "train.log_every_steps=1", "schedule.warmup_steps=2"
    )
    record = run.record
    assert record.state == "succeeded"
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    assert losses[-1] < losses[0]
    assert "gzip -9" in shown
    assert "worse" in shown, "twelve steps do not beat gzip, and it is said"
    sample = desk.dtrain("sample", run.id, "--storage", str(desk.storage), "--prompt", "def ", "--length", "8")
    assert sample.stdout.startswith("def ")
    assert list(run.tensorboard.glob("events.out.tfevents.*"))


def test_gpt2_124m_in_miniature(desk: Desk) -> None:
    settings = ["model.num_layers=1", "model.num_heads=2", "model.width=32", "batch.global=2", "train.steps=3"]
    settings += ["data.tokenizer.vocab_size=300", "data.sequence_length=64", "schedule.warmup_steps=1"]
    run, _ = run_to_the_end(desk, "gpt2_124m.yaml", *settings, "train.compile=false")
    assert run.record.state == "succeeded"
