"""What training measures, as it stands in metrics.jsonl and on TensorBoard."""

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dtrain.runs import Run
from dtrain.runtime.scribe import Scribe


def board(run: Run) -> EventAccumulator:
    found = EventAccumulator(str(run.tensorboard))
    found.Reload()
    return found


def test_a_reading_is_a_line_and_a_point_on_each_curve(tmp_path):
    run = Run(tmp_path)
    scribe = Scribe(run)
    scribe.write(1, {"step": 10, "loss": 2.5, "tokens_per_s": 1000, "generator/loss": 0.25, "note": "no number"})
    scribe.write(2, {"step": 20, "loss": 1.5, "held_out": {"loss": 1.75}})
    scribe.close()
    assert [(line["attempt"], line["step"], line["loss"]) for line in run.metrics()] == [(1, 10, 2.5), (2, 20, 1.5)]
    curves = {tag: [(p.step, p.value) for p in board(run).Scalars(tag)] for tag in board(run).Tags()["scalars"]}
    assert curves == {
        "train/loss": [(10, 2.5), (20, 1.5)],
        "speed/tokens_per_s": [(10, 1000.0)],
        "generator/loss": [(10, 0.25)],
        "held_out/loss": [(20, 1.75)],
    }


def test_pictures_are_on_the_board(tmp_path):
    run = Run(tmp_path)
    scribe = Scribe(run)
    file = tmp_path / "grid.png"
    Image.fromarray(np.zeros((8, 12), dtype=np.uint8)).save(file)
    scribe.show(file, 30)
    scribe.show(tmp_path / "none.png", 40)
    scribe.close()
    (picture,) = board(run).Images("samples")
    assert (picture.step, picture.height, picture.width) == (30, 8, 12)


def test_a_board_that_cannot_be_written_loses_no_line(tmp_path):
    run = Run(tmp_path)
    run.tensorboard.write_text("in the way")
    scribe = Scribe(run)
    scribe.write(1, {"step": 10, "loss": 2.5})
    scribe.close()
    assert len(run.metrics()) == 1
