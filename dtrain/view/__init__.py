"""What a person sees. Reads run folders and plans only; all but `help` is imported inside commands, for its weight.

- `help`: the commands by what they are for, and shell completion;
- `words`: durations, counts and strange characters, in a person's words;
- `plan`: a plan before it runs;
- `follow`: a run while it runs;
- `attend`: being with a run: following it, Ctrl-C, its end;
- `outcome`: a run after it has ended;
- `tables`: runs side by side, and the whole story of one;
- `logs`: what its processes printed;
- `cluster`: what its cluster says while its folder says nothing yet;
- `doctor`: what was found of this machine.
"""

import os
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 10_000
"""Columns of an output that is not a terminal: nothing is cut for a program that reads it."""


def console(stderr: bool = False) -> "Console":
    """A console that prints what it is given: no markup, no guessed colours, no wrapping for pipes."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDE
    made = Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)
    # A closed pipe is left to `dtrain.cli.main`, which ends every command the same way.
    made.on_broken_pipe = _broken_pipe  # type: ignore[method-assign]
    return made


def _broken_pipe() -> NoReturn:
    raise BrokenPipeError
