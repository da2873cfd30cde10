"""What one worker holds of the training state: whole tensors, or rectangles of tensors whose rest others hold.

A piece says where in the whole it lies, so what N workers saved under one strategy, M workers load under another.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Piece:
    """A live rectangle of a named tensor."""

    name: str
    tensor: torch.Tensor
    """Its shape is that of the rectangle; written to in place when state is restored."""
    whole: tuple[int, ...]
    """Shape of the tensor it is a piece of."""
    at: tuple[int, ...]
    """Where the rectangle begins in each dimension."""
    is_primary: bool = True
    """Of the workers that hold the same rectangle, one writes it to storage."""

    @property
    def is_whole(self) -> bool:
        return tuple(self.tensor.shape) == self.whole


State = Sequence[Piece] | Mapping[str, torch.Tensor]
"""Training state: pieces, or whole tensors by name."""


def as_pieces(state: State) -> list[Piece]:
    """`state` as pieces; a tensor of a mapping is whole."""
    if isinstance(state, Mapping):
        return [whole(name, tensor) for name, tensor in state.items()]
    return list(state)


def whole(name: str, tensor: torch.Tensor, is_primary: bool = True) -> Piece:
    """A tensor that this worker holds all of."""
    return Piece(name, tensor, tuple(tensor.shape), (0,) * tensor.ndim, is_primary)


def of_range(name: str, flat: torch.Tensor, shape: Sequence[int], start: int, is_primary: bool = True) -> list[Piece]:
    """Pieces for `flat` (1-D, contiguous), which holds the numbers from `start` on of a tensor of `shape`, row by row.

    A run of numbers is a handful of rectangles: at most 2 x dimensions - 1.
    """
    pieces, done = [], 0
    for at, size in rectangles(tuple(shape), start, start + flat.numel()):
        count = math.prod(size)
        pieces.append(Piece(name, flat[done : done + count].view(size), tuple(shape), at, is_primary))
        done += count
    return pieces


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterable[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The run [start, stop) of a row-major tensor as (offsets, sizes) of rectangles, in order of the numbers."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows [first, last)
    if first > last:  # inside one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if last * row < stop:
        yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(
    shape: tuple[int, ...], number: int, start: int, stop: int
) -> Iterable[tuple[tuple[int, ...], tuple[int, ...]]]:
    for at, size in rectangles(shape[1:], start, stop):
        yield (number, *at), (1, *size)
