"""Commands that ask and decide, and start nothing: `dtrain init`, `validate`, `plan`, `schema`, `completion`."""

from pathlib import Path

import click

from dtrain.cli.shared import CLUSTER, JOB, JSON, SET, decide, say
from dtrain.errors import InputError


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
    say(f"`dtrain submit {folder / 'job.yaml'}` trains it")


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


@click.command()
@JOB
@CLUSTER
@SET
@JSON
def plan(file: Path, cluster: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what would run, and what was resolved to what."""
    decided = decide(file, cluster, overrides)
    if as_json:
        click.echo(decided.to_json())
    else:
        from dtrain.view import console
        from dtrain.view import plan as view

        console().print(view.show(decided))


@click.command()
@click.argument("kind", type=click.Choice(["job", "cluster"]), default="job")
def schema(kind: str) -> None:
    """Print a JSON Schema for your editor.

    With it, editors complete and check job or cluster files."""
    from dtrain.spec.schema import schema_text

    click.echo(schema_text(kind), nl=False)


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
    click.echo(kind(click.get_current_context().find_root().command, {}, "dtrain", "_DTRAIN_COMPLETE").source())
