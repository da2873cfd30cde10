"""When a request to a store is tried again, and how long is waited before."""

import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")
FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 10.0


class Again(Exception):
    """What went wrong may go right at the next try. Nobody knows if what was asked for was done all the same."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def delays(patience_s: float, chance: Callable[[], float] = random.random) -> Iterator[float]:
    """Seconds to wait before each further try: doubling, each cut by chance to as little as half, in all `patience_s`.

    The chance keeps many that were refused at one moment from coming back at one moment.
    """
    left, delay = patience_s, FIRST_DELAY_S
    while left > 0:
        wait_s = min(delay * (0.5 + chance() / 2), left)
        yield wait_s
        left -= wait_s
        delay = min(2 * delay, LONGEST_DELAY_S)


def call(attempt: Callable[[], T], patience_s: float) -> T:
    """Call until it does not raise `Again`, or none of that helped within `patience_s`: then that is raised."""
    deadline = time.monotonic() + patience_s
    for delay_s in delays(patience_s):
        try:
            return attempt()
        except Again:
            if time.monotonic() + delay_s >= deadline:
                raise
        time.sleep(delay_s)
    return attempt()
