"""What several commands share: their arguments, and the few steps between a command line and dtrain's functions."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dtrain.errors import ClusterError
from dtrain.view.help import complete_run

if TYPE_CHECKING:
    from dtrain.plan import Plan, ScriptPlan
    from dtrain.runs import Run


JOB = click.argument("file", type=click.Path(path_type=Path))
CLUSTER = click.option(
    "-c",
    "--cluster",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where to run: a cluster file. This machine when left out.",
)
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting: train.steps=100, or cluster.storage=FOLDER for the cluster. May be given again.",
)
RUN = click.argument("word", metavar="[RUN]", required=False, shell_complete=complete_run)
_STORAGE = click.option(
    "--storage", metavar="PLACE", help="Folder or URI in which runs are looked for.  [default: runs]"
)
_ITS_STORAGE = click.option(
    "-c", "--cluster", type=click.Path(path_type=Path), metavar="FILE", help="Look in the storage of a cluster file."
)


def STORAGE(command: Any) -> Any:  # noqa: N802 - beside the others it is one of them
    """`--storage`, and `--cluster` for where that cluster keeps its runs."""
    return _STORAGE(_ITS_STORAGE(command))


JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, for a program to read.")
DETACH = click.option("-d", "--detach", is_flag=True, help="Hand the run over and return at once.")


def decide(file: Path, cluster: Path | None, overrides: tuple[str, ...]) -> "Plan | ScriptPlan":
    from dtrain import api

    return api.decide(file, cluster, overrides)


def find(storage: str | None, cluster: Path | None, word: str | None) -> "Run":
    from dtrain import runs

    return runs.find(where_of(storage, cluster), word)


def where_of(storage: str | None, cluster: Path | None) -> str:
    """The storage that is meant: the one given, else that of the cluster file, else `runs`."""
    if storage is not None or cluster is None:
        return storage or "runs"
    from dtrain.plan import storage_of
    from dtrain.spec.load import load_cluster

    return storage_of(load_cluster(cluster).storage)


def see_through(run: "Run", decided: "Plan | ScriptPlan", detach: bool, as_json: bool, from_now: bool = False) -> None:
    """Leave a run to itself, or follow it to its end and exit with its code."""
    from dtrain.view import attend

    if detach:
        attend.leave(run, as_json)
    else:
        code = attend.follow(run, decided, as_json, from_now)
        try:
            while code == ClusterError.exit_code and _revived(run):
                code = attend.follow(run, decided, as_json, from_now=True)
        except KeyboardInterrupt:  # nobody has to wait for a cluster that brings the run back
            attend.leave(run, as_json, hint_only=True)
            code = 0
        sys.exit(code)


def _revived(run: "Run") -> bool:
    """Whether a run that was lost while somebody followed it goes on."""
    if run.record.state != "lost":
        return False
    from dtrain import supervise

    return supervise.revive(run, say)


def say(text: str) -> None:
    click.echo(text, err=True)


def echo_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, indent=2, default=str))
