"""One thing that was looked at, and the next move where it is not as it should be."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "problem"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Finding:
    area: str
    """What was looked at: `packages`, `shared memory`, `all_reduce`, ..."""
    state: State
    """A `problem` keeps one from training there; with a `warning` it trains, but not everything or not well."""
    text: str
    """What was found."""
    remedy: str = ""
    """The next move; never empty unless `ok`."""

    def __post_init__(self) -> None:
        assert self.state == "ok" or self.remedy, self
