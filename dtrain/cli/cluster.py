"""Commands about the place where runs run: `dtrain cluster up` and its kin, `doctor`, `supervise`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dtrain.cli.shared import CLUSTER, JSON, SET, STORAGE, echo_json, say, where_of
from dtrain.errors import ClusterError, InputError
from dtrain.view.help import Sections

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from dtrain.finding import Finding
    from dtrain.spec.cluster import ClusterSpec


@click.command("up")
@CLUSTER
@SET
def up(cluster: Path | None, overrides: tuple[str, ...]) -> None:
    """Start it, if it does not run already."""
    place, backend = _place(cluster, overrides)
    backend.cluster_up(place.backend, say)
    click.echo(f"cluster {place.name} is up")


@click.command("status")
@CLUSTER
@SET
@JSON
def status(cluster: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show whether it runs, and what it has."""
    place, backend = _place(cluster, overrides)
    found = backend.cluster_status(place.backend)
    if as_json:
        echo_json(found)
    else:
        from dtrain.view import console, tables

        console().print(tables.pairs(f"cluster {place.name}", found))


@click.command("scale")
@click.argument("nodes", type=click.IntRange(min=0))
@CLUSTER
@SET
def scale(nodes: int, cluster: Path | None, overrides: tuple[str, ...]) -> None:
    """Give it NODES nodes."""
    place, backend = _place(cluster, overrides)
    _offered(place, backend, "cluster_scale", "cannot be scaled by dtrain")(place.backend, nodes, say)
    click.echo(f"cluster {place.name} was asked for {nodes} node{'' if nodes == 1 else 's'}")


@click.command("doctor")
@CLUSTER
@SET
@JSON
def cluster_doctor(cluster: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check whether it can take runs.

    Permissions, what must be installed there, queues, storage, capacity."""
    place, backend = _place(cluster, overrides)
    examine = _offered(place, backend, "cluster_doctor", "has nothing to be asked; `dtrain doctor` checks this machine")
    _findings(examine(place.backend), f"cluster {place.name}", as_json)


@click.command("down")
@CLUSTER
@SET
def down(cluster: Path | None, overrides: tuple[str, ...]) -> None:
    """End it, and every run on it."""
    place, backend = _place(cluster, overrides)
    for line in backend.cluster_down(place.backend) or [f"cluster {place.name} was not up"]:
        click.echo(line)


@click.group("cluster", cls=Sections)
def group() -> None:
    """Start, show or end a cluster.

    The one that a cluster file names; this machine's when none is given."""


group.section("Commands", up, status, scale, cluster_doctor, down)


@click.command()
@JSON
def doctor(as_json: bool) -> None:
    """Check whether this machine can train.

    Versions, devices, shared memory, ports, collectives, and a training step."""
    from dtrain.doctor import examine

    _findings(examine(say), "this machine", as_json)


@click.command()
@STORAGE
@click.option("--once", is_flag=True, help="Look once and end.")
@click.option(
    "--every", "every_s", default=15.0, show_default=True, type=click.FloatRange(1.0), help="Seconds between looks."
)
@click.option(
    "--alive",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A file to touch at the beginning and after each look that succeeds: a sign of life for who watches.",
)
def supervise(storage: str | None, cluster: Path | None, once: bool, every_s: float, alive: Path | None) -> None:
    """Hand runs over again whose driver was lost.

    Under the same name, from their newest valid checkpoint, as often as retry.driver allows."""
    import signal
    import time

    from dtrain import supervise as watching
    from dtrain.errors import StorageError

    where = where_of(storage, cluster)
    place = _place(cluster, ())[0] if cluster is not None else None
    say(f"looking over the runs in {where}")
    told: list[int] = []
    if not once:  # the first process of a container is not ended by a signal that it does not catch
        signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    watcher = watching.Watcher(where, place, say, lambda: _touch(alive))
    _touch(alive)
    while not told:
        try:
            watcher.look()
        except StorageError as error:
            if once:
                raise
            say(error.message)  # storage that does not answer now may do so later
        if once:
            return
        again = time.monotonic() + every_s
        while not told and (left := again - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))


def _touch(alive: Path | None) -> None:
    """Say that the supervisor lives. Raises `InputError` when its file cannot be touched."""
    if alive is None:
        return
    try:
        alive.touch()
    except OSError as error:
        raise InputError(f"--alive {alive}: it cannot be touched ({error.strerror}); name a file that can") from error


def _place(cluster: Path | None, overrides: tuple[str, ...]) -> "tuple[ClusterSpec, ModuleType]":
    from dtrain import api, component
    from dtrain.spec.load import load_cluster

    place = load_cluster(cluster or api.default_cluster(), overrides)
    return place, component.load("backends", place.backend.name)


def _offered(place: "ClusterSpec", backend: "ModuleType", verb: str, otherwise: str) -> Any:
    """What not every kind of cluster has. Raises `InputError`."""
    if not hasattr(backend, verb):
        raise InputError(f"cluster {place.name} ({place.backend.name}) {otherwise}")
    return getattr(backend, verb)


def _findings(findings: "Sequence[Finding]", what: str, as_json: bool) -> None:
    """Print what a doctor found. Raises `ClusterError` when there is a problem."""
    from dataclasses import asdict

    from dtrain.view import console
    from dtrain.view import doctor as view

    verdict = view.verdict(findings, what)
    if as_json:
        echo_json([asdict(finding) for finding in findings])
    else:
        console().print(view.show(findings))
    if any(finding.state == "problem" for finding in findings):
        raise ClusterError(verdict)
    say(verdict)
