"""Commands that begin and end runs: `dtrain submit`, `resume`, `stop`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dtrain.cli.shared import CLUSTER, DETACH, JOB, JSON, RUN, SET, STORAGE, decide, find, say, see_through
from dtrain.errors import InputError
from dtrain.view.help import ChecksFirst

if TYPE_CHECKING:
    from dtrain.plan import Plan, ScriptPlan


@click.command(cls=ChecksFirst)
@JOB
@CLUSTER
@SET
@DETACH
@click.option(
    "--dry-run",
    type=click.Choice(["client", "server"]),
    metavar="[=server]",
    help="Print what would be sent, and neither send nor write anything; =server lets the cluster check it.",
)
@JSON
def submit(
    file: Path, cluster: Path | None, overrides: tuple[str, ...], detach: bool, dry_run: str | None, as_json: bool
) -> None:
    """Train a job, and show it until it has ended.

    Ctrl-C asks: detach, stop, or go on. Ctrl-C twice detaches."""
    from dtrain import api

    decided = decide(file, cluster, overrides)
    if dry_run:
        _dry_run(decided, with_server=dry_run == "server")
        return
    run, planned = api.create(decided, api.job_text(file, overrides), say, file.parent)
    api.hand_over(run, planned, say)
    see_through(run, planned, detach, as_json)


@click.command()
@RUN
@STORAGE
@DETACH
@JSON
def resume(word: str | None, storage: str | None, cluster: Path | None, detach: bool, as_json: bool) -> None:
    """Go on with a run from its newest valid checkpoint.

    For a run that failed, was stopped or was lost."""
    from dtrain import api, code

    run = find(storage, cluster, word)
    decided = run.plan
    run.requeue("resumed")
    for path in code.changed(decided.code):
        runs_as = "it runs as it is now" if decided.backend.name == "local" else "the cluster runs what was submitted"
        say(f"{path} is not what it was when the run was submitted; {runs_as}")
    api.hand_over(run, decided, say, resumes=True)
    see_through(run, decided, detach, as_json, from_now=True)


@click.command()
@RUN
@STORAGE
@click.option("--timeout", "timeout_s", default=150.0, show_default=True, help="Longest wait for its end, in seconds.")
def stop(word: str | None, storage: str | None, cluster: Path | None, timeout_s: float) -> None:
    """Stop a run after a last checkpoint, and wait for its end."""
    from dtrain import api

    run = find(storage, cluster, word)
    record = run.record
    if record.ended and record.state != "lost":
        api.stop(run, "dtrain stop", timeout_s)
        click.echo(f"{run.id} has already ended: {record.state}")
        return
    record = api.stop(run, "dtrain stop", timeout_s)
    click.echo(f"{run.id}: {record.state}" + (f" ({record.cause})" if record.cause else ""))


def _dry_run(decided: "Plan | ScriptPlan", with_server: bool) -> None:
    from dtrain import api, runs

    backend = api.backend_of(decided)
    submission = backend.render(decided, Path(decided.storage) / runs.example_name(decided))
    if with_server:
        if not hasattr(backend, "check"):
            raise InputError(f"backend {decided.backend.name} has no server that checks; leave out =server")
        for warning in backend.check(submission, decided.backend):
            say(f"warning: {warning}")
    click.echo(submission.text())
