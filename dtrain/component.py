"""Finds the one file behind a name in a job or cluster file: `strategy: {name: ddp}` is `dtrain/strategies/ddp.py`.

Each extensible folder states its contract in its `__init__.py`. A component file declares its options in a
class named `Options` and imports torch or ray inside functions only, so that reading and planning need neither.
`dtrain.spec` and what lies above it (`plan`, `runs`) are made of these options: a component file imports them
inside functions or for type checking only.
"""

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, create_model

from dtrain.errors import InputError

DECLARES_OPTIONS = re.compile(r"^class Options\b", re.MULTILINE)


class Options(BaseModel):
    """Base of every settings class: frozen, unknown keys refused, the sentence under a field is its help."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
        populate_by_name=True,
        protected_namespaces=(),
    )


class Named(Options):
    """What a type checker knows of a chosen component: it has a name, and options of its own."""

    name: str


@dataclass(frozen=True)
class Says:
    """Beside a type in `Annotated`: how a message and the reference say what is expected, e.g. `a name of ...`."""

    phrase: str


@cache
def names(folder: str) -> tuple[str, ...]:
    """Names of the components in `dtrain/<folder>/`, sorted: every file there that declares a class `Options`.

    The files are read, not imported: the helpers beside components may need torch, and may import this module.
    """
    paths = importlib.import_module(f"dtrain.{folder}").__path__
    files = [file for path in paths for file in Path(path).glob("[a-z]*.py")]
    return tuple(sorted(file.stem for file in files if DECLARES_OPTIONS.search(file.read_text(encoding="utf-8"))))


def load(folder: str, name: str) -> ModuleType:
    """The module behind `name`, e.g. `load("strategies", "ddp")`.

    Raises `InputError` with the nearest name when there is no such component.
    """
    known = names(folder)
    if name not in known:
        raise InputError(f"there is no {name!r} in dtrain/{folder}/{suggestion(name, known)}")
    return importlib.import_module(f"dtrain.{folder}.{name}")


def suggestion(word: str, known: Iterable[str]) -> str:
    """A half-sentence that helps after a mistyped word: `; did you mean 'x'?`, or the list of what there is."""
    candidates = list(known)
    near = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there is: {', '.join(sorted(candidates))}" if candidates else ""


@cache
def union(folder: str) -> Any:
    """The type of a setting that names a component: its `name` picks the options that may stand beside it."""
    members = [with_name(name, load(folder, name).Options) for name in names(folder)]
    if len(members) == 1:
        return members[0]
    return Annotated[Union[tuple(members)], Field(discriminator="name")]  # noqa: UP007 -- made at run time


@cache
def with_name(name: str, options: type[Options]) -> type[Options]:
    """`options` with the field `name: Literal[name]` that a file writes beside them."""
    doc = inspect.cleandoc(options.__doc__ or name)
    field: Any = (Literal[name], Field(default=name, description=doc.partition("\n")[0]))
    # Two folders may hold the same name: in a schema they are told apart by module.
    return create_model(name, __base__=options, __doc__=doc, __module__=options.__module__, name=field)
