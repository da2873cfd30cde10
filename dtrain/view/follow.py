"""A run while it runs: a live bar on a terminal, plain lines elsewhere. Reads the run folder and nothing else."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dtrain import runs
from dtrain.view import words

POLL_S = 0.15
REDRAW_S = 0.5
"""Longest time between two drawings of the live view, so that its clock goes on."""
OWNER_CHECK_S = 1.0
"""Time between two looks at whether the run still has an owner."""
LOOK_S = 5.0
"""Time between two questions to the cluster, of a run that no driver has taken up."""
UNTAKEN_S = 30.0
"""Time after which a run that no driver has taken up is remarked on."""
PLAIN_LINE_S = 2.0
"""Shortest time between two plain lines of training metrics."""
RATES_AVERAGED = 5
MANY_FIGURES = "   "

STYLES = {
    "queued": "cyan",
    "starting": "cyan",
    "running": "green",
    "recovering": "yellow",
    "stopping": "yellow",
    "succeeded": "bold green",
    "failed": "bold red",
    "stopped": "yellow",
    "lost": "bold red",
    "failure": "red",
    "attempt": "yellow",
    "checkpoint": "dim",
    "checkpoint-failed": "yellow",
    "checkpoint-rejected": "yellow",
    "not-deleted": "yellow",
    "code-changed": "yellow",
}
"""Colours of states and of the events shown above the bar."""

Answer = Literal["detach", "stop", "continue"]


@dataclass
class Progress:
    """What the lines of metrics read so far add up to."""

    step: int = 0
    time: float | None = None
    attempt: int = 1
    training: dict[str, Any] = field(default_factory=dict)
    held_out: dict[str, Any] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)

    def take(self, line: dict[str, Any]) -> None:
        """Add one line of metrics.jsonl."""
        if isinstance(line.get("held_out"), dict):
            self.held_out = line["held_out"]
            return
        attempt = int(line.get("attempt", self.attempt))
        if attempt != self.attempt:
            self.rates.clear()
        self.step, self.attempt, self.time = int(line.get("step", self.step)), attempt, line.get("time")
        self.training = line
        if line.get("steps_per_s"):
            self.rates = [*self.rates, float(line["steps_per_s"])][-RATES_AVERAGED:]

    def eta_s(self, num_steps: int, now: float) -> float | None:
        """Seconds left at the recent pace; None before there is one."""
        if not self.rates or self.time is None or not num_steps:
            return None
        return max(0.0, (num_steps - self.step) / (sum(self.rates) / len(self.rates)) - (now - self.time))


class Reader:
    """What is new in a run folder since the last look."""

    def __init__(self, run: runs.Run) -> None:
        self._run = run
        self._files = {"event": run.path / "events.jsonl", "metric": run.path / "metrics.jsonl"}
        self._offsets = dict.fromkeys(self._files, 0)

    def poll(self) -> list[tuple[str, dict[str, Any]]]:
        """("metric" or "event", line) for each new line, in the order of their times."""
        found = []
        self._run.refresh("events.jsonl", "metrics.jsonl")
        for kind, path in self._files.items():
            for offset, line in runs.iterate_lines(path, self._offsets[kind]):
                self._offsets[kind] = offset
                found.append((kind, line))
        return sorted(found, key=lambda item: float(item[1].get("time", 0.0)))


class _View(Protocol):
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def event(self, text: Text) -> None: ...
    def metric(self, line: dict[str, Any]) -> None: ...
    def draw(self, progress: Progress, record: runs.Record) -> None: ...


def follow(
    run: runs.Run,
    out: Console,
    *,
    ask: Callable[[], Answer],
    stop: Callable[[], None],
    look: Callable[[], str] = str,
    from_now: bool = False,
    live: bool = False,
) -> runs.Record | None:
    """Show the run until it has ended, and return its record; None when the person detached.

    `ask` is called on Ctrl-C, `stop` when the answer is to stop, `look` for what a run waits for that no driver has
    taken up; empty when nobody knows. With `from_now`, what happened
    before is not shown.
    """
    reader, progress = Reader(run), Progress()
    view: _View = _Live(out, run) if live else _Plain(out)
    if from_now:
        for kind, line in reader.poll():
            if kind == "metric":
                progress.take(line)
    view.start()
    try:
        while True:
            try:
                return _until_end(run, reader, progress, view, look)
            except KeyboardInterrupt:
                view.stop()
                answer = ask()
                if answer == "detach":
                    return None
                if answer == "stop":
                    stop()
                view.start()
    finally:
        view.stop()


def _until_end(run: runs.Run, reader: Reader, progress: Progress, view: _View, look: Callable[[], str]) -> runs.Record:
    untaken_until, next_look, why = time.monotonic() + UNTAKEN_S, time.monotonic() + LOOK_S, ""
    next_check, said = 0.0, ""  # a state whose cause the event before has just told is not told again
    record = run.record
    while True:
        # The record first: what stood in the files when the run ended is then read below.
        if time.monotonic() >= next_check:
            record, next_check = run.record, time.monotonic() + OWNER_CHECK_S
            if time.monotonic() >= untaken_until:
                untaken_until = float("inf")
                if record.state == "queued" and record.driver_pid is None and not run.is_owned():
                    view.event(Text(untaken(run), style="yellow"))
        else:
            record = run.stored_record()
        if record.driver_pid is None and not record.ended and time.monotonic() >= next_look:
            before, why, next_look = why, look(), time.monotonic() + LOOK_S
            if why and why != before:
                view.event(Text(why, style="yellow"))
        for kind, line in reader.poll():
            if kind == "metric":
                progress.take(line)
                view.metric(line)
            elif line.get("cause") is None or line["cause"] not in said:
                said = str(line.get("message", ""))
                if (text := event_line(line)) is not None:
                    view.event(text)
        view.draw(progress, record)
        if record.ended:
            return record
        time.sleep(max(POLL_S, run.poll_s))


def untaken(run: runs.Run) -> str:
    """What to say of a run that waits for longer than a driver usually takes to start."""
    name = words.called(run.where)
    return (
        f"no driver has taken this run up for {UNTAKEN_S:g} s: `dtrain logs {name} --driver` shows whether one failed"
        f" to start, `dtrain stop {name}` gives up"
    )


# -- lines above the bar, and all there is without a terminal ------------------------------------------------


def event_line(event: dict[str, Any]) -> Text | None:
    """One event as a line: the time, and a sentence; None for events that have nothing to say to a person."""
    kind = str(event.get("event", ""))
    message = event.get("message")
    if kind == "state":
        kind = str(event.get("state", ""))
        if kind in runs.ENDED:
            return None  # the outcome says it
        message = f"{kind}: {event['cause']}" if event.get("cause") else kind
    if not message:
        return None
    when = words.clock(float(event.get("time", 0.0)))
    return Text.assemble((f"{when}  ", "dim"), (words.visible(str(message)).rstrip(), STYLES.get(kind, "")))


class _Plain:
    """A line for each event and evaluation, and now and then one for training."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._latest: dict[str, Any] | None = None
        self._next_s = 0.0

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def event(self, text: Text) -> None:
        self._out.print(text, soft_wrap=True)
        self._out.file.flush()

    def metric(self, line: dict[str, Any]) -> None:
        if isinstance(line.get("held_out"), dict):
            figures = MANY_FIGURES.join(f"{_label(k)} {words.measure(v)}" for k, v in line["held_out"].items())
            self.event(Text(f"{words.clock(line.get('time', 0.0))}  step {line.get('step')}   held out: {figures}"))
        else:
            self._latest = line

    def draw(self, progress: Progress, record: runs.Record) -> None:
        if self._latest is None or (time.monotonic() < self._next_s and not record.ended):
            return
        line, self._latest, self._next_s = self._latest, None, time.monotonic() + PLAIN_LINE_S
        figures = training_figures(line)
        eta = progress.eta_s(record.num_steps, time.time())
        if eta is not None and not record.ended:
            figures.append(("eta", words.duration(eta)))
        step = f"step {line.get('step')}" + (f"/{record.num_steps}" if record.num_steps else "")
        self.event(Text(f"{words.clock(line.get('time', 0.0))}  {MANY_FIGURES.join([step, *map(' '.join, figures)])}"))


# -- the bar ---------------------------------------------------------------------------------------------------


class _Live:
    """One bar and its figures at the bottom of the terminal, lines above it."""

    def __init__(self, out: Console, run: runs.Run) -> None:
        self._out, self._run = out, run
        self._drawn: tuple[Any, ...] = ()
        self._next_s = 0.0
        self._live: Live | None = None

    def start(self) -> None:
        self._live = Live(console=self._out, auto_refresh=False, transient=True)
        self._live.start()
        self._next_s = 0.0

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._out.show_cursor(True)

    def event(self, text: Text) -> None:
        self._out.print(text)

    def metric(self, line: dict[str, Any]) -> None: ...

    def draw(self, progress: Progress, record: runs.Record) -> None:
        now = time.monotonic()
        state = (progress.training, progress.held_out, record)
        if self._live is None or (state == self._drawn and now < self._next_s):
            return
        self._drawn, self._next_s = state, now + REDRAW_S
        self._live.update(panel(progress, record, time.time(), self._out.width), refresh=True)


def panel(progress: Progress, record: runs.Record, now: float, width: int) -> RenderableType:
    """The live view: who and in what state, how far, and the figures."""
    attempts = max(len(record.attempts), 1)
    who = words.plural(record.num_workers, "worker") + (f", attempt {attempts}" if attempts > 1 else "")
    title = Table.grid(expand=True, padding=(0, 2))
    title.add_column(no_wrap=True)
    title.add_column(no_wrap=True, ratio=1, overflow="ellipsis")
    title.add_column(no_wrap=True, justify="right")
    name = Text.assemble((record.id, "bold"), "  ", (record.state, STYLES.get(record.state, "")))
    title.add_row(name, Text(words.visible(record.cause), style="dim"), Text(who, style="dim"))
    if not record.num_steps:
        how_far = f"step {progress.step:,}" if progress.step else "nothing reported yet"
        return Group(Text(), title, Text(how_far), *figure_lines(progress, record, now, width))
    bar = Table.grid(expand=True, padding=(0, 2))
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True, justify="right")
    eta = progress.eta_s(record.num_steps, now)
    share = 100 * progress.step // max(1, record.num_steps)
    left = f"  {words.duration(eta)} left" if eta is not None else ""
    bar.add_row(
        ProgressBar(total=record.num_steps, completed=progress.step, complete_style="green", finished_style="green"),
        Text(f"step {progress.step:,}/{record.num_steps:,}  {share}%{left}"),
    )
    return Group(Text(), title, bar, *figure_lines(progress, record, now, width))


def figure_lines(progress: Progress, record: runs.Record, now: float, width: int) -> list[Text]:
    """Label and value pairs, as many to a line as fit."""
    figures = training_figures(progress.training)
    best = progress.held_out.get("bits_per_byte")
    if best is not None:
        figures.insert(1, ("held out", f"{words.measure(best)} bits/byte"))
    elif "loss" in progress.held_out:
        figures.insert(1, ("held-out loss", words.measure(progress.held_out["loss"])))
    figures.append(("elapsed", words.duration(now - (record.started_at or record.created_at))))
    lines, used = [Text()], 0
    for label, value in figures:
        length = len(label) + 1 + len(value)
        if used and used + len(MANY_FIGURES) + length > width:
            lines.append(Text())
            used = 0
        if used:
            lines[-1].append(MANY_FIGURES)
            used += len(MANY_FIGURES)
        lines[-1].append(label + " ", style="dim").append(value)
        used += length
    return lines


def training_figures(line: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of a line of training metrics as (label, value); those it lacks are left out, as are no tokens."""
    found = []
    for key, label, format_value in _FIGURES:
        value = line.get(key)
        if isinstance(value, int | float) and (value or key != "tokens_per_s"):
            found.append((label, format_value(value)))
    return found + [(_label(key), words.measure(line[key])) for key in others(line)]


def others(line: dict[str, Any]) -> list[str]:
    """Names of the figures in a line that every kind of run has its own of: losses of phases, what a script reports."""
    return [key for key, value in line.items() if key not in _COMMON and isinstance(value, int | float)]


_FIGURES: list[tuple[str, str, Callable[[float], str]]] = [
    ("loss", "loss", words.measure),
    ("learning_rate", "lr", words.rate),
    ("grad_norm", "gradient", words.measure),
    ("steps_per_s", "steps/s", lambda v: f"{v:.3g}"),
    ("tokens_per_s", "tokens/s", words.count),
]
_COMMON = {"time", "attempt", "step", "samples_per_s", *(key for key, _, _ in _FIGURES)}


def _label(key: str) -> str:
    return key.replace("_", " ")
