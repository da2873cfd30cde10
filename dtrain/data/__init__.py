"""On what is trained. A data source is one file here, found by its name, with five things in it:

- `Options`: its settings (`dtrain.component.Options`);
- `describe(options) -> DataShape`: what a model must know of it, without reading it;
- `resolve(options, folder) -> Options`: the same with relative paths taken from `folder`; workers start elsewhere;
- `prepare(options, cache)`: download nothing, convert once, keep by content hash under the folder `cache`;
  called once a node before its workers start, safe to call at the same time from several processes;
- `open(options, cache) -> Source`: what a worker reads from.

The order of samples is not a source's business: `dtrain/data/order.py` decides it for all.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class DataShape:
    """What a model must know of its data at planning time."""

    kind: str
    """`tokens`, `images`, `table`, ...: which models can learn from it."""
    vocabulary_size: int = 0
    """Number of distinct tokens."""
    sequence_length: int = 0
    """Tokens a sample trains on."""


class Dataset(Protocol):
    """Samples that can be read in any order."""

    num_samples: int

    def batch(self, indices: "np.ndarray") -> "dict[str, np.ndarray]":
        """The samples at `indices` (int64, shape [b]) as named arrays whose first dimension is b."""


class Source(Protocol):
    """What `open` returns: training and held-out samples that share nothing."""

    train: Dataset
    held_out: Dataset

    def yardsticks(self) -> dict[str, dict[str, float]]:
        """Figures to hold the evaluation against: {metric: {name: value}}, e.g. bits_per_byte of gzip -9."""
