"""Every command. Each loads, plans, hands over and prints; what it prints with is in `dtrain/view/`.

Nothing heavy is imported before a command runs: `dtrain --help` must answer at once.
"""

import atexit
import contextlib
import gc
import os
import sys

import click

from dtrain import __version__
from dtrain.cli import ask, cluster, look, run
from dtrain.errors import DtrainError, Stopped
from dtrain.view.help import EXIT_CODES, Sections


@click.group(cls=Sections, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="dtrain %(version)s")
def cli() -> None:
    """Train models on this machine or on a Ray cluster, and keep the training alive.

    \b
    dtrain submit jobs/gpt_small.yaml     train, here, now
    """


cli.section("Ask", ask.init, ask.validate, ask.plan, ask.schema)
cli.section("Run", run.submit, run.resume, run.stop)
cli.section("Look", look.ps, look.status, look.logs, look.metrics, look.sample)
cli.section("The cluster", cluster.group, cluster.doctor, cluster.supervise, ask.completion)


def entry() -> None:
    """What the shell runs: `main`, and then out at once, since taking thousands of classes down again takes time."""
    try:
        main()
    except SystemExit as leave:
        atexit._run_exitfuncs()  # temporary folders and files go
        with contextlib.suppress(OSError):  # whoever read it has gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(leave.code if isinstance(leave.code, int) else 0)


def main() -> None:
    """The `dtrain` command: a mistake prints one message and its exit code, a bug its traceback."""
    gc.set_threshold(500_000)  # the classes of an import are not garbage: looking through them is a tenth of a command
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
