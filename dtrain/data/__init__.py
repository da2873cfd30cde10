"""On what is trained. A data source is one file here, found by its name, with five things in it:

- `Options`: its settings (a `dtrain.settings.Settings`);
- `describe(options) -> DataShape`: what a model must know of it, without reading it;
- `resolve(options, folder) -> Options`: the same with relative paths taken from `folder`; workers start elsewhere;
- `prepare(options, cache)`: download nothing, convert once, keep by content hash under the folder `cache`;
  called once a node before its workers start, safe to call at the same time from several processes;
- `open(options, cache) -> Source`: what a worker reads from.

Where options name the user's own code, `own_code(options) -> list[Path]` names its files: a plan holds their hashes.

The order of samples is not a source's business: `dtrain/data/order.py` decides it for all.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class DataShape:
    """What a model must know of its data at planning time."""

    kind: Literal["tokens", "masked", "pairs", "images", "table", "series", "custom"]
    """What a batch holds, so which models can learn from it; `b` samples in a batch:

    - `tokens`: inputs, targets int64 [b, t]; targets are the next tokens, -1 where nothing is to be predicted;
    - `masked`: the same, with some inputs hidden; targets are the hidden tokens, -1 elsewhere; where every sample has n
      of them, places int64 [b, n], ascending, may say where they stand: a GPU then need not be waited for;
      both may have documents int64 [b, t], the number within the sample of the document a token belongs to: tokens of
      others are not to be seen;
    - `pairs`: source int64 [b, s], inputs, targets int64 [b, t]: a text and its translation; padded with -1;
    - `images`: images float32 [b, channels, height, width], about zero mean and unit variance; labels int64 [b];
    - `table`: features float32 [b, f]; targets int64 [b] (classes) or float32 [b] (a number);
    - `series`: inputs float32 [b, t, f], targets float32 [b, horizon] and last float32 [b]: the next values of one
      column, and the one before them.
    """
    vocabulary_size: int = 0
    """Number of distinct tokens."""
    sequence_length: int = 0
    """Tokens or time steps a sample has."""
    num_classes: int = 0
    """Labels are below this; 0 where a number is predicted, or nothing."""
    channels: int = 0
    height: int = 0
    width: int = 0
    num_features: int = 0
    """Columns of a table, or of a series."""
    horizon: int = 0
    """Time steps to predict."""
    num_targets: int = 0
    """Tokens of a sample that are predicted, where those are not all."""
    is_cheap: bool = True
    """Whether a batch costs so little (less than a millisecond) that nothing is gained by reading ahead in other
    processes."""


class Dataset(Protocol):
    """Samples that can be read in any order."""

    num_samples: int

    def batch(self, indices: "np.ndarray", draws: "np.ndarray") -> "dict[str, np.ndarray]":
        """The samples at `indices` (int64, shape [b]) as named arrays whose first dimension is b.

        `draws` (uint64, shape [b]) has a random number for each of them, another in every epoch: what a source does
        by chance (augmentation, masking) is a function of it, so that it does not depend on the number of workers.
        """


class Source(Protocol):
    """What `open` returns: training and held-out samples that share nothing."""

    train: Dataset
    held_out: Dataset
    fingerprint: str
    """Changes with the samples; a run that is resumed must find the same."""

    def yardsticks(self) -> dict[str, dict[str, float]]:
        """Figures to hold the evaluation against: {metric: {name: value}}, e.g. bits_per_byte of gzip -9."""
