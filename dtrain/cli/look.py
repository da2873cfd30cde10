"""Commands that look at runs and change nothing: `dtrain ps`, `status`, `logs`, `metrics`, `sample`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dtrain.cli.shared import JSON, RUN, STORAGE, echo_json, find, say, see_through, where_of
from dtrain.errors import ClusterError, InputError

if TYPE_CHECKING:
    from dtrain.backends import Sight
    from dtrain.runs import Run


@click.command()
@STORAGE
@JSON
def ps(storage: str | None, cluster: Path | None, as_json: bool) -> None:
    """List the runs and where they stand."""
    from dtrain import runs
    from dtrain.view import console, tables

    where = where_of(storage, cluster)
    listed = runs.list_runs(where)
    seen = _sights(cluster) if listed else {}
    if as_json:
        echo_json([tables.facts(run, seen.get(run.id)) for run in listed])
    elif listed:
        out = console()
        out.print(tables.ps(listed, out.width, seen))
    else:
        click.echo(f"{where}: no runs yet; `dtrain submit JOB` makes one", err=True)


@click.command()
@RUN
@STORAGE
@click.option("-f", "--follow", "follows", is_flag=True, help="Show it live until it has ended.")
@JSON
def status(word: str | None, storage: str | None, cluster: Path | None, follows: bool, as_json: bool) -> None:
    """Tell the whole story of a run; -f shows it live.

    State and cause, attempts, checkpoints, paths."""
    from dtrain.view import console, tables

    run = find(storage, cluster, word)
    if follows:
        see_through(run, run.plan, False, as_json, from_now=True)
        return
    sight = _sight(run)
    if as_json:
        echo_json({**tables.facts(run, sight), "checkpoints": tables.checkpoints(run)})
    else:
        console().print(tables.status(run, sight))


@click.command()
@RUN
@STORAGE
@click.option("-f", "--follow", "follows", is_flag=True, help="Go on until the run has ended.")
@click.option("-n", "--lines", "num_lines", type=click.IntRange(min=0), help="Begin with the last N lines of each log.")
@click.option("--rank", type=click.IntRange(min=0), help="Only the log of this worker.")
@click.option("--driver", "which", flag_value="driver", help="The log of the driver.")
@click.option("--agent", "which", flag_value="agent", help="The logs of the agents, one a node.")
def logs(
    word: str | None,
    storage: str | None,
    cluster: Path | None,
    follows: bool,
    num_lines: int | None,
    rank: int | None,
    which: str,
) -> None:
    """Print what its workers printed, in all attempts."""
    from dtrain.view import logs as view

    if rank is not None and which:
        raise click.UsageError("--rank names a worker's log; leave out --driver and --agent")
    pattern = (
        f"rank-{rank}.log" if rank is not None else "driver.log" if which == "driver" else f"{which or 'rank'}-*.log"
    )
    run = find(storage, cluster, word)
    try:
        view.show(run, pattern, sys.stdout.buffer, follows=follows, num_lines=num_lines)
    except InputError:
        from dtrain.view import cluster as of_cluster

        if not of_cluster.logs(run, pattern, sys.stdout.buffer, follows):
            raise


@click.command()
@RUN
@STORAGE
@click.option("--all", "everything", is_flag=True, help="Every line; a screenful, evenly spread, when left out.")
@JSON
def metrics(word: str | None, storage: str | None, cluster: Path | None, everything: bool, as_json: bool) -> None:
    """Show what a run measured, step by step."""
    lines = find(storage, cluster, word).metrics()
    if as_json:
        echo_json(lines)
    elif lines:
        from dtrain.view import console, tables

        console().print(tables.metrics(lines, everything), soft_wrap=True)
    else:
        click.echo("nothing measured yet", err=True)


@click.command()
@RUN
@STORAGE
@click.option("-p", "--prompt", default="", help="Text to go on from.")
@click.option(
    "-n", "--length", default=200, show_default=True, type=click.IntRange(1, 100_000), help="Tokens to write."
)
@click.option(
    "-t", "--temperature", default=0.8, show_default=True, type=click.FloatRange(0.0, 100.0), help="0 is greedy."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Another seed, another text.")
def sample(
    word: str | None, storage: str | None, cluster: Path | None, prompt: str, length: int, temperature: float, seed: int
) -> None:
    """Let its newest checkpoint write, or draw, something."""
    run = find(storage, cluster, word)
    from dtrain.models import Request
    from dtrain.storage import is_remote
    from dtrain.training import gallery
    from dtrain.training.sample import generate  # torch takes seconds, a wrong name should not
    from dtrain.view.words import visible

    sample = generate(run, Request(prompt=prompt, length=length, temperature=temperature, seed=seed))
    if sample.text:
        click.echo(visible(sample.text))
    if sample.pictures is not None:
        step = int(run.record.outcome["steps"]) if run.record.outcome else 0
        folder = Path(f"{run.id}-samples") if is_remote(run.where) else run.samples
        click.echo(folder / gallery.save(folder, step, sample.pictures))


def _sight(run: "Run") -> "Sight | None":
    """What the cluster says of a run that its folder says little of; that it cannot be asked is no error here."""
    if run.record.state not in ("queued", "starting", "lost"):
        return None
    from dtrain import api
    from dtrain.backends import Sight

    try:
        return api.sight_of(run, run.plan)
    except ClusterError as error:
        return Sight(phase="unknown", why=f"its cluster cannot be asked: {error.message}")


def _sights(cluster: Path | None) -> "dict[str, Sight]":
    """What a cluster file's cluster says of all its runs; that it cannot be asked is said, and no error."""
    if cluster is None:
        return {}
    from dtrain import component
    from dtrain.spec.load import load_cluster

    options = load_cluster(cluster).backend
    backend = component.load("backends", options.name)
    try:
        return dict(backend.sights(options)) if hasattr(backend, "sights") else {}
    except ClusterError as error:
        say(f"the cluster cannot be asked: {error.message}")
        return {}
