"""A run that is resumed must find the data that it was trained on."""

from desk import Desk


def test_a_corpus_that_changed_is_refused_and_an_unchanged_one_goes_on(desk: Desk) -> None:
    text = desk.root / "book.txt"
    text.write_text("".join(f"Line {n} of a book that is long enough to be read.\n" for n in range(4000)))
    run, _ = desk.submit(f"data.source={text}", "train.steps=100000", "checkpoint.every_steps=50", detach=True)
    desk.until_step(run, 60)
    desk.dtrain("stop", run.id, "--storage", str(desk.storage))
    assert desk.ended(run).state == "stopped"

    old = text.read_text()
    text.write_text(old.replace("book", "look"))
    refused = desk.dtrain("resume", run.id, "--storage", str(desk.storage), check=False)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    said = " ".join((refused.stdout + refused.stderr).split())
    assert "the data is not what step-" in said
    assert "put the old data back, or submit a new run" in said
    assert run.record.error_kind == "input"

    text.write_text(old)
    desk.dtrain("resume", run.id, "--storage", str(desk.storage), "--detach")
    desk.until(run, lambda record: record.state == "running")
    assert run.record.attempts[-1].source.startswith("step-")
    desk.dtrain("stop", run.id, "--storage", str(desk.storage))
    desk.ended(run)
