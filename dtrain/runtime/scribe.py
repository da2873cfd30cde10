"""Writes what training measures: metrics.jsonl and TensorBoard event files. In the agent, so that no rank waits."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

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
        self._board: SummaryWriter | None = None
        with contextlib.suppress(OSError):
            self._board = SummaryWriter(str(run.tensorboard))

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
        for tag, value in scalars.items():
            self._on_board(tag, float(value), step)

    def show(self, file: Path, step: int) -> None:
        """A grid of pictures that the model made."""
        if self._board is not None:
            with contextlib.suppress(OSError), Image.open(file) as image:
                self._board.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()

    def _on_board(self, tag: str, value: float, step: int) -> None:
        if self._board is None:
            return
        try:
            self._board.add_scalar(tag, value, step)
        except OSError:
            self._board = None
