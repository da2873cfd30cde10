"""Every command. Each loads, plans, hands over and prints; what it prints with is in `dtrain/view/`.

Nothing heavy is imported before a command runs: `dtrain --help` must answer at once.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dtrain import __version__
from dtrain.errors import ClusterError, DtrainError, InputError, Stopped
from dtrain.view.help import EXIT_CODES, ChecksFirst, Sections, complete_run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from dtrain.backends import Sight
    from dtrain.finding import Finding
    from dtrain.plan import Plan, ScriptPlan
    from dtrain.runs import Run
    from dtrain.spec.cluster import ClusterSpec


@click.group(cls=Sections, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="dtrain %(version)s")
def cli() -> None:
    """Train models on this machine or on a Ray cluster, and keep the training alive.

    \b
    dtrain submit jobs/gpt_small.yaml     train, here, now
    """


# -- arguments that commands share -----------------------------------------------------------------------------


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


# -- ask -------------------------------------------------------------------------------------------------------


@cli.section("Ask")
@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=".")
@click.option(
    "-m",
    "--model",
    type=click.Choice(["mlp", "cnn", "rnn", "transformer", "autoencoder", "gan"]),
    default="cnn",
    show_default=True,
    help="What kind of task to begin from.",
)
def init(folder: Path, model: str) -> None:
    """Write a job and a task of your own, ready to run.

    Into FOLDER, this one when left out."""
    from dtrain import starting

    made = starting.files(model, folder)
    starting.write(made)
    for path in made:
        click.echo(path)
    _say(f"`dtrain submit {folder / 'job.yaml'}` trains it")


@cli.section("Ask")
@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
def validate(files: tuple[Path, ...]) -> None:
    """Check job and cluster files, every mistake at once."""
    from dtrain.spec import document, load

    mistakes: list[str] = []
    for file in files:
        try:
            is_cluster = "backend" in document.read(file).value
            spec = load.load_cluster(file) if is_cluster else load.load_job(file)
            click.echo(f"{file}: a valid {'cluster' if is_cluster else 'job'} file ({spec.name})")
        except InputError as error:
            mistakes.append(error.message)
    if mistakes:
        raise InputError("\n".join(mistakes))


@cli.section("Ask")
@click.command()
@JOB
@CLUSTER
@SET
@JSON
def plan(file: Path, cluster: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what would run, and what was resolved to what."""
    decided = _plan(file, cluster, overrides)
    if as_json:
        click.echo(decided.to_json())
    else:
        from dtrain.view import console
        from dtrain.view import plan as view

        console().print(view.show(decided))


@cli.section("Ask")
@click.command()
@click.argument("kind", type=click.Choice(["job", "cluster"]), default="job")
def schema(kind: str) -> None:
    """Print a JSON Schema for your editor.

    With it, editors complete and check job or cluster files."""
    from dtrain.spec.schema import schema_text

    click.echo(schema_text(kind), nl=False)


# -- run -------------------------------------------------------------------------------------------------------


@cli.section("Run")
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
    from dtrain import api, runs

    decided = _plan(file, cluster, overrides)
    name = runs.new_name(decided)
    if dry_run:
        _dry_run(decided, name, with_server=dry_run == "server")
        return
    run, planned = api.create(decided, api.job_text(file, overrides), _say, file.parent, name)
    api.hand_over(run, planned, _say)
    _attend(run, planned, detach, as_json)


@cli.section("Run")
@click.command()
@RUN
@STORAGE
@DETACH
@JSON
def resume(word: str | None, storage: str | None, cluster: Path | None, detach: bool, as_json: bool) -> None:
    """Go on with a run from its newest valid checkpoint.

    For a run that failed, was stopped or was lost."""
    from dtrain import api, code

    run = _find(storage, cluster, word)
    decided = run.plan
    run.requeue("resumed")
    for path in code.changed(decided.code):
        runs_as = "it runs as it is now" if decided.backend.name == "local" else "the cluster runs what was submitted"
        _say(f"{path} is not what it was when the run was submitted; {runs_as}")
    api.hand_over(run, decided, _say, resumes=True)
    _attend(run, decided, detach, as_json, from_now=True)


@cli.section("Run")
@click.command()
@RUN
@STORAGE
@click.option("--timeout", "timeout_s", default=150.0, show_default=True, help="Longest wait for its end, in seconds.")
def stop(word: str | None, storage: str | None, cluster: Path | None, timeout_s: float) -> None:
    """Stop a run after a last checkpoint, and wait for its end."""
    from dtrain import api

    run = _find(storage, cluster, word)
    record = run.record
    if record.ended and record.state != "lost":
        api.stop(run, "dtrain stop", timeout_s)
        click.echo(f"{run.id} has already ended: {record.state}")
        return
    record = api.stop(run, "dtrain stop", timeout_s)
    click.echo(f"{run.id}: {record.state}" + (f" ({record.cause})" if record.cause else ""))


# -- look ------------------------------------------------------------------------------------------------------


@cli.section("Look")
@click.command()
@STORAGE
@JSON
def ps(storage: str | None, cluster: Path | None, as_json: bool) -> None:
    """List the runs and where they stand."""
    from dtrain import runs
    from dtrain.view import console, tables

    where = _where(storage, cluster)
    listed = runs.list_runs(where)
    seen = _sights(cluster) if listed else {}
    if as_json:
        _echo_json([tables.facts(run, seen.get(run.id)) for run in listed])
    elif listed:
        out = console()
        out.print(tables.ps(listed, out.width, seen))
    else:
        click.echo(f"{where}: no runs yet; `dtrain submit JOB` makes one", err=True)


@cli.section("Look")
@click.command()
@RUN
@STORAGE
@click.option("-f", "--follow", "follows", is_flag=True, help="Show it live until it has ended.")
@JSON
def status(word: str | None, storage: str | None, cluster: Path | None, follows: bool, as_json: bool) -> None:
    """Tell the whole story of a run; -f shows it live.

    State and cause, attempts, checkpoints, paths."""
    from dtrain.view import console, tables

    run = _find(storage, cluster, word)
    if follows:
        _attend(run, run.plan, False, as_json, from_now=True)
        return
    sight = _sight(run)
    if as_json:
        seen = {} if sight is None else {"cluster": sight.model_dump()}
        _echo_json({**tables.facts(run), "checkpoints": tables.checkpoints(run), **seen})
    else:
        console().print(tables.status(run, sight))


@cli.section("Look")
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
    run = _find(storage, cluster, word)
    try:
        view.show(run, pattern, sys.stdout.buffer, follows=follows, num_lines=num_lines)
    except InputError:
        from dtrain.view import cluster as of_cluster

        if not of_cluster.logs(run, pattern, sys.stdout.buffer, follows):
            raise


@cli.section("Look")
@click.command()
@RUN
@STORAGE
@click.option("--all", "everything", is_flag=True, help="Every line; a screenful, evenly spread, when left out.")
@JSON
def metrics(word: str | None, storage: str | None, cluster: Path | None, everything: bool, as_json: bool) -> None:
    """Show what a run measured, step by step."""
    lines = _find(storage, cluster, word).metrics()
    if as_json:
        _echo_json(lines)
    elif lines:
        from dtrain.view import console, tables

        console().print(tables.metrics(lines, everything), soft_wrap=True)
    else:
        click.echo("nothing measured yet", err=True)


@cli.section("Look")
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
    run = _find(storage, cluster, word)
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


# -- where it runs ---------------------------------------------------------------------------------------------


@cli.section("The cluster")
@click.group("cluster", cls=Sections)
def cluster_group() -> None:
    """Start, show or end a cluster.

    The one that a cluster file names; this machine's when none is given."""


@cluster_group.section("Commands")
@click.command("up")
@CLUSTER
@SET
def cluster_up(cluster: Path | None, overrides: tuple[str, ...]) -> None:
    """Start it, if it does not run already."""
    place, backend = _place(cluster, overrides)
    backend.cluster_up(place.backend, _say)
    click.echo(f"cluster {place.name} is up")


@cluster_group.section("Commands")
@click.command("status")
@CLUSTER
@SET
@JSON
def cluster_status(cluster: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show whether it runs, and what it has."""
    place, backend = _place(cluster, overrides)
    found = backend.cluster_status(place.backend)
    if as_json:
        _echo_json(found)
    else:
        from dtrain.view import console, tables

        console().print(tables.pairs(f"cluster {place.name}", found))


@cluster_group.section("Commands")
@click.command("scale")
@click.argument("nodes", type=click.IntRange(min=0))
@CLUSTER
@SET
def cluster_scale(nodes: int, cluster: Path | None, overrides: tuple[str, ...]) -> None:
    """Give it NODES nodes."""
    place, backend = _place(cluster, overrides)
    _offered(place, backend, "cluster_scale", "cannot be scaled by dtrain")(place.backend, nodes, _say)
    click.echo(f"cluster {place.name} was asked for {nodes} node{'' if nodes == 1 else 's'}")


@cluster_group.section("Commands")
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


@cluster_group.section("Commands")
@click.command("down")
@CLUSTER
@SET
def cluster_down(cluster: Path | None, overrides: tuple[str, ...]) -> None:
    """End it, and every run on it."""
    place, backend = _place(cluster, overrides)
    for line in backend.cluster_down(place.backend) or [f"cluster {place.name} was not up"]:
        click.echo(line)


@cli.section("The cluster")
@click.command()
@JSON
def doctor(as_json: bool) -> None:
    """Check whether this machine can train.

    Versions, devices, shared memory, ports, collectives, and a training step."""
    from dtrain.doctor import examine

    _findings(examine(_say), "this machine", as_json)


@cli.section("The cluster")
@click.command()
@STORAGE
@click.option("--once", is_flag=True, help="Look once and end.")
@click.option(
    "--every", "every_s", default=15.0, show_default=True, type=click.FloatRange(1.0), help="Seconds between looks."
)
def supervise(storage: str | None, cluster: Path | None, once: bool, every_s: float) -> None:
    """Hand runs over again whose driver was lost.

    Under the same name, from their newest valid checkpoint, as often as retry.driver allows."""
    import time

    from dtrain import supervise as watching
    from dtrain.errors import StorageError

    where = _where(storage, cluster)
    place = _place(cluster, ())[0] if cluster is not None else None
    _say(f"looking over the runs in {where}")
    watcher = watching.Watcher(where, place, _say)
    while True:
        try:
            watcher.look()
        except StorageError as error:
            if once:
                raise
            _say(error.message)  # storage that does not answer now may do so later
        if once:
            return
        time.sleep(every_s)


@cli.section("The cluster")
@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the shell's completion script.

    \b
    bash:  eval "$(dtrain completion bash)"      in ~/.bashrc
    zsh:   eval "$(dtrain completion zsh)"       in ~/.zshrc
    fish:  dtrain completion fish | source       in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "dtrain", "_DTRAIN_COMPLETE").source())


# -- hops ------------------------------------------------------------------------------------------------------


def _plan(file: Path, cluster: Path | None, overrides: tuple[str, ...]) -> "Plan | ScriptPlan":
    from dtrain import api

    return api.decide(file, cluster, overrides)


def _place(cluster: Path | None, overrides: tuple[str, ...]) -> "tuple[ClusterSpec, ModuleType]":
    from dtrain import api, component
    from dtrain.spec.load import load_cluster

    place = load_cluster(cluster or api.default_cluster(), overrides)
    return place, component.load("backends", place.backend.name)


def _find(storage: str | None, cluster: Path | None, word: str | None) -> "Run":
    from dtrain import runs

    return runs.find(_where(storage, cluster), word)


def _where(storage: str | None, cluster: Path | None) -> str:
    """The storage that is meant: the one given, else that of the cluster file, else `runs`."""
    if storage is not None or cluster is None:
        return storage or "runs"
    from dtrain.plan import storage_of
    from dtrain.spec.load import load_cluster

    return storage_of(load_cluster(cluster).storage)


def _dry_run(decided: "Plan | ScriptPlan", name: str, with_server: bool) -> None:
    from dtrain import api

    backend = api.backend_of(decided)
    submission = backend.render(decided, Path(decided.storage) / name)
    if with_server:
        if not hasattr(backend, "check"):
            raise InputError(f"backend {decided.backend.name} has no server that checks; leave out =server")
        for warning in backend.check(submission, decided.backend):
            _say(f"warning: {warning}")
    click.echo(submission.text())


def _offered(place: "ClusterSpec", backend: "ModuleType", verb: str, otherwise: str) -> Any:
    """What not every kind of cluster has. Raises `InputError`."""
    if not hasattr(backend, verb):
        raise InputError(f"cluster {place.name} ({place.backend.name}) {otherwise}")
    return getattr(backend, verb)


def _sight(run: "Run") -> "Sight | None":
    """What the cluster says of a run that its folder says little of; that it cannot be asked is no error here."""
    if run.record.state not in ("queued", "starting", "lost"):
        return None
    from dtrain import api
    from dtrain.backends import Sight

    try:
        return api.sight_of(run, run.plan)
    except ClusterError as error:
        return Sight(phase="queued", why=f"its cluster cannot be asked: {error.message}")


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
        _say(f"the cluster cannot be asked: {error.message}")
        return {}


def _findings(findings: "Sequence[Finding]", what: str, as_json: bool) -> None:
    """Print what a doctor found. Raises `ClusterError` when there is a problem."""
    from dataclasses import asdict

    from dtrain.view import console
    from dtrain.view import doctor as view

    verdict = view.verdict(findings, what)
    if as_json:
        _echo_json([asdict(finding) for finding in findings])
    else:
        console().print(view.show(findings))
    if any(finding.state == "problem" for finding in findings):
        raise ClusterError(verdict)
    _say(verdict)


def _attend(run: "Run", decided: "Plan | ScriptPlan", detach: bool, as_json: bool, from_now: bool = False) -> None:
    from dtrain.view import attend

    if detach:
        attend.leave(run, as_json)
    else:
        code = attend.follow(run, decided, as_json, from_now)
        while code == ClusterError.exit_code and _revived(run):
            code = attend.follow(run, decided, as_json, from_now=True)
        sys.exit(code)


def _revived(run: "Run") -> bool:
    """Whether a run that was lost while somebody followed it goes on."""
    if run.record.state != "lost":
        return False
    from dtrain import supervise

    return supervise.revive(run, _say)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _echo_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, indent=2, default=str))


def main() -> None:
    """The `dtrain` command: a mistake prints one message and its exit code, a bug its traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = cli.main(prog_name="dtrain", standalone_mode=False)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"\n       `{context.command_path} --help` explains" if context else ""
        click.echo(f"error: {error.format_message()}{hint}", err=True)
        code = error.exit_code
    except DtrainError as error:
        click.echo("error: " + error.message.replace("\n", "\n       "), err=True)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = Stopped.exit_code
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
