"""The order of samples: a pure function of (seed, epoch, position), the same for any number of workers.

A keyed permutation is computed, never stored, so seeking to any step costs the same as the first one and nothing
has to be saved to resume. The global sample index runs on over epochs: sample g is position g mod n of epoch g div n.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MAX_SAMPLES = 2**48
_ROUNDS = 6
_BLOCK = 8192
_DRAWS = 0xD12A35


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
    return _joined(functools.partial(_block, seed, num_samples), start, count)


def _joined(made: "Callable[[int], np.ndarray]", start: int, count: int) -> "np.ndarray":
    """Numbers `start` to `start + count` of what is made block by block."""
    import numpy as np

    number, first = divmod(start, _BLOCK)
    if first + count <= _BLOCK:
        return made(number)[first : first + count]
    blocks = range(number, (start + count - 1) // _BLOCK + 1)
    return np.concatenate([made(block) for block in blocks])[first : first + count]


@dataclass(frozen=True)
class Order:
    """What one worker reads, step by step.

    Step s holds global indices [s * global_size, (s + 1) * global_size), whoever reads them. Each micro batch of all
    workers together is a run of them, of which each worker takes a run: what is computed over a micro batch (batch
    statistics) is then the same for any number of workers. Raises `ValueError` unless global_size = micro x
    accumulation x num_workers.
    """

    seed: int
    num_samples: int
    global_size: int
    micro: int
    accumulation: int
    num_workers: int
    worker: int

    def __post_init__(self) -> None:
        sizes = self.micro * self.accumulation * self.num_workers
        if sizes != self.global_size or not 0 <= self.worker < self.num_workers:
            raise ValueError(
                f"batch of {self.global_size} is not {self.num_workers} workers (worker {self.worker})"
                f" x {self.accumulation} x micro {self.micro}"
            )

    def micro_batch(self, step: int, number: int) -> "tuple[np.ndarray, np.ndarray]":
        """(indices, draws) of micro batch `number` of `step`: int64 and uint64, shape [micro]."""
        start = step * self.global_size + (number * self.num_workers + self.worker) * self.micro
        return (
            sample_indices(self.seed, self.num_samples, start, self.micro),
            _joined(functools.partial(_drawn, self.seed), start, self.micro),
        )


def draws(seed: int, numbers: "np.ndarray") -> "np.ndarray":
    """A random number (uint64) for each of `numbers` (uint64)."""
    import numpy as np

    return _mix(numbers ^ _mix(np.asarray([seed ^ _DRAWS], dtype=np.uint64)))


@functools.lru_cache(maxsize=4)
def _block(seed: int, num_samples: int, block: int) -> "np.ndarray":
    # One block serves many steps: numpy's cost per call would otherwise be felt in steps of a millisecond.
    import numpy as np

    index = np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.uint64)
    epoch, position = np.divmod(index, np.uint64(num_samples))
    samples = permute(seed, epoch, position, num_samples)
    samples.flags.writeable = False
    return samples


@functools.lru_cache(maxsize=4)
def _drawn(seed: int, block: int) -> "np.ndarray":
    import numpy as np

    made = draws(seed, np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.uint64))
    made.flags.writeable = False
    return made


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
