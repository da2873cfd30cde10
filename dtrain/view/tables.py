"""Runs side by side, and the whole story of one."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dtrain import runs
from dtrain.errors import StorageError
from dtrain.settings import to_builtins
from dtrain.view import outcome, words
from dtrain.view.follow import STYLES, others

if TYPE_CHECKING:
    from dtrain.backends import Sight

COMMITTED = "COMMITTED"
"""The file that marks a whole checkpoint (`dtrain.checkpoint.store.MARKER`, which would import torch)."""
WAITING = frozenset({"queued", "starting"})
"""States in which the cluster knows more of a run than the run's folder."""
MAX_METRIC_LINES = 20
MIN_CAUSE_WIDTH = 10
"""Narrower than this, `ps` leaves causes out."""


def step_of(record: runs.Record, metrics: dict[str, Any]) -> int:
    """The last step known to be done."""
    known = record.outcome.get("steps")
    if known is None and record.attempts and record.attempts[-1].ended_at is not None:
        known = record.attempts[-1].last_step
    return int(metrics.get("step", 0) if known is None else known)


def facts(run: runs.Run, sight: "Sight | None" = None) -> dict[str, Any]:
    """A run for a machine: its record, its folder, and where it stands; `sight` is what its cluster says of it."""
    record = _as_seen(run.record, sight)
    metrics = run.latest(record)
    where = {"path": run.where, "step": step_of(record, metrics), "loss": metrics.get("loss")}
    seen = {} if sight is None else {"cluster": to_builtins(sight)}
    return {**to_builtins(record), **where, **seen}


def _as_seen(record: runs.Record, sight: "Sight | None") -> runs.Record:
    """The record as it is to be read: a run without a driver recovers while its cluster says it starts another."""
    if sight is None or record.state != "lost" or not sight.brings_back:
        return record
    cause = sight.why or "its cluster starts another driver"
    return replace(record, state="recovering", cause=cause, error_kind=None, exit_code=None)


# -- ps ------------------------------------------------------------------------------------------------------


def ps(listed: Sequence[runs.Run], width: int, seen: "Mapping[str, Sight] | None" = None) -> RenderableType:
    """One row a run, the newest first; causes are cut to what `width` leaves them.

    `seen` is what the cluster says, by id: of a run that waits it knows more than the run's folder.
    """
    now = time.time()
    rows = [_ps_row(run, now, (seen or {}).get(run.id)) for run in reversed(listed)]
    names = ("run", "state", "step", "loss", "age", "took", "tries")
    used = sum(max(len(name), *(len(row[i]) for row in rows)) + 2 for i, name in enumerate(names))
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True, justify="left" if name in ("run", "state") else "right")
    room = width - used
    if room >= MIN_CAUSE_WIDTH:
        table.add_column("cause", no_wrap=True, style="dim")
    for row in rows:
        row[1].stylize(STYLES.get(row[1].plain, ""))
        row[-1].truncate(max(room, 1), overflow="ellipsis")
        table.add_row(*row[: len(table.columns)])
    return table


def _ps_row(run: runs.Run, now: float, sight: "Sight | None") -> list[Text]:
    try:
        record = _as_seen(run.record, sight)
        metrics = run.latest(record)
    except StorageError as error:
        cells = [run.id, "unreadable", "", "", "", "", "", error.message]
    else:
        loss = metrics.get("loss")
        waits = sight is not None and record.state in WAITING
        cells = [
            run.id,
            sight.phase if sight is not None and waits else record.state,
            f"{step_of(record, metrics):,}" + (f"/{record.num_steps:,}" if record.num_steps else ""),
            "-" if loss is None else words.measure(loss),
            words.age(now - record.created_at).removesuffix(" ago"),
            words.duration(_took(record, now)),
            str(len(record.attempts) or "-"),
            words.visible(sight.why if sight is not None and waits else record.cause).replace("\n", " "),
        ]
    return [Text(cell) for cell in cells]


def _took(record: runs.Record, now: float) -> float | None:
    if record.started_at is None:
        return None
    if record.state == "lost":
        return None  # nobody knows when it ended
    return (record.ended_at or now) - record.started_at


# -- status --------------------------------------------------------------------------------------------------


def status(run: runs.Run, sight: "Sight | None" = None) -> RenderableType:
    """Everything a person may want to know of one run; `sight` is what its cluster says of it."""
    record, now = _as_seen(run.record, sight), time.time()
    metrics = run.latest(record)
    step = step_of(record, metrics)
    progress = f"step {step:,}"
    if record.num_steps:
        progress += f" of {record.num_steps:,} ({100 * step // record.num_steps}%)"
    elif not step:
        progress = "nothing reported" if record.ended else "nothing reported yet"
    rows: list[tuple[str, str | Text]] = [
        ("why", words.visible(record.cause)),
        ("progress", progress),
        ("workers", str(record.num_workers)),
        ("submitted", f"{words.moment(record.created_at)} ({words.age(now - record.created_at)}{_times(record)})"),
    ]
    if record.started_at:
        rows.append(("started", words.moment(record.started_at)))
    if record.ended_at:
        took = words.duration(record.ended_at - (record.started_at or record.created_at))
        rows.append(("ended", f"{words.moment(record.ended_at)}, {took} later"))
    if record.exit_code is not None:
        rows.append(("exit code", str(record.exit_code)))
    if metrics and not record.ended:
        from dtrain.view.follow import training_figures

        rows.append(("latest", "   ".join(" ".join(pair) for pair in training_figures(metrics))))
    if sight is not None:
        rows.insert(1, ("cluster", words.visible(f"{sight.phase}: {sight.why}" if sight.why else sight.phase)))
    rows.append(("folder", run.where))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for key, value in rows:
        grid.add_row(f"  {key}", value)
    title = Text.assemble((run.id, "bold"), "  ", (record.state, STYLES.get(record.state, "")))
    parts: list[RenderableType] = [title, grid]
    if record.attempts:
        parts += [Text("\nattempts", style="bold"), attempts(record, now)]
    stored = checkpoints(run)
    if stored:
        parts += [Text("\ncheckpoints", style="bold"), _checkpoint_table(stored, now)]
    if record.outcome.get("metrics"):
        parts += outcome.comparison(record.outcome)
    if record.state in ("failed", "lost") and record.error:
        parts += outcome.failure(replace(record, cause=""))
    return Group(*parts)


def attempts(record: runs.Record, now: float) -> RenderableType:
    """One row an attempt: from which step and state, how far, and why it ended."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", border_style="dim", show_edge=False, padding=(0, 1, 0, 1))
    table.add_column("", justify="right")
    table.add_column("steps", no_wrap=True, justify="right")
    table.add_column("state from", no_wrap=True)
    table.add_column("began", no_wrap=True)
    table.add_column("took", no_wrap=True, justify="right")
    table.add_column("ended by", overflow="fold")
    for a in record.attempts:
        over = a.ended_at is not None or record.ended
        took = words.duration((a.ended_at or now) - a.started_at) if a.ended_at or not over else "-"
        last = "?" if a.last_step is None and over else f"{a.last_step:,}" if a.last_step is not None else "..."
        reached = f"{a.from_step:,}-{last}"
        if a.source == "script":  # only the script knows where it went on from
            reached = "?" if a.last_step == 0 else f"to {last}"
        why = Text(words.visible(a.cause or ("" if over else "under way")), style="" if a.cause else "dim")
        if a.failure:
            why = Text.assemble((a.failure, "yellow"), "  ", why)
        table.add_row(str(a.number), reached, a.source, words.clock(a.started_at), took, why)
    return table


def checkpoints(run: runs.Run) -> list[dict[str, Any]]:
    """The whole checkpoints of a run, the oldest first: name, time, size in bytes and metrics."""
    found = []
    run.refresh("checkpoints/")
    for path in sorted(run.checkpoints.glob("step-*")):
        try:
            written_at = (path / COMMITTED).stat().st_mtime
            manifest = json.loads((path / "manifest.json").read_text())
            written_at = float(manifest.get("written_at", written_at))
            num_bytes = sum(int(f["bytes"]) for f in manifest["files"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not finished, or going away
        metrics = manifest.get("metrics") or {}
        found.append({"name": path.name, "time": written_at, "bytes": num_bytes, "metrics": metrics})
    return found


def _checkpoint_table(stored: list[dict[str, Any]], now: float) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    for c in stored:
        figures = "   ".join(f"{k.replace('_', ' ')} {words.measure(v)}" for k, v in c["metrics"].items())
        table.add_row(f"  {c['name']}", words.size(c["bytes"]), words.age(now - c["time"]), figures)
    return table


def pairs(title: str, facts: dict[str, Any]) -> RenderableType:
    """A title and facts under it."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for key, value in facts.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        grid.add_row(f"  {key.replace('_', ' ')}", words.visible(shown))
    return Group(Text(title, style="bold"), grid)


def _times(record: runs.Record) -> str:
    return f", {record.submissions} times" if record.submissions > 1 else ""


# -- metrics -------------------------------------------------------------------------------------------------


def metrics(lines: Sequence[dict[str, Any]], everything: bool) -> Text:
    """Training and held-out figures by step; thinned to a screenful unless `everything`."""
    rows: dict[int, dict[str, Any]] = {}
    for line in lines:
        row = rows.setdefault(int(line.get("step", 0)), {})
        held_out = line.get("held_out")
        row.update({"held_out": held_out} if isinstance(held_out, dict) else line)
    # The held-out figures worth a column of their own, in the order they were first measured.
    measured = list(dict.fromkeys(k for s in sorted(rows) for k in rows[s].get("held_out", {})))
    own = list(dict.fromkeys(key for s in sorted(rows) for key in others(rows[s])))
    names = ["step", "loss", "lr", "gradient", "steps/s", *(key.replace("_", " ") for key in own)]
    names += [f"held-out {m.replace('_per_', '/').replace('_', ' ')}" for m in measured]
    cells = []
    for step in sorted(rows) if everything else _thinned(rows):
        row = rows[step]
        held_out = row.get("held_out", {})
        figures = [
            _cell(row.get("loss"), words.measure),
            _cell(row.get("learning_rate"), words.rate),
            _cell(row.get("grad_norm"), words.measure),
            _cell(row.get("steps_per_s"), lambda v: f"{v:.3g}"),
            *(_cell(row.get(key), words.measure) for key in own),
        ]
        cells.append([f"{step:,}", *figures, *(_cell(held_out.get(m), words.measure) for m in measured)])
    # By hand: a long run has more lines than rich lays out in reasonable time.
    widths = [max(len(row[i]) for row in [names, *cells]) for i in range(len(names))]
    head, *body = ["  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in [names, *cells]]
    return Text.assemble((head, "dim"), "".join(f"\n{line}" for line in body))


def _thinned(rows: dict[int, dict[str, Any]]) -> list[int]:
    """A screenful of steps: those with an evaluation first, the rest evenly spread."""
    steps = sorted(rows)
    if len(steps) <= MAX_METRIC_LINES:
        return steps
    chosen = {s for s in steps if "held_out" in rows[s]}
    if len(chosen) > MAX_METRIC_LINES:
        chosen, steps = set(), sorted(chosen)
    room = MAX_METRIC_LINES - len(chosen)
    rest = [s for s in steps if s not in chosen]
    return sorted(chosen | {rest[round(i * (len(rest) - 1) / max(1, room - 1))] for i in range(room)})


def _cell(value: Any, format_value: Any) -> str:
    return format_value(value) if isinstance(value, int | float) else ""
