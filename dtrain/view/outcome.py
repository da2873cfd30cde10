"""A run after it has ended: how, how good beside the yardsticks, or why not and what to do now."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dtrain import runs
from dtrain.view import words

MARKS = {"succeeded": ("✓", "bold green"), "stopped": ("■", "bold yellow")}
FAILURE_MARK = ("✗", "bold red")
HIGHER_IS_BETTER = frozenset({"accuracy"})
MAX_SAMPLE_LINES = 30

NEXT_MOVE = {
    "training": "mend the code or the data it names, then resume",
    "retries-exhausted": "see why workers kept failing, then resume",
    "cluster": "see whether the cluster is there, then resume",
    "storage": "make room or mend the storage, then resume",
    "input": "mend the file and submit again",
}
"""What to do about a run that failed, by the kind of its error."""


def show(run: runs.Run, record: runs.Record, *, hints: bool = True) -> RenderableType:
    """The end of a run: one line of how, then what came of it. Print it with `soft_wrap`: it is there to be copied."""
    parts: list[RenderableType] = [Text(), headline(record)]
    if record.state == "succeeded" or record.outcome.get("metrics"):
        parts += comparison(record.outcome)
        parts += sample(record.outcome)
        parts += pictures(run, record.outcome)
    if record.state in ("failed", "lost"):
        parts += failure(record)
    if hints:
        parts += next_commands(run, record)
    return Group(*parts)


def headline(record: runs.Record) -> Text:
    """`✓ gpt-small-k3f2 succeeded after 3m 12s (2m 58s of training): 800 steps, 2 attempts`."""
    mark, style = MARKS.get(record.state, FAILURE_MARK)
    facts = [_steps(record)]
    if len(record.attempts) > 1:
        facts.append(words.plural(len(record.attempts), "attempt"))
    text = Text.assemble((f"{mark} ", style), (record.id, "bold"), " ", (record.state, style))
    if record.ended_at is not None:
        text.append(f" after {words.duration(record.ended_at - record.created_at)}")
        seconds = record.outcome.get("train_seconds")
        if isinstance(seconds, int | float):
            text.append(f" ({words.duration(seconds)} of training)", style="dim")
    return text.append(f": {', '.join(facts)}")


def comparison(outcome: dict[str, Any]) -> list[RenderableType]:
    """The final figures on held-out data; those that have yardsticks as a ranking, best first."""
    metrics, yardsticks = outcome.get("metrics") or {}, outcome.get("yardsticks") or {}
    parts: list[RenderableType] = []
    for name, value in metrics.items():
        others = yardsticks.get(name)
        if others and isinstance(value, int | float):
            parts += [Text(), _ranking(name, value, others)]
    rest = [f"{_label(k)} {words.measure(v)}" for k, v in metrics.items() if not yardsticks.get(k)]
    if rest:
        parts += [Text(), Text.assemble(("  held out: ", "dim"), "   ".join(rest))]
    return parts


def _ranking(name: str, value: float, others: dict[str, float]) -> RenderableType:
    sign = -1 if name in HIGHER_IS_BETTER else 1
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    table.add_row(Text("  held out", style="dim"), Text(_label(name), style="dim"), "")
    lines = [("this run", float(value)), *((k, float(v)) for k, v in others.items())]
    for who, figure in sorted(lines, key=lambda line: sign * line[1]):
        if who == "this run":
            table.add_row(Text(f"  {who}", style="bold"), Text(words.measure(figure), style="bold"), "")
        else:
            table.add_row(f"  {who}", words.measure(figure), Text(*_verdict(sign, float(value), figure)))
    return table


def _verdict(sign: int, value: float, other: float) -> tuple[str, str]:
    if not other or value != value or other != other:
        return "", ""
    gain = sign * (other - value) / abs(other)
    if abs(gain) < 0.0005:
        return "this run is no better and no worse", "yellow"
    if gain > 0:
        return f"this run is {gain:.1%} better", "green"
    return f"this run is {-gain:.1%} worse", "yellow"


def sample(outcome: dict[str, Any]) -> list[RenderableType]:
    """The text the model wrote, with what would move the cursor written out."""
    text = outcome.get("sample")
    if not isinstance(text, str) or not text.strip():
        return []
    lines = words.visible(text).expandtabs(4).splitlines()
    if len(lines) > MAX_SAMPLE_LINES:
        lines = [*lines[:MAX_SAMPLE_LINES], "..."]
    return [Text("\n  a sample of what it writes", style="dim"), indented(lines, 4)]


def pictures(run: runs.Run, outcome: dict[str, Any]) -> list[RenderableType]:
    """Where the pictures are that the model made."""
    name = outcome.get("pictures")
    if not isinstance(name, str):
        return []
    text = Text("\n  pictures it made: ", style="dim")
    return [text.append(f"{words.place(run.where)}/samples/{name}", style="not dim")]


def failure(record: runs.Record) -> list[RenderableType]:
    """The cause in a sentence, the user's own traceback below it, and the next move."""
    parts: list[RenderableType] = []
    if record.cause:
        parts += [Text(), indented(words.visible(record.cause).splitlines(), 2, "red")]
    if record.error and record.error.strip() != record.cause.strip():
        parts += [Text(), indented(words.visible(record.error).rstrip().expandtabs(8).splitlines(), 4)]
    move = NEXT_MOVE.get(record.error_kind or "")
    if move:
        parts += [Text(), Text(f"  {move[0].upper()}{move[1:]}.")]
    return parts


def indented(lines: list[str], by: int, style: str = "") -> Text:
    """Lines moved to the right, and not filled up with spaces that a copy would pick up."""
    return Text("\n".join(" " * by + line for line in lines), style=style)


def next_commands(run: runs.Run, record: runs.Record) -> list[RenderableType]:
    """What a person would type now."""
    commands, name = [], words.called(run.where)
    is_script = not record.num_steps
    if record.state == "succeeded":
        if record.outcome.get("pictures"):
            commands += [(f"dtrain sample {name}", "more of what it draws")]
        elif record.outcome.get("sample") and run.task_plan.arithmetic.tokens_per_step:
            commands += [(f'dtrain sample {name} --prompt "def "', "more of what it writes")]
        if not is_script or record.outcome.get("steps"):
            commands += [(f"tensorboard --logdir {words.place(run.where)}/tensorboard", "its curves")]
    else:
        commands += [(f"dtrain logs {name}", "what its workers said")]
        if record.error_kind == "cluster":
            commands += [("dtrain cluster status", "whether the cluster is there")]
        if record.error_kind != "input":
            resume = "starts the script again" if is_script else "goes on from the newest checkpoint"
            commands += [(f"dtrain resume {name}", resume)]
    commands += [(f"dtrain status {name}", "its whole story")]
    return command_list(commands)


def command_list(commands: list[tuple[str, str]]) -> list[RenderableType]:
    """Commands with what each is for."""
    width = max(len(command) for command, _ in commands)
    lines = [Text.assemble(f"  {command:<{width}}   ", (purpose, "dim")) for command, purpose in commands]
    return [Text(), Text("\n").join(lines)]


def _steps(record: runs.Record) -> str:
    done = record.outcome.get("steps")
    if done is None and record.attempts:
        done = record.attempts[-1].last_step
    if not record.num_steps:
        return f"{words.plural(done, 'step')} reported" if done else "no step reported"
    if done is None and record.state != "succeeded":
        done = 0  # it ended before it began
    if done is None or done == record.num_steps:
        return words.plural(record.num_steps, "step")
    return f"{done:,} of {record.num_steps:,} steps"


def _label(key: str) -> str:
    return words.visible(key.replace("_", " "))
