"""The run that a script is part of: where its checkpoints belong, and what it reports.

    import dtrain

    run = dtrain.current_run()
    run.report(step=10, loss=0.5)

Under plain `python` there is no run: reports are printed, and checkpoints belong in `checkpoints/`.
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RUN, CHECKPOINTS = "DTRAIN_RUN", "DTRAIN_CHECKPOINT_DIR"
"""Where a script that does not import dtrain finds the same: the run's folder, and that of its checkpoints."""
OUTSIDE = Path("checkpoints")
SAME = {"lr": "learning_rate"}
Tell = Callable[[int, dict[str, Any]], None]


class CurrentRun:
    """What a script may know of its run, and tell it."""

    def __init__(self, path: Path | None, attempt: int = 1, tell: Tell | None = None) -> None:
        self.path = path
        """The run's folder; None outside a run."""
        self.attempt = attempt
        """1 for the first try of the run; above that, the script was started again."""
        self._tell = tell
        self._step = 0
        self._latest: tuple[int, float] | None = None

    def __repr__(self) -> str:
        return f"CurrentRun({str(self.path)!r})" if self.path else "CurrentRun(None)"

    @property
    def name(self) -> str | None:
        """The run's name, such as `my_job-k3f9`; None outside a run."""
        return self.path.name if self.path else None

    @property
    def checkpoint_dir(self) -> Path:
        """The folder in which the script keeps, and finds, its checkpoints; the same in every attempt."""
        if self.path is None:
            return OUTSIDE
        folder = os.environ.get(CHECKPOINTS)
        return Path(folder) if folder else self.path / "checkpoints"

    def report(self, step: int | None = None, **figures: Any) -> None:
        """Say how far the script has come, and what it measured: numbers, or one-element tensors.

        Every worker may call it: each call is a sign of life, and the figures of worker 0 are kept. `step` counts up
        by itself when left out. `held_out={...}` holds figures of an evaluation. Raises `TypeError` for what is no
        number.
        """
        if step is not None:
            self._step = int(step)
        elif figures:
            self._step += 1
        said = {SAME.get(name, name): _figure(name, value) for name, value in figures.items()}
        if self._tell is not None:
            if said and set(said) != {"held_out"}:
                said = {**self._pace(), **said}
            self._tell(self._step, said)
        elif self.path is None and said and os.environ.get("RANK", "0") == "0":
            print(f"step {self._step}", *(f"{k} {v}" for k, v in said.items()), sep="  ", flush=True)

    def _pace(self) -> dict[str, float]:
        now, before = time.monotonic(), self._latest
        self._latest = self._step, now
        if before is None or self._step <= before[0] or now <= before[1]:
            return {}
        return {"steps_per_s": round((self._step - before[0]) / (now - before[1]), 4)}


def _figure(name: str, value: Any) -> Any:
    if name == "held_out" and isinstance(value, Mapping):
        return {str(key): _figure(f"held_out {key}", number) for key, number in value.items()}
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"report({name}=...) was given a {type(value).__name__}; give a number")
    return number


_current: CurrentRun | None = None


def begin(run: CurrentRun) -> None:
    """Say which run this process is a worker of."""
    global _current
    _current = run


def current_run() -> CurrentRun:
    """The run this process belongs to; outside a run, one whose reports are printed.

    A process that a worker has started anew knows the run's folders, and its reports go nowhere.
    """
    if _current is not None:
        return _current
    path = os.environ.get(RUN)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) + 1
    return CurrentRun(Path(path), attempt, _unheard) if path else CurrentRun(None)


def _unheard(step: int, figures: dict[str, Any]) -> None:
    del step, figures
