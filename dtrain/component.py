"""Finds the one file behind a name in a job or cluster file: `strategy: {name: ddp}` is `dtrain/strategies/ddp.py`.

Each extensible folder states its contract in its `__init__.py`. A component file declares its options in a
class named `Options` and imports torch or ray inside functions only, so that reading and planning need neither.
`dtrain.spec` and what lies above it (`plan`, `runs`) are made of these options: a component file imports them
inside functions or for type checking only.
"""

import importlib
import inspect
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from dtrain.errors import InputError
from dtrain.settings import Checked, Choice, Settings

DECLARES_OPTIONS = re.compile(r"^class Options\b", re.MULTILINE)


class Named(Settings):
    """What a type checker knows of a chosen component: it has a name, and options of its own."""

    name: str


@cache
def names(folder: str) -> tuple[str, ...]:
    """Names of the components in `dtrain/<folder>/`, sorted: every file there that declares a class `Options`.

    The files are read, not imported: the helpers beside components may need torch, and may import this module.
    """
    files = [file for path in _paths(folder) for file in path.glob("[a-z]*.py")]
    return tuple(sorted(file.stem for file in files if _declares_options(file)))


@cache
def is_there(folder: str, name: str) -> bool:
    """Whether there is a component of that name; reads its file alone."""
    return name.isidentifier() and any(_declares_options(path / f"{name}.py") for path in _paths(folder))


def load(folder: str, name: str) -> ModuleType:
    """The module behind `name`, e.g. `load("strategies", "ddp")`.

    Raises `InputError` with the nearest name when there is no such component.
    """
    if not is_there(folder, name):
        raise InputError(f"there is no {name!r} in dtrain/{folder}/{suggestion(name, names(folder))}")
    return importlib.import_module(f"dtrain.{folder}.{name}")


def _paths(folder: str) -> list[Path]:
    return [Path(path) for path in importlib.import_module(f"dtrain.{folder}").__path__]


def _declares_options(file: Path) -> bool:
    try:
        return DECLARES_OPTIONS.search(file.read_text(encoding="utf-8")) is not None
    except FileNotFoundError:
        return False


def suggestion(word: str, known: Iterable[str]) -> str:
    """A half-sentence that helps after a mistyped word: `; did you mean 'x'?`, or the list of what there is."""
    import difflib

    candidates = list(known)
    near = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there is: {', '.join(sorted(candidates))}" if candidates else ""


@cache
def union(folder: str) -> Any:
    """The type of a setting that names a component of a folder."""

    def find(name: str) -> type[Settings] | None:
        return with_name(name, load(folder, name).Options) if is_there(folder, name) else None

    return Choice(folder, lambda: names(folder), find)


@cache
def with_name(name: str, options: type[Settings]) -> type[Settings]:
    """`options` with the field `name: Literal[name]` that a file writes beside them."""
    body = {
        "__doc__": inspect.cleandoc(options.__doc__ or name),
        "__module__": options.__module__,
        "__annotations__": {"name": Literal[name]},
        "name": name,
    }
    made: type[Settings] = Checked(name, (options,), body)
    return made
