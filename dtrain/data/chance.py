"""Random numbers that belong to a sample: made from its draw alone, the same however a run is spread."""

from typing import TYPE_CHECKING

from dtrain.data import order

if TYPE_CHECKING:
    import numpy as np


def uniform(draws: "np.ndarray", count: int, stream: int) -> "np.ndarray":
    """Numbers in [0, 1), float64 [b, count], for `draws` (uint64 [b]); another `stream` gives others."""
    import numpy as np

    keys = order.draws(stream, draws)
    numbers = order.draws(stream, keys[:, None] + np.arange(count, dtype=np.uint64))
    return (numbers >> np.uint64(11)) * 2.0**-53
