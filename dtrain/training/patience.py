"""When to stop early. What it remembers is part of the training state: a resumed run decides as it would have."""

import torch

from dtrain.checkpoint.pieces import Piece, whole
from dtrain.spec.job import StopEarly

BEST, WORSE, SEEN = range(3)


class Patience:
    """Counts evaluations that brought no better held-out loss.

    What it remembers lies on `device` as all training state does: a worker that is replaced gets it from the others.
    """

    def __init__(self, settings: StopEarly, device: torch.device | None = None) -> None:
        self._settings = settings
        self._memory = torch.tensor([float("inf"), 0.0, -1.0], dtype=torch.float64, device=device)
        self.state: list[Piece] = [whole("loop.patience", self._memory)]

    def consider(self, step: int, loss: float) -> None:
        """Count the held-out loss at `step`, once; all workers are given the same figure.

        When patience has run out that is final: an attempt that begins at the end of a run evaluates it again.
        """
        if int(self._memory[SEEN]) >= step or self._is_exhausted:
            return
        self._memory[SEEN] = step
        if loss < float(self._memory[BEST]) - self._settings.min_delta:
            self._memory[BEST], self._memory[WORSE] = loss, 0
        else:
            self._memory[WORSE] += 1

    @property
    def last_step(self) -> float:
        """The step after which training ends: infinity while there is hope."""
        if not self._is_exhausted:
            return float("inf")
        return int(self._memory[SEEN]) + 1  # one more, so that a checkpoint of the end is written as any other

    @property
    def _is_exhausted(self) -> bool:
        return int(self._memory[WORSE]) >= self._settings.patience
