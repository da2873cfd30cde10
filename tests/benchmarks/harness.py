"""What every benchmark shares: ratios of pairs, the table that is printed, the line that is kept. Needs no torch."""

import json
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dtrain.machine import Machine, probe

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.jsonl")
JOBS = Path(__file__).with_name("jobs")
RIVALS = Path(__file__).with_name("rivals")
PACKAGES = ("torch", "ray", "numpy")


class NotHere(Exception):
    """What a benchmark measures is not on this machine; the message says so in a line."""


@dataclass(frozen=True)
class Figure:
    """One row of a table."""

    name: str
    value: float
    """What is held against the target."""
    target: float
    target_is_most: bool = True
    """Whether the target is the most that is allowed, or the least."""
    low: float | None = None
    high: float | None = None
    """The middle half of what was measured."""
    num: int = 1
    """How many measurements (pairs, kills) stand behind the value."""
    note: str = ""
    """In words: the two things themselves, and what else a reader must know."""

    @property
    def is_reached(self) -> bool:
        return self.value <= self.target if self.target_is_most else self.value >= self.target


def paired(name: str, ours: Sequence[float], theirs: Sequence[float], target: float, note: str = "") -> Figure:
    """The median of ours / theirs over pairs measured one after the other (seconds or bytes).

    Raises `ValueError` unless there is at least one pair and each has both sides.
    """
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"{name}: {len(ours)} measurements of ours beside {len(theirs)} of theirs")
    ratios = [mine / rival for mine, rival in zip(ours, theirs, strict=True)]
    low, high = middle_half(ratios)
    words = [f"{duration(statistics.median(ours))} : {duration(statistics.median(theirs))}", note]
    return Figure(
        name,
        statistics.median(ratios),
        target,
        low=low,
        high=high,
        num=len(ratios),
        note="; ".join(filter(None, words)),
    )


def middle_half(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile; of fewer than four values the least and the greatest."""
    if len(values) < 4:
        return min(values), max(values)
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def duration(seconds: float) -> str:
    """For reading only: nothing is ever decided by an absolute time."""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def table(title: str, figures: Iterable[Figure]) -> Any:
    """A rich table of `figures`."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for heading in ("", "ratio", "middle half", "n", "target", "", "ours : theirs"):
        made.add_column(heading, justify="right" if heading in ("ratio", "n", "target") else "left", overflow="fold")
    for figure in figures:
        spread = "" if figure.low is None or figure.high is None else f"{figure.low:.3g} - {figure.high:.3g}"
        target = f"{'≤' if figure.target_is_most else '≥'} {figure.target:g}"
        verdict = "reached" if figure.is_reached else "MISSED"
        made.add_row(figure.name, f"{figure.value:.3g}", spread, str(figure.num), target, verdict, figure.note)
    return made


def line(benchmark: str, figures: Iterable[Figure], seconds: float, *, is_quick: bool) -> dict[str, Any]:
    """What is kept of one benchmark."""
    rows = []
    for figure in figures:
        row = {key: round(v, 4) if isinstance(v, float) else v for key, v in vars(figure).items()}
        rows.append({**row, "is_reached": figure.is_reached})
    return {
        "benchmark": benchmark,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "is_quick": is_quick,
        "seconds": round(seconds),
        "figures": rows,
    }


def keep(path: Path, entry: dict[str, Any]) -> None:
    """Append a line to the results."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def commit() -> str:
    """The commit that is checked out; `+` when the product or the benchmarks were changed since."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", "dtrain", "tests/benchmarks", ":!tests/benchmarks/results.jsonl")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def machine(found: Machine | None = None) -> str:
    """A machine in words; this one when left out."""
    found = found or probe()
    gpus = f"{len(found.gpus)} x {found.gpus[0].name}" if found.gpus else "no GPU"
    return f"{found.num_cores} core{'s' if found.num_cores > 1 else ''}, {gpus}"


def versions() -> dict[str, str]:
    import platform

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
