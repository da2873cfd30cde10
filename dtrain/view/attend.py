"""Being with a run: following it to its end, what Ctrl-C means, and leaving it alone."""

import json
import os
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import click

from dtrain.plan import Plan, ScriptPlan
from dtrain.runs import Record, Run
from dtrain.view import cluster, console, outcome, tables, words
from dtrain.view import follow as live_view
from dtrain.view import plan as plan_view
from dtrain.view.follow import Answer

KEYS: dict[str, Answer] = {
    "d": "detach",
    "s": "stop",
    "c": "continue",
    "\r": "continue",
    "\n": "continue",
    "": "detach",
}


def follow(run: Run, plan: Plan | ScriptPlan, as_json: bool, from_now: bool = False) -> int:
    """Show a run until it has ended, or the person leaves it; returns the exit code."""
    out = console(stderr=as_json)
    live = not as_json and sys.stdin.isatty() and out.file.isatty() and not out.is_dumb_terminal
    ended = None
    with suppress(KeyboardInterrupt):  # outside the view it means what it means twice inside
        out.print(plan_view.start(run.id, plan), soft_wrap=True)
        stop = partial(run.ask_to_stop, "Ctrl-C")
        look = partial(cluster.waits_for, run, plan)
        ended = live_view.follow(run, out, ask=partial(ask, live), stop=stop, look=look, from_now=from_now, live=live)
    if ended is None:
        leave(run, as_json, hint_only=True)
        return 0
    out.print(outcome.show(run, ended), soft_wrap=True)
    if as_json:
        click.echo(json.dumps(tables.facts(run), indent=2))
    return exit_code(ended)


def leave(run: Run, as_json: bool, hint_only: bool = False) -> None:
    """Say how to come back to a run that goes on alone; its name goes to standard output, for scripts."""
    if as_json:
        click.echo(json.dumps(tables.facts(run), indent=2))
    elif not hint_only:
        click.echo(run.id)
    name = words.called(run.where)
    hint = f"{run.id} goes on without you: `dtrain status {name} -f` shows it, `dtrain stop {name}` stops it"
    click.echo(hint, err=True)


def exit_code(record: Record) -> int:
    """What a command that followed a run ends with: the run record's word, never a log's."""
    if record.exit_code is not None:
        return record.exit_code
    return 0 if record.state == "succeeded" else 1


def ask(live: bool) -> Answer:
    """What Ctrl-C meant. Without a terminal there is nobody to ask: the run goes on, unattended."""
    if not live:
        return "detach"
    with _single_keys() as key:
        click.echo("\n[d]etach and let it run, [s]top after a checkpoint, or [c]ontinue? ", nl=False, err=True)
        while (answer := KEYS.get(key())) is None:
            pass
    click.echo(answer, err=True)
    return answer


@contextmanager
def _single_keys() -> Iterator[Callable[[], str]]:
    """Keys as they are typed, Ctrl-C excepted; none typed since the question was printed is lost."""
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal, termios.TCSADRAIN)
    try:
        yield lambda: os.read(terminal, 1).decode(errors="replace").lower()
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
