"""Writes what training measures: metrics.jsonl and TensorBoard event files. In the agent, so that no rank waits."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard.summary import image

from dtrain.runs import Run

GROUPS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "steps_per_s": "speed/steps_per_s",
    "samples_per_s": "speed/samples_per_s",
    "tokens_per_s": "speed/tokens_per_s",
}


class Scribe:
    """Where metrics go. A full disk loses metrics, never the run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._board: FileWriter | None = None
        with contextlib.suppress(OSError):
            self._board = FileWriter(str(run.tensorboard))

    def write(self, attempt: int, metrics: Mapping[str, Any]) -> None:
        """One reading of a step: numbers of training, or `held_out` figures."""
        self._run.metric(attempt=attempt, **metrics)
        step = int(metrics["step"])
        scalars = {
            GROUPS.get(name, name if "/" in name else f"train/{name}"): value
            for name, value in metrics.items()
            if name != "step" and isinstance(value, int | float)
        }
        scalars |= {f"held_out/{name}": value for name, value in metrics.get("held_out", {}).items()}
        # One event for all: an event each, as `SummaryWriter` has it, costs the workers' cores several times that.
        self._on_board(Summary(value=[Summary.Value(tag=t, simple_value=float(v)) for t, v in scalars.items()]), step)

    def show(self, file: Path, step: int) -> None:
        """A grid of pictures that the model made."""
        with contextlib.suppress(OSError), Image.open(file) as picture:
            self._on_board(image("samples", np.asarray(picture.convert("RGB")), dataformats="HWC"), step)

    def close(self) -> None:
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()

    def _on_board(self, summary: Summary, step: int) -> None:
        if self._board is not None:
            try:
                self._board.add_summary(summary, step)
            except OSError:
                self._board = None
