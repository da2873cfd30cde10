"""A moving average of the weights (EMA), which generalises better than the last of them.

Source: Polyak and Juditsky, 1992; as a moving average, Tarvainen and Valpola, "Mean teachers", 2017. It works on the
pieces a worker holds, so it needs no exchange and is sharded as the weights are.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from dtrain.checkpoint.pieces import Piece
from dtrain.strategies import Prepared

PREFIX = "ema."


class Average:
    """Follows the floating-point `model.` pieces of a prepared task."""

    def __init__(self, prepared: Prepared, decay: float) -> None:
        followed = [p for p in prepared.state if p.name.startswith("model.") and p.tensor.is_floating_point()]
        self._live = [piece.tensor.detach() for piece in followed]
        self._average = [tensor.clone() for tensor in self._live]
        self._refresh, self._decay = prepared.refresh, decay
        self.state: Sequence[Piece] = [
            Piece(PREFIX + piece.name, tensor, piece.whole, piece.at, piece.is_primary)
            for piece, tensor in zip(followed, self._average, strict=True)
        ]

    def update(self, step: int) -> None:
        """After `step` steps; early on the average forgets faster, so that it does not remember the start."""
        decay = min(self._decay, (1 + step) / (10 + step))
        if not self._live:  # a worker of many may hold no part of a small model
            return
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._live, 1.0 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The networks compute with the average in here. Their own weights come back after it, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        with torch.no_grad():
            for live, average in zip(self._live, self._average, strict=True):
                held = live.clone()
                live.copy_(average)
                average.copy_(held)
        self._refresh()
