"""The shipped jobs run to their end, made small with `--set`."""

from pathlib import Path

import pytest
from desk import Desk
from PIL import Image

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


OTHERS = {
    "bert_small.yaml": [*SMALL_TEXT, "data.tokenizer.vocab_size=300", "schedule.warmup_steps=1"],
    "lstm_timeseries.yaml": ["schedule.warmup_steps=1"],
    "resnet18_digits.yaml": ["model.width=8", "schedule.warmup_steps=1"],
    "vit_digits.yaml": ["schedule.warmup_steps=1"],
    "dcgan_digits.yaml": ["model.generator_width=4", "model.discriminator_width=4"],
    "vae_digits.yaml": ["model.width=4", "schedule.warmup_steps=1"],
}
"""What else fits two cores, and what makes it small."""


def width(path: Path) -> int:
    with Image.open(path) as image:
        return image.width


@pytest.mark.parametrize("job", OTHERS)
def test_another_job_in_miniature(desk: Desk, job: str) -> None:
    words = ["submit", str(JOBS / job), "-c", str(desk.cluster)]
    for setting in ["train.steps=4", "evaluate.every_steps=2", "evaluate.samples=8", *OTHERS[job]]:
        words += ["--set", setting]
    shown = desk.dtrain(*words, timeout=110).stdout
    run = runs.list_runs(desk.storage)[-1]
    assert run.record.state == "succeeded", run.record
    assert run.record.outcome["metrics"]["loss"] > 0
    assert [line["step"] for line in run.metrics() if "held_out" in line] == [2, 4]
    if job in ("dcgan_digits.yaml", "vae_digits.yaml"):
        pictures = sorted(path.name for path in run.samples.iterdir())
        assert pictures == ["step-00000002.png", "step-00000004.png"]
        assert "step-00000004.png" in shown
        assert width(run.samples / pictures[0]) >= 512
        drawn = desk.dtrain("sample", run.id, "--storage", str(desk.storage)).stdout.strip()
        assert width(Path(drawn)) >= 512


def test_every_shipped_job_is_run_or_planned() -> None:
    """A job that is neither in these tests nor among the golden plans would be nobody's."""
    golden = {path.name.partition(".")[0] for path in (JOBS.parent / "tests" / "golden").glob("*.json")}
    assert {path.stem for path in JOBS.glob("*.yaml")} <= golden
