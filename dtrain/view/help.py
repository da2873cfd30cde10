"""The commands by what they are for, exit codes, and completion of run names. Imports click alone."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

EXIT_CODES = """\b
Exit codes:
  0    it worked; a run that was followed has succeeded
  1    dtrain itself got something wrong
  2    a file, an option or a name is wrong
  3    the user's code or data made training fail
  4    workers kept failing until the retries were spent
  5    the cluster cannot be reached, refused, or went away
  6    the run's storage cannot be written, or holds no valid checkpoint
  130  the run was stopped

RUN is the name of a run, the start of one, its last part, or its folder; the
latest run when left out. `dtrain COMMAND --help` explains a command.
"""


SIGPIPE_EXIT_CODE = 141
"""What a shell reports of a program whose reader went away."""


class Sections(click.Group):
    """A group whose help lists its commands by what they are for, in the order they were added."""

    sections: dict[str, list[str]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = {}

    def section(self, title: str, *commands: click.Command) -> None:
        """Adds commands and lists them under `title`."""
        for command in commands:
            self.add_command(command)
        self.sections[title] = [str(command.name) for command in commands]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(len(name) for names in self.sections.values() for name in names)
        for title, names in self.sections.items():
            with formatter.section(title):
                rows = [(f"{n:<{width}}", self.commands[n].get_short_help_str(100)) for n in names]
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read our output has gone; so that Python does not complain at exit, nothing is flushed to it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(SIGPIPE_EXIT_CODE) from None
        return result

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(args[0], self.commands, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; `dtrain --help` lists them all"
            raise click.UsageError(f"there is no command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)


class ChecksFirst(click.Command):
    """A command whose `--dry-run` may carry a word, `--dry-run=server`, and never takes the next argument for it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, ["--dry-run=client" if arg == "--dry-run" else arg for arg in args])


def complete_run(ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":  # noqa: ARG001
    """Names of runs, read from folder names alone: completion must not wait for imports."""
    from click.shell_completion import CompletionItem

    storage = Path(ctx.params.get("storage") or "runs")
    names = sorted(p.parent.name for p in storage.glob("*/run.json"))
    tails = [n for n in names if n.rpartition("-")[2].startswith(incomplete)] if incomplete else []
    return [CompletionItem(n) for n in names if n.startswith(incomplete)] or [CompletionItem(n) for n in tails]
