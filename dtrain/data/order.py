"""The order of samples: a pure function of (seed, epoch, position), the same for any number of workers.

A keyed permutation is computed, never stored, so seeking to any step costs the same as the first one and nothing
has to be saved to resume. The global sample index runs on over epochs: sample g is position g mod n of epoch g div n.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MAX_SAMPLES = 2**48
_ROUNDS = 6
_BLOCK = 8192


def permute(seed: int, epoch: "np.ndarray", position: "np.ndarray", num_samples: int) -> "np.ndarray":
    """The sample at each `position` (0 <= position < num_samples) of each `epoch`: int64, the shape of the arguments.

    For one (seed, epoch) this is a bijection of [0, num_samples). It is a Feistel network over the least number of
    bits that holds `num_samples` (Luby and Rackoff, 1988), walked until it falls inside (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002): fewer than two rounds of the network on average.
    """
    import numpy as np

    if not 0 < num_samples <= MAX_SAMPLES:
        raise ValueError(f"num_samples {num_samples} is not between 1 and 2**48")
    bits = max((num_samples - 1).bit_length(), 2)
    value = position.astype(np.uint64)
    key = _mix(epoch.astype(np.uint64) ^ _mix(np.asarray([seed], dtype=np.uint64)))
    key = np.broadcast_to(key, value.shape)
    value = _feistel(value, key, bits)
    outside = np.flatnonzero(value >= np.uint64(num_samples))
    while outside.size:
        value[outside] = _feistel(value[outside], key[outside], bits)
        outside = outside[value[outside] >= np.uint64(num_samples)]
    return value.astype(np.int64)


def sample_indices(seed: int, num_samples: int, start: int, count: int) -> "np.ndarray":
    """The samples (int64, shape [count]) at global indices `start` to `start + count`; epochs join without a gap."""
    import numpy as np

    blocks = range(start // _BLOCK, (start + count - 1) // _BLOCK + 1)
    together = (
        np.concatenate([_block(seed, num_samples, block) for block in blocks]) if count else np.empty(0, np.int64)
    )
    first = start - blocks.start * _BLOCK
    return together[first : first + count]


def step_indices(
    step: int,
    *,
    seed: int,
    num_samples: int,
    global_size: int,
    micro: int,
    accumulation: int,
    num_workers: int,
    worker: int,
) -> "list[np.ndarray]":
    """What one worker reads in one step: `accumulation` arrays of `micro` sample indices.

    Step s holds global indices [s * global_size, (s + 1) * global_size), whoever reads them; each worker takes a
    run of them. Raises `ValueError` unless global_size = micro x accumulation x num_workers.
    """
    if micro * accumulation * num_workers != global_size or not 0 <= worker < num_workers:
        raise ValueError(
            f"batch of {global_size} is not {num_workers} workers (worker {worker}) x {accumulation} x micro {micro}"
        )
    share = micro * accumulation
    mine = sample_indices(seed, num_samples, step * global_size + worker * share, share)
    return [mine[i * micro : (i + 1) * micro] for i in range(accumulation)]


@lru_cache(maxsize=4)
def _block(seed: int, num_samples: int, block: int) -> "np.ndarray":
    # One block serves many steps: numpy's cost per call would otherwise be felt in steps of a millisecond.
    import numpy as np

    index = np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.uint64)
    epoch, position = np.divmod(index, np.uint64(num_samples))
    samples = permute(seed, epoch, position, num_samples)
    samples.flags.writeable = False
    return samples


def _feistel(value: "np.ndarray", key: "np.ndarray", bits: int) -> "np.ndarray":
    import numpy as np

    right_bits = bits // 2
    left_bits = bits - right_bits
    left, right = value >> np.uint64(right_bits), value & np.uint64((1 << right_bits) - 1)
    for number in range(_ROUNDS):  # even, so that the widths of the halves end as they began
        mask = np.uint64((1 << (left_bits if number % 2 == 0 else right_bits)) - 1)
        noise = _mix(right ^ _mix(key + np.uint64(number)))
        left, right = right, left ^ (noise & mask)
    return (left << np.uint64(right_bits)) | right


def _mix(x: "np.ndarray") -> "np.ndarray":
    # The finalizer of splitmix64 (Steele, Lea and Flood, 2014).
    import numpy as np

    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
